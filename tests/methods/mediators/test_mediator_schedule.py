"""When the number of mediators grows: fixed times, scripted distances and velocities, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel import Mediators, MediatorSchedule
from flowaccel.methods.mediators.schedule import Switching

LEVELS = ((0.5, 4), (0.25, 16))


def moved(*distances: Sequence[float], **options: Any) -> list[tuple[int, ...]]:
    """The numbers in use at steps that move images by scripted distances, and after them."""
    settings: dict[str, Any] = {"start": 1, "distance": LEVELS, "first": 2, **options}
    switching = Switching(MediatorSchedule(**settings))
    found, sample = [switching.counts], torch.zeros(len(distances[0]), 1, 2, 2)
    for step in distances:
        result = sample + torch.tensor(step).view(-1, 1, 1, 1)
        switching.observe(torch.full_like(sample, float("nan")), sample, result)
        found.append(switching.counts)
    return found


def of_one(*distances: float, **options: Any) -> list[int]:
    return [counts[0] for counts in moved(*[[distance] for distance in distances], **options)]


def turned(*velocities: float, **options: Any) -> list[int]:
    """The numbers in use at steps with scripted velocities, and after them."""
    settings: dict[str, Any] = {"start": 1, "change": ((0.25, 4), (0.5, 16)), **options}
    switching = Switching(MediatorSchedule(**settings))
    found, sample = [switching.counts[0]], torch.full((1, 1, 2, 2), float("nan"))
    for velocity in velocities:
        switching.observe(torch.full_like(sample, velocity), sample, sample)
        found.append(switching.counts[0])
    return found


def test_fixed_times() -> None:
    schedule = MediatorSchedule(fixed=((0, 4), (0.4, 64), (0.8, 16)))
    assert schedule.counts == (4, 64, 16)
    assert [schedule.at(time) for time in (0.0, 0.39, 0.4, 0.79, 0.8, 1.0)] == [4, 4, 64, 64, 16, 16]
    assert schedule.at(1 - float(torch.tensor(600.00002)) / 1000) == 64, "float32 times are no closer"


def test_distance_compares_with_the_first_steps_but_for_the_very_first() -> None:
    # 100 is the very first; the average of 1 and 3 is 2
    assert of_one(100.0, 1.0, 3.0, 1.01, 0.99, 0.9, 0.51, 0.49) == [1, 1, 1, 1, 1, 4, 4, 4, 16]
    assert of_one(100.0, 1.0, 0.1, 0.3, first=1) == [1, 1, 1, 16, 16]


def test_two_levels_in_one_step_and_no_way_back() -> None:
    assert of_one(2.0, 2.0, 2.0, 0.1, 9.0, 9.0) == [1, 1, 1, 1, 16, 16, 16]
    assert of_one(2.0, 2.0, 2.0, 0.9, 9.0, 0.1) == [1, 1, 1, 1, 4, 4, 16]


def test_what_is_not_a_number_never_switches() -> None:
    nan = float("nan")
    assert of_one(2.0, 2.0, 2.0, nan, 0.9) == [1, 1, 1, 1, 1, 4]
    assert set(of_one(2.0, nan, 2.0, 0.1, 0.1)) == {1}
    assert turned(1.0, nan, 1.0, 1.0, 2.0) == [1, 1, 1, 1, 1, 4]


def test_metrics() -> None:
    """0.6 of the distance is 0.36 of its square."""
    distances = (2.0, 2.0, 2.0, 1.2)
    assert of_one(*distances)[-1] == 1
    assert of_one(*distances, metric="mse")[-1] == 4


def test_images_decide_alone_or_together() -> None:
    steps = [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [0.9, 1.9], [1.9, 0.4]]
    assert moved(*steps) == [(1,), *[(1, 1)] * 3, (4, 1), (4, 16)]
    assert moved(*steps, decide="batch") == [(1,)] * 6
    assert moved(*steps, [0.9, 0.9], decide="batch")[-1] == (4,)


def test_change() -> None:
    """Divided by the newer of the two: from 4 to 5 is 0.2, from 5 to 4 is 0.25 and not over it."""
    assert turned(4.0, 5.0, 4.0, 3.0, 2.0, 2.0, 1.0) == [1, 1, 1, 1, 4, 4, 4, 16]
    assert turned(1.0, 3.0, 3.0) == [1, 1, 16, 16]


def test_nothing_is_measured_once_all_is_decided() -> None:
    switching = Switching(MediatorSchedule(start=1, distance=LEVELS, first=1))
    waits = []
    for distance in (1.0, 1.0, 0.1, 0.1):
        zeros: Tensor = torch.zeros(1, 1, 2, 2)
        waits.append(switching.observe(zeros, zeros, zeros + distance))
    assert waits == [False, False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"exactly one of \['fixed', 'distance', 'change'\].* got none"),
        ({"fixed": ((0.0, 4),), "change": ((0.1, 16),), "start": 4}, r"got \['fixed', 'change'\]"),
        ({"fixed": ((0.0, 4), (0.6, 16), (0.4, 64))}, r"fixed is out of order.* must rise .*\[0.0, 0.6, 0.4\]"),
        ({"fixed": ((0.0, 4), (0.4, 16), (0.4, 64))}, "every time once"),
        ({"fixed": ((0.1, 4), (0.4, 16))}, "must begin at time 0.0"),
        ({"fixed": ((0.0, 4), (1.0, 16))}, "stay below 1"),
        ({"fixed": ((0.0, 5),)}, "fixed: the number of mediators must be a square.* got 5"),
        ({"fixed": ((0.0, True),)}, "must be a square.* got True"),
        ({"fixed": (0.0, 4)}, "pairs of a number and a number of mediators, got 0.0"),
        ({"fixed": ()}, "must hold pairs such as"),
        ({"fixed": "0:4"}, "must hold pairs such as .* got '0:4'"),
        ({"fixed": ((0.0, 4),), "start": 4}, "start is for distance and change, got 4 with fixed"),
        ({"fixed": ((0.0, 4),), "metric": "mse"}, "metric is for distance, got 'mse' with fixed"),
        ({"fixed": ((0.0, 4),), "decide": "batch"}, "decide is for distance and change"),
        ({"change": ((0.1, 16),), "start": 4, "first": 5}, "first is for distance, got 5 with change"),
        ({"distance": ((0.7, 4), (0.8, 16)), "start": 1}, r"distance is out of order.* must fall .*\[0.7, 0.8\]"),
        ({"change": ((0.2, 4), (0.1, 16)), "start": 1}, "change is out of order.* must rise"),
        ({"distance": ((0.8, 4),)}, "start: the number of mediators must be a square.* got None"),
        ({"distance": ((0.8, 4),), "start": 16}, r"must grow from start on, got \[16, 4\]"),
        ({"distance": ((0.8, 4), (0.7, 4)), "start": 1}, r"must grow from start on, got \[1, 4, 4\]"),
        ({"distance": ((float("nan"), 4),), "start": 1}, "positive numbers, got nan"),
        ({"distance": ((0, 4),), "start": 1}, "positive numbers, got 0 for 4"),
        ({"distance": LEVELS, "start": 1, "first": 0}, "first must be a whole number of at least 1, got 0"),
        ({"distance": LEVELS, "start": 1, "metric": "rmse"}, r"metric must be one of \['mae', 'mse'\]"),
        ({"distance": LEVELS, "start": 1, "decide": "row"}, r"decide must be one of \['image', 'batch'\]"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediatorSchedule(**options)


@pytest.mark.parametrize(
    "schedule",
    [
        MediatorSchedule(fixed=((0.0, 4), (0.4, 16))),
        MediatorSchedule(distance=LEVELS, start=1, first=5, metric="mse", decide="batch"),
        MediatorSchedule(change=((0.1, 16),), start=4),
    ],
    ids=["fixed", "distance", "change"],
)
def test_as_json(schedule: MediatorSchedule) -> None:
    data = json.loads(json.dumps(Mediators(schedule=schedule).to_dict()))["schedule"]
    assert data.pop("name") == "mediator_schedule"
    assert MediatorSchedule(**data) == schedule
