"""Bounds on what a gate may decide, and the bookkeeping that keeps to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flowaccel.caching.decisions import Decider, all_compute
from flowaccel.caching.gates import Gate, Interval, Mask, Step
from flowaccel.caching.guard import Guard

STEPS = 12


class Scores(Gate):
    """Whatever scores it is given, one list per unit."""

    name = "easy"
    signal = "input"

    def __init__(self, *units: list[float]) -> None:
        object.__setattr__(self, "units", units)

    def score(self, state: Any, signal: Any, step: Step) -> Any:
        return torch.tensor([unit[step.index] for unit in self.units]), state  # type: ignore[attr-defined]

    def update(self, state: Any, signal: Any, feedback: Any, computed: Any, step: Step) -> Any:
        return {"seen": computed.float()}


def decide(gate: Gate, guard: Guard, units: int = 1, finite: dict[int, list[bool]] | None = None) -> list[Any]:
    decider, found = Decider(gate=gate, guard=guard), []
    for index in range(STEPS):
        step = Step(index=index, count=STEPS, time=1000.0 - index)
        decision = decider.decide(units, None, step)
        decider.update(None, None, decision, step)
        if finite is not None:
            decider.finite = torch.tensor(finite.get(index, [True] * units))
        found.append(decision)
    return found


def shown(found: list[Any], unit: int = 0) -> str:
    return "".join("cr"[not decision.compute[unit]] for decision in found)


NEVER = [0.0] * STEPS


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        (Guard(), "crrrrrrrrrrc"),
        (Guard(warmup=0, last=0), "crrrrrrrrrrr"),
        (Guard(warmup=3, last=2), "cccrrrrrrrcc"),
        (Guard(warmup=0.25, last=0), "cccrrrrrrrrr"),
        (Guard(warmup=0.26, last=0), "ccccrrrrrrrr"),
        (Guard(warmup=0.26, last=0, rounding="nearest"), "cccrrrrrrrrr"),
        (Guard(warmup=0.3, last=0, rounding="nearest"), "ccccrrrrrrrr"),
        (Guard(warmup=1, last=0, max_run=3), "crrrcrrrcrrr"),
        (Guard(warmup=2, last=1, max_run=1), "ccrcrcrcrcrc"),
        (Guard(warmup=100), "c" * 12),
        (Guard(warmup=1, last=12), "c" * 12),
    ],
)
def test_bounds_on_a_gate_that_never_computes(guard: Guard, expected: str) -> None:
    assert shown(decide(Scores(NEVER), guard)) == expected


def test_a_part_of_the_run_is_rounded_up() -> None:
    assert sum(Guard(warmup=0.2, last=0).forces(step, 28) for step in range(28)) == 6
    assert sum(Guard(warmup=0.2, last=0).forces(step, 10) for step in range(10)) == 2
    assert [Guard(warmup=0.0, last=0).forces(step, 3) for step in range(3)] == [True, False, False]
    assert Guard().forces(0, 1)


def test_the_longest_run_is_counted_per_unit() -> None:
    restless = [0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    found = decide(Scores(NEVER, restless), Guard(last=0, max_run=3), units=2)
    assert shown(found, 0) == "crrrcrrrcrrr"
    assert shown(found, 1) == shown(decide(Scores(restless), Guard(last=0, max_run=3)))


def test_a_budget_is_what_scores_of_reused_steps_add_up_to_per_unit() -> None:
    found = decide(Scores([0.3] * STEPS, [0.6] * STEPS), Guard(last=0, budget=1.3), units=2)
    assert shown(found, 0) == "crrrrccccccc"
    assert shown(found, 1) == "crrccccccccc"
    low_again = [0.6, 0.6, 0.6, 0.6, 0.05, 0.6, 0.05, *[0.6] * 5]
    assert shown(decide(Scores(low_again), Guard(last=0, budget=1.32))) == "crrcrcrccccc"


def test_scores_of_one_and_scores_that_are_no_numbers_compute() -> None:
    scores = [0.0, 0.999, 1.0, math.nan, 0.5, math.inf, 0.0, *[0.0] * 5]
    found = decide(Scores(scores), Guard(last=0))
    assert shown(found) == "crccrcrrrrrr"
    assert [decision.near_ties for decision in found] == [0, 1, 1] + [0] * 9
    assert not any(decision.not_finite for decision in found), "no network output was looked at"


def test_what_was_computed_and_is_not_finite_computes_again_for_that_unit() -> None:
    found = decide(Scores(NEVER, NEVER), Guard(last=0), units=2, finite={4: [True, False], 5: [True, False]})
    assert (shown(found, 0), shown(found, 1)) == ("crrrrrrrrrrr", "crrrrccrrrrr")
    assert [decision.not_finite for decision in found] == [(1,) if step in (5, 6) else () for step in range(STEPS)]


def test_schedules_compute_again_for_a_unit_that_is_not_finite_and_keep_their_rhythm() -> None:
    found = decide(Interval(3), Guard(last=0), units=2, finite={3: [True, False], 4: [True, False]})
    assert [decision.compute for decision in found[3:7]] == [(True,), (False, True), (False, True), (True,)]
    assert shown(found) == "crrcrrcrrcrr"


def test_what_was_not_finite_in_the_warmup_is_found_after_it() -> None:
    decider = Decider(gate=Scores(NEVER), guard=Guard(warmup=3))
    for index in range(5):
        step = Step(index=index, count=STEPS, time=0.0)
        decision = decider.decide(1, None, step)
        decider.update(None, None, decision, step)
        assert decision.compute == (index < 4,)
        if decision.compute[0]:
            seen = torch.tensor([index != 1])
            decider.finite = seen if decider.finite is None else decider.finite & seen


def test_the_device_is_read_once_per_decision_and_not_for_schedules_alone() -> None:
    assert [decision.host_reads for decision in decide(Scores(NEVER), Guard())] == [0, *[1] * 10, 0]
    assert [decision.host_reads for decision in decide(Scores(NEVER), Guard(), finite={})] == [0, *[1] * 10, 0]
    assert sum(decision.host_reads for decision in decide(Interval(2), Guard())) == 0


def test_schedules_have_one_unit_for_all() -> None:
    assert all(len(decision.compute) == 1 for decision in decide(Interval(2), Guard(), units=5))
    assert all_compute(3).compute == (True, True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "down"}, "rounding must be 'up' or 'nearest', got 'down'"),
        ({"warmup": -1}, "warmup must be"),
        ({"warmup": math.inf}, "warmup must be"),
        ({"warmup": math.nan}, "warmup must be"),
        ({"warmup": 1.5}, "warmup must be a whole number of steps"),
        ({"warmup": True}, "warmup must be"),
        ({"last": -1}, "last must be a whole number"),
        ({"last": 0.5}, "last must be a whole number"),
        ({"max_run": 0}, "max_run must be a whole number of at least 1"),
        ({"max_run": 2.0}, "max_run must be a whole number"),
        ({"budget": 0}, "budget must be above 0"),
        ({"budget": math.nan}, "budget must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**options)


def test_schedules_have_no_near_ties() -> None:
    for gate in (Interval(2), Interval(3, phase=1), Mask("fast"), Mask((1, 0) * (STEPS // 2))):
        found = decide(gate, Guard(last=0))
        assert 0 < sum(decision.compute[0] for decision in found) < STEPS
        assert sum(decision.near_ties for decision in found) == 0
