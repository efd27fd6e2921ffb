"""What a cache remembers of the rows of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from families import CASES
from flowaccel import FeatureCache, accelerated
from flowaccel.caching.decisions import Unit
from flowaccel.caching.gates import Easy, Interval, Step
from flowaccel.caching.guard import Guard
from flowaccel.caching.history import History, PartialHistory
from flowaccel.caching.predictors import PREDICTORS, AdamsBashforth, Hold, Newton, Predictor
from flowaccel.caching.scopes import Output

WIDTH = 3


def line(t: float, rows: int = 2) -> Tensor:
    """Row r is a line with slope r + 1."""
    return torch.tensor([[(r + 1) * t / 100 + place for place in range(WIDTH)] for r in range(rows)])


def filled(predictor: Predictor, times: list[float], rows: int = 2) -> History:
    history = History(predictor)
    for t in times:
        history.store((line(t, rows),), t)
    return history


def only(value: tuple[Tensor | None, ...]) -> Tensor:
    assert value[0] is not None and len(value) == 1
    return value[0]


def test_a_new_history_is_empty_and_needs_all_rows_first() -> None:
    history = History(Newton(1))
    assert history.empty and history.bytes == 0
    with pytest.raises(ValueError, match="first values must be those of all rows"):
        history.store((line(9.0),), 9.0, torch.tensor([0]))
    history.store((line(9.0),), 9.0)
    assert not history.empty
    assert torch.equal(only(history.newest), line(9.0))


def test_one_value_is_held_whatever_the_order() -> None:
    value = line(900.0)
    for predictor in (Hold(), Newton(2), AdamsBashforth(3)):
        history = History(predictor)
        history.store((value,), 900.0)
        assert only(history.predict(100.0)) is value, "not even copied"


def test_lines_are_continued() -> None:
    torch.testing.assert_close(only(filled(Newton(1), [900, 850]).predict(700)), line(700), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_it_holds_at_most_as_many_values_as_the_predictor_uses(order: int) -> None:
    one = line(0.0).numel() * 4
    for count in range(1, 8):
        assert filled(Newton(order), [900.0 - 10 * i for i in range(count)]).bytes == one * min(count, order + 1)
    history = filled(Newton(order), [900, 800, 700, 600, 500, 400])
    for t in (300, 200, 150):
        history.store((line(t)[:1],), t, torch.tensor([0]))
        assert history.bytes == one * (order + 1)


def test_a_second_value_at_the_same_time_takes_the_place_of_the_first() -> None:
    """Samplers of higher order ask twice; two values at one time have no slope."""
    history = filled(Newton(1), [900, 850])
    history.store((line(850) + 1000,), 850)
    history.store((line(850),), 850)
    torch.testing.assert_close(only(history.predict(700)), line(700), atol=1e-5, rtol=0)
    history.store((line(850)[1:] + 7,), 850, torch.tensor([1]))
    torch.testing.assert_close(only(history.predict(850)), line(850) + torch.tensor([[0.0], [7.0]]))


@pytest.mark.parametrize("name", PREDICTORS)
def test_rows_computed_at_different_times_are_as_alone(name: str) -> None:
    predictor = PREDICTORS[name]() if name == "hold" else PREDICTORS[name](order=2)  # type: ignore[call-arg]
    computed = {0: [900, 860, 800, 700, 640], 1: [900, 700], 2: [900, 860, 650, 640]}
    together, alone = History(predictor), {row: History(predictor) for row in computed}
    for t in (900, 860, 800, 700, 650, 640):
        rows = [row for row, times in computed.items() if t in times]
        value = (torch.sin(line(t, 3) / 3), line(t, 3)[:, None] ** 2)
        chosen = None if len(rows) == 3 else torch.tensor(rows)
        together.store(value if chosen is None else (value[0][chosen], value[1][chosen]), t, chosen)
        for row in rows:
            alone[row].store((value[0][row : row + 1], value[1][row : row + 1]), t)
        for now in (630.0, 500.0):
            found = together.predict(now)
            for row, history in alone.items():
                for mine, own in zip(found, history.predict(now), strict=True):
                    assert mine is not None and own is not None
                    torch.testing.assert_close(mine[row : row + 1], own, atol=1e-4, rtol=1e-5)


def test_what_goes_in_and_out_is_never_written_to() -> None:
    first, second = line(900.0), line(850.0)
    history = History(Newton(1))
    history.store((first,), 900.0)
    held = only(history.predict(800.0))
    history.store((second,), 850.0)
    forecast = only(history.predict(800.0))
    copies = [tensor.clone() for tensor in (first, second, held, forecast)]
    history.store((line(800.0)[:1],), 800.0, torch.tensor([0]))
    history.store((line(800.0)[1:] * 5,), 800.0, torch.tensor([1]))
    history.store((line(790.0)[:1] * 3,), 800.0, torch.tensor([0]))
    history.predict(600.0)
    for tensor, copy in zip((first, second, held, forecast), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_what_has_nothing_to_cache_stays_none() -> None:
    """SD3's last block returns no text."""
    history = History(Newton(1))
    for t in (900.0, 850.0):
        history.store((line(t), None), t)
    history.store((line(800.0)[:1], None), 800.0, torch.tensor([0]))
    image, text = history.predict(700.0)
    assert text is None and image is not None
    torch.testing.assert_close(image, line(700), atol=1e-5, rtol=0)


