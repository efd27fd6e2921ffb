"""Forecasts: exact where they claim to be, as published where they follow a paper, and stable on computed values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowaccel.caching.history import History
from flowaccel.caching.predictors import PREDICTORS, AdamsBashforth, Hermite, Hold, Newton, Predictor, Taylor

UNEVEN = (1000.0, 962.0, 907.5, 790.0, 785.0, 611.0, 402.0, 399.0, 250.0, 100.0)
"""Falling times whose gaps differ by a factor of 70."""


def times(*values: float) -> Tensor:
    """One row, newest first."""
    return torch.tensor([values], dtype=torch.float64)


def at(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def forecast(predictor: Predictor, series: Callable[[Any], Any], anchors: Tensor, now: Tensor) -> Tensor:
    return (predictor.weights(anchors, now) * series(anchors)).sum(dim=1)


def polynomial(degree: int) -> Callable[[Any], Any]:
    return lambda t: sum((i + 1) * (-0.7) ** i * (t / 500) ** i for i in range(degree + 1))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_newton_is_exact_for_polynomials_of_its_order_on_uneven_grids(order: int) -> None:
    for newest in range(order, len(UNEVEN) - 1):
        anchors = times(*reversed(UNEVEN[newest - order : newest + 1]))
        now = at(UNEVEN[newest + 1])
        for degree in range(order + 1):
            series = polynomial(degree)
            torch.testing.assert_close(forecast(Newton(order), series, anchors, now), series(now), rtol=1e-7, atol=1e-7)
        above = polynomial(order + 1)
        assert abs(float(forecast(Newton(order), above, anchors, now) - above(now))) > 1e-6


def test_newton_is_the_divided_difference_recursion() -> None:
    anchors, now, values = (
        times(3.0, 4.5, 10.0, 11.0),
        at(1.0),
        torch.tensor([2.0, -1.0, 0.5, 7.0], dtype=torch.float64),
    )

    def divided(points: list[tuple[float, float]]) -> float:
        if len(points) == 1:
            return points[0][1]
        return (divided(points[1:]) - divided(points[:-1])) / (points[-1][0] - points[0][0])

    points = list(zip(anchors[0].tolist(), values.tolist(), strict=True))
    expected = sum(
        divided(points[: i + 1]) * math.prod(1.0 - point[0] for point in points[:i]) for i in range(len(points))
    )
    assert float((Newton(3).weights(anchors, now)[0] * values).sum()) == pytest.approx(expected, rel=1e-12)


def test_rows_have_times_of_their_own() -> None:
    anchors = torch.tensor([[3.0, 4.0, 9.0], [700.0, 800.0, 950.0]], dtype=torch.float64)
    now = torch.tensor([1.0, 605.0], dtype=torch.float64)
    for predictor in (Newton(2), Newton(2, reach=1.0), Taylor(2), Hermite(2), AdamsBashforth(2), Hold()):
        used = anchors[:, : predictor.anchors]
        together = predictor.weights(used, now)
        for row in (0, 1):
            alone = predictor.weights(used[row : row + 1], now[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-14, atol=0)


def test_rows_of_different_depth_each_get_the_order_they_can() -> None:
    """Row 0 was computed three times, row 1 twice, row 2 once: exact for a quadratic, a line and a constant."""
    history = History(Newton(2))
    series = [polynomial(2), polynomial(1), polynomial(0)]

    def value(t: float, rows: list[int]) -> tuple[Tensor]:
        return (torch.tensor([[series[row](t)] * 3 for row in rows], dtype=torch.float64),)

    history.store(value(900.0, [0, 1, 2]), 900.0)
    history.store(value(850.0, [0, 1]), 850.0, torch.tensor([0, 1]))
    history.store(value(700.0, [0]), 700.0, torch.tensor([0]))
    torch.testing.assert_close(history.predict(650.0)[0], value(650.0, [0, 1, 2])[0], rtol=1e-9, atol=1e-9)


def published_taylor(order: int, series: Callable[[float], float], computed: list[float], now: float) -> float:
    """TaylorSeer's own bookkeeping: factors updated at every computed step, over the last gap alone."""
    factors: list[float] = []
    for i, t in enumerate(computed):
        updated = [series(t)]
        for level in range(min(order, i)):
            if level < len(factors):
                updated.append((updated[level] - factors[level]) / (t - computed[i - 1]))
        factors = updated
    return sum(factor * (now - computed[-1]) ** i / math.factorial(i) for i, factor in enumerate(factors))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_taylor_is_the_published_bookkeeping(order: int) -> None:
    def series(t: float) -> float:
        return math.sin(t / 300) + t / 1000

    for newest in range(order, len(UNEVEN) - 1):
        computed = list(UNEVEN[newest - order : newest + 1])
        found = forecast(
            Taylor(order), lambda t: torch.sin(t / 300) + t / 1000, times(*reversed(computed)), at(UNEVEN[newest + 1])
        )
        assert float(found) == pytest.approx(published_taylor(order, series, computed, UNEVEN[newest + 1]), rel=1e-9)


