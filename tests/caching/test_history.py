"""What a cache remembers of the rows of a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowaccel.caching.history import History, PartialHistory
from flowaccel.caching.predictors import PREDICTORS, AdamsBashforth, Hold, Newton, Predictor

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