def test_half_precision_stays_half_precision() -> None:
    history = History(Newton(1))
    for t in (900.0, 850.0):
        history.store((line(t).bfloat16(),), t)
    assert only(history.predict(800.0)).dtype == torch.bfloat16
    history.store((line(800.0)[:1],), 800.0, torch.tensor([0]))
    assert only(history.predict(700.0)).dtype == torch.bfloat16


def test_some_rows_of_a_history_go_by_their_own_numbers() -> None:
    history = History(Newton(1))
    part = PartialHistory(history, [0, 2], 3)
    assert part.empty and not part.covers(0)
    for t in (900.0, 800.0):
        part.store((line(t, 3)[[0, 2]],), t)
    assert [history.covers(row) for row in range(3)] == [True, False, True]
    assert part.covers(1) and not PartialHistory(history, [1], 3).covers(0)
    torch.testing.assert_close(only(part.predict(700.0)), line(700.0, 3)[[0, 2]])
    assert torch.equal(only(part.newest), line(800.0, 3)[[0, 2]])
    history.store((line(700.0, 3),), 700.0)
    part.store((line(600.0, 3)[[2]],), 600.0, torch.tensor([1]))
    torch.testing.assert_close(only(history.predict(500.0))[2], line(500.0, 3)[2])
    assert torch.equal(only(history.predict(500.0))[1], line(700.0, 3)[1]), "which has one value so far"


def test_rows_without_a_value_are_predicted_as_zero() -> None:
    history = filled(Hold(), [900.0])
    history.forget(torch.tensor([0, 1]))
    assert torch.equal(only(history.predict(800.0)), torch.zeros(2, WIDTH))


@dataclass(frozen=True)
class AlongTheSignal(Predictor):
    """A line through the two last values, over the mean of the gate's signal in the place of time."""

    name: ClassVar[str] = "along_the_signal"
    needs_signal: ClassVar[bool] = True
    anchors: ClassVar[int] = 2

    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Weights of a line; of one value, to hold it."""
        assert signals is not None and signals.shape[:2] == (len(times), 1 + times.shape[1])
        if times.shape[1] == 1:
            return torch.ones_like(times)
        at = signals.double().flatten(2).mean(dim=2)
        ahead = (at[:, 0] - at[:, 1]) / (at[:, 1] - at[:, 2])
        return torch.stack([1 + ahead, -ahead], dim=1)


def signal_of(places: list[float]) -> Tensor:
    """What a gate might read: (rows, 2, 2) with the given means."""
    return torch.tensor(places)[:, None, None] + torch.tensor([[-1.0, 1.0], [0.5, -0.5]])


def test_a_predictor_may_use_what_the_gate_read() -> None:
    """Values that are lines in the signal, not in time, are continued, each row at its own pace."""
    history = History(AlongTheSignal())
    for time, places in ((900.0, [10.0, 20.0]), (800.0, [11.0, 28.0])):
        value = torch.cat([line(places[row])[row : row + 1] for row in range(2)])
        history.store((value,), time, signal=signal_of(places))
    assert torch.equal(only(history.newest), value), "what was stored for the predictor is no part of the value"
    expected = torch.cat([line(14.0)[:1], line(21.0)[1:]])
    torch.testing.assert_close(only(history.predict(700.0, signal_of([14.0, 21.0]))), expected, atol=1e-5, rtol=0)


def test_rows_of_other_times_have_weights_of_their_own() -> None:
    history = History(AlongTheSignal())
    history.store((line(10.0),), 900.0, signal=signal_of([10.0, 10.0]))
    history.store((line(12.0)[1:],), 800.0, torch.tensor([1]), signal_of([10.0, 12.0])[1:])
    expected = torch.cat([line(10.0)[:1], line(13.0)[1:]])
    torch.testing.assert_close(only(history.predict(700.0, signal_of([5.0, 13.0]))), expected, atol=1e-5, rtol=0)


def test_some_rows_of_a_history_take_signals_of_their_own() -> None:
    history = History(AlongTheSignal())
    part = PartialHistory(history, [1], 2)
    for time, place in ((900.0, 10.0), (800.0, 12.0)):
        part.store((line(place)[1:],), time, signal=signal_of([place]))
    torch.testing.assert_close(only(part.predict(700.0, signal_of([13.0]))), line(13.0)[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("unit", ["image", "row", "batch"])
@pytest.mark.parametrize("name", ["sd3", "wan21"])
def test_in_a_run_it_gets_the_signal_of_its_image(name: str, unit: Unit) -> None:
    """What the gate read of an image goes to its rows of both branches, whether they come in one call or in two."""
    case, read, got = CASES[name], [], []

    class Watched(AlongTheSignal):
        def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
            assert signals is not None
            got.append(signals[:, 0])
            return super().weights(times, now, signals)

    class Reading(Easy):
        def score(self, state: Any, signal: Tensor | None, step: Step) -> tuple[Tensor, Any]:
            read.append(signal)
            score, state = super().score(state, signal, step)
            return torch.zeros_like(score), state

    cache = FeatureCache(Reading(), Output(), Watched(), Guard(warmup=2, last=0, max_run=1), unit)
    with accelerated(case.make(), cache) as pipe:
        case(pipe, batch=2, steps=6)
    assert sum(len(signals) for signals in got) == 2 * 4, "two reused steps, two images, two branches"
    assert all(any(torch.equal(row, one) for signal in read for one in signal) for signals in got for row in signals)


def test_a_predictor_that_needs_a_signal_is_refused_beside_a_gate_without_one() -> None:
    with pytest.raises(ValueError, match="'along_the_signal' reads the gate's signal, and gate 'interval' has none"):
        FeatureCache(Interval(2), predictor=AlongTheSignal())