def test_taylor_of_order_one_is_newton() -> None:
    for newest in range(1, len(UNEVEN) - 1):
        anchors, now = times(UNEVEN[newest], UNEVEN[newest - 1]), at(UNEVEN[newest + 1])
        torch.testing.assert_close(Taylor(1).weights(anchors, now), Newton(1).weights(anchors, now))


@pytest.mark.parametrize("anchors", [(7.0, 8.0, 9.0), (7.0, 8.0, 12.0)], ids=["even", "uneven"])
def test_taylor_of_order_two_misses_a_quadratic_and_newton_does_not(anchors: tuple[float, ...]) -> None:
    def square(t: Any) -> Any:
        return t * t

    assert float(forecast(Newton(2), square, times(*anchors), at(6.0))) == pytest.approx(36.0)
    newest, middle, oldest = anchors
    slope, before = newest + middle, middle + oldest  # of a square, over the last gap and over the one before
    bend = (slope - before) / (newest - middle)
    expected = newest**2 - slope + bend / 2
    assert float(forecast(Taylor(2), square, times(*anchors), at(6.0))) == pytest.approx(expected)
    assert abs(expected - 36.0) >= 0.5


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_hermite_replaces_the_powers_by_scaled_hermite_polynomials(order: int, normalised: bool) -> None:
    scale, anchors, now = 0.5, [16.0, 18.0, 20.0, 22.0, 24.0][: order + 1], 11.0
    values = np.random.default_rng(0).normal(size=order + 1)
    distance = (now - anchors[0]) / (anchors[0] - anchors[1])  # in last gaps
    expected, level = 0.0, values
    for i in range(order + 1):
        power = scale**i * np.polynomial.hermite.hermval(scale * distance, [0] * i + [1])
        expected += level[0] / math.factorial(i) * (power / (2 * scale**2) ** i if normalised else power)
        level = level[:-1] - level[1:]
    weights = Hermite(order, scale, normalised).weights(times(*anchors), at(now))[0]
    assert float(weights @ torch.from_numpy(values)) == pytest.approx(expected, rel=1e-12)


def test_hermite_as_published_halves_the_slope_and_normalised_keeps_it() -> None:
    anchors, now = times(5.0, 7.0), at(1.0)  # two gaps ahead
    assert Hermite(1).weights(anchors, now).tolist() == [[2.0, -1.0]]
    assert Hermite(1, normalised=True).weights(anchors, now).tolist() == [[3.0, -2.0]]


@pytest.mark.parametrize(("order", "weights"), [(0, [1]), (1, [2, -1]), (2, [3, -3, 1]), (3, [4, -6, 4, -1])])
def test_adams_bashforth_weights_are_binomial_right_after_steps_in_a_row(order: int, weights: list[int]) -> None:
    anchors = times(*(12.0, 11.0, 10.0, 9.0)[: order + 1])
    expected = torch.tensor([weights], dtype=torch.float64)
    torch.testing.assert_close(AdamsBashforth(order).weights(anchors, at(13.0)), expected)


def test_adams_bashforth_keeps_its_order_where_steps_were_left_out() -> None:
    anchors = times(6.0, 4.0, 2.0)
    for degree in range(3):
        series = polynomial(degree)
        found = forecast(AdamsBashforth(2), series, anchors, at(7.0))
        torch.testing.assert_close(found, series(at(7.0)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Newton, Taylor, Hermite])
def test_the_axis_is_the_timestep_unless_the_step_is_asked_for(kind: Any) -> None:
    assert kind().place(3, 871.5) == 871.5 and kind(axis="step").place(3, 871.5) == 3.0
    assert Hold().place(3, 871.5) == 871.5 and AdamsBashforth().place(3, 871.5) == 3.0
    with pytest.raises(ValueError, match="axis must be one of time, step, got 'sigma'"):
        kind(axis="sigma")


def test_hold_repeats_the_newest() -> None:
    assert Hold().weights(times(5.0, 7.0), at(1.0)).tolist() == [[1.0, 0.0]]


def test_beyond_its_reach_newton_holds_row_by_row() -> None:
    anchors = torch.tensor([[8.0, 10.0, 12.0]] * 3, dtype=torch.float64)  # mean gap 2
    now = torch.tensor([4.1, 4.0, 3.9], dtype=torch.float64)
    found = Newton(2, reach=2.0).weights(anchors, now)
    torch.testing.assert_close(found[:2], Newton(2).weights(anchors, now)[:2])
    assert found[2].tolist() == [1.0, 0.0, 0.0]
    assert Newton(2, reach=0.5).weights(anchors[:1, :1], now[:1]).tolist() == [[1.0]]


@pytest.mark.parametrize("name", PREDICTORS)
def test_weights_sum_to_one_at_any_depth(name: str) -> None:
    predictor = PREDICTORS[name]() if name == "hold" else PREDICTORS[name](order=4)  # type: ignore[call-arg]
    for depth in range(1, predictor.anchors + 1):
        anchors = torch.stack([times(*UNEVEN[i : i + depth][::-1])[0] for i in range(4)])
        found = predictor.weights(anchors, torch.full((4,), 90.0, dtype=torch.float64))
        assert found.shape == (4, depth)
        scale = found.abs().sum(dim=1).max().item()
        torch.testing.assert_close(found.sum(dim=1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", [Newton, Taylor, Hermite, AdamsBashforth])
@pytest.mark.parametrize("order", [-1, 5, 1.0, True, "2", None])
def test_orders_out_of_range_are_refused(kind: Any, order: Any) -> None:
    with pytest.raises(ValueError, match="order must be a whole number from 0"):
        kind(order=order)


def test_other_values_out_of_range_are_refused() -> None:
    for reach in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="reach must be above 0"):
            Newton(reach=reach)
    for scale in (0, -0.5, math.nan):
        with pytest.raises(ValueError, match="scale must be above 0"):
            Hermite(scale=scale)


# -- forecasts from computed values only, and not from forecasts


def interval_run(order: int, interval: int, series: Callable[[float], float], steps: int) -> Iterator[float]:
    """Errors at the reused steps of a run that computes every `interval`-th."""
    history = History(Newton(order))
    for step in range(steps):
        t = 1000.0 * (1 - step / steps) ** 1.5  # uneven
        if step <= order or step % interval == 0:
            history.store((torch.tensor([[series(t)]], dtype=torch.float64),), t)
        else:
            found = history.predict(t)[0]
            assert found is not None
            yield abs(float(found) - series(t))


@pytest.mark.parametrize("interval", [2, 3])
def test_a_long_run_of_order_two_forecasts_stays_exact_on_a_quadratic(interval: int) -> None:
    """The same formula on a history that holds its own forecasts has errors that do not decay, and grow at order 3."""
    errors = list(interval_run(2, interval, polynomial(2), 200))
    assert len(errors) > 90
    assert max(errors) < 1e-6


def test_a_long_run_of_forecasts_stays_bounded_where_forecasting_from_forecasts_does_not() -> None:
    def series(t: float) -> float:
        return math.cos(t / 40)

    ours = max(interval_run(2, 2, series, 100))
    recent, theirs = [series(0), series(10), series(20)], []
    for step in range(3, 103):  # even steps of 10, AB-3 on whatever came before
        value = series(10 * step) if step % 2 == 0 else 3 * recent[-1] - 3 * recent[-2] + recent[-3]
        theirs.append(abs(value - series(10 * step)))
        recent.append(value)
    assert ours < 1.0
    assert max(theirs) > 1e6
