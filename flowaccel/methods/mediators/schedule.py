"""Number of mediators over the steps of a run (Attention Mediators, arXiv 2408.05710)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from flowaccel.caching.gates.base import mean_abs, mean_square, relative_change
from flowaccel.checks import check_whole, is_number, is_whole

Levels = tuple[tuple[float, int], ...]
METRICS, DECIDES = ("mae", "mse"), ("image", "batch")
_ROUNDING = 1e-6
"""Rounding error of schedulers that keep times in float32."""


class _Rule(NamedTuple):
    rising: bool
    """Whether thresholds rise from one level to the next."""
    options: tuple[str, ...]
    """Fields that belong to it."""


_RULES = {
    "fixed": _Rule(True, ()),
    "distance": _Rule(False, ("start", "first", "metric", "decide")),
    "change": _Rule(True, ("start", "decide")),
}


@dataclass(frozen=True, kw_only=True)
class MediatorSchedule:
    """Growing number of mediators: early steps, whose images are noise, can do with fewer than late ones.

    One of `fixed`, `distance` and `change` says when it grows; after `distance` and `change` it never shrinks again in
    a run.

    Args:
        fixed: pairs of a time and a number, such as ((0.0, 4), (0.4, 16)): 4 mediators from the start and 16 from time
            0.4 on. Time runs from 0, noise, to 1, the image: 1 - timestep / num_train_timesteps. It needs no look at
            the images, and is what `distance` comes to with a stochastic sampler, t = 1 - ratio^2.
        distance: the paper's rule, for stochastic samplers: pairs of a ratio and a number, such as ((0.85, 16),
            (0.7, 64)). The number becomes 16 after a step that moved the image by less than 0.85 times what the steps
            in the beginning did on average. Ratios do not rise; several levels may be passed in one step. Every
            evaluation counts as a step, so that samplers with several of them (Heun) are not what it was made for.
        change: a rule for deterministic samplers too, where the images' steps tell next to nothing: pairs of a
            threshold and a number, such as ((0.1, 16),). The number becomes 16 after a step at which the velocity was
            more than 0.1 from that of the step before, mean(abs(v - before)) / mean(abs(v)), with guidance. It
            grows along a run, because velocities hardly change while the image is noise, and most where its details
            come; and it grows with the length of the steps, so that a threshold belongs to a number of steps.
            Thresholds do not fall.
        start: the number of mediators in the beginning, with `distance` and `change`.
        first: how many steps `distance` compares with; the very first one is not among them.
        metric: meaning of a move: `mae`, the mean absolute difference, or `mse`, the mean squared one.
        decide: `image`, each for itself, so that it does not depend on what it is batched with; or `batch`, all in one,
            which is the paper's protocol.

    Raises:
        ValueError: none of the three or several, numbers out of range or out of order, or options of another rule.
    """

    name: ClassVar[str] = "mediator_schedule"

    fixed: Levels | None = None
    distance: Levels | None = None
    change: Levels | None = None
    start: int | None = None
    first: int = 3
    metric: Literal["mae", "mse"] = "mae"
    decide: Literal["image", "batch"] = "image"

    def __post_init__(self) -> None:
        given = [name for name in _RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {list(_RULES)} says when the number grows, got {given or 'none'}")
        rule = given[0]
        object.__setattr__(self, rule, _levels(rule, getattr(self, rule)))
        self._check_options(rule)
        if rule == "fixed":
            if self.levels[0][0] != 0 or self.levels[-1][0] >= 1:
                raise ValueError(
                    f"fixed must begin at time 0.0 and stay below 1, got times {[time for time, _ in self.levels]}"
                )
        elif list(self.counts) != sorted(set(self.counts)):
            raise ValueError(
                f"the number of mediators must grow from start on, got {list(self.counts)}; `fixed` takes any order"
            )

    def _check_options(self, rule: str) -> None:
        for option in fields(self):
            if option.name in _RULES or option.name in _RULES[rule].options:
                continue
            if getattr(self, option.name) != option.default:
                owners = [name for name in _RULES if option.name in _RULES[name].options]
                raise ValueError(
                    f"{option.name} is for {' and '.join(owners)}, got {getattr(self, option.name)!r} with {rule}"
                )
        if rule != "fixed":
            check_count("start", self.start)
        check_whole(self, first=1)
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {list(METRICS)}, got {self.metric!r}")
        if self.decide not in DECIDES:
            raise ValueError(f"decide must be one of {list(DECIDES)}, got {self.decide!r}")

    @property
    def levels(self) -> Levels:
        """The (threshold, number) pairs that were given."""
        return next(levels for levels in (self.fixed, self.distance, self.change) if levels is not None)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of mediators, in the order of their use."""
        numbers = tuple(count for _, count in self.levels)
        return numbers if self.start is None else (self.start, *numbers)

    def at(self, time: float) -> int:
        """Return the number of mediators at a time from 0 to 1, where it is `fixed`."""
        return [count for begins, count in self.levels if begins <= time + _ROUNDING or not begins][-1]


@dataclass
class Switching:
    """State of a measuring schedule in a run, for U images or for the batch as one."""

    schedule: MediatorSchedule
    places: list[int] = field(default_factory=list)
    """Number of levels that each unit passed; empty before the first step."""
    steps: int = 0
    """Number of observed steps."""
    _average: Tensor | None = None
    _velocity: Tensor | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of mediators of the next step, per unit; one for all before the first."""
        numbers = self.schedule.counts
        return tuple(numbers[place] for place in self.places) or numbers[:1]

    def observe(self, velocity: Tensor, sample: Tensor, result: Tensor) -> bool:
        """Observe a step from `sample` to `result`, (images, ...) each.

        Returns whether the host waited for the device.
        """
        velocity, sample, result = (self._units(tensor) for tensor in (velocity, sample, result))
        self.places = self.places or [0] * len(sample)
        decided = min(self.places) == len(self.schedule.levels)
        passed = None if decided else self._passed(velocity, sample, result)
        self.steps += 1
        if passed is None:
            return False
        for unit, levels in enumerate(passed.T.tolist()):
            while self.places[unit] < len(levels) and levels[self.places[unit]]:
                self.places[unit] += 1
        return True

    def _units(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[None] if self.schedule.decide == "batch" else tensor

    def _passed(self, velocity: Tensor, sample: Tensor, result: Tensor) -> Tensor | None:
        """Return (levels, U) whether each threshold is passed (NaN never is), or None if it is too early to tell."""
        if self.schedule.distance is None:
            before, self._velocity = self._velocity, velocity
            change = None if before is None else relative_change(before, velocity)
            return None if change is None else torch.stack([change > least for least, _ in self.schedule.levels])
        if self.steps == 0:
            return None
        moved = measured(sample, result, self.schedule.metric)
        if self.steps <= self.schedule.first:
            share = moved / self.schedule.first
            self._average = share if self._average is None else self._average + share
            return None
        average = self._average
        assert average is not None
        return torch.stack([moved < ratio * average for ratio, _ in self.schedule.levels])


def measured(before: Tensor, after: Tensor, metric: str) -> Tensor:
    """Return the distance (units,) of two tensors (units, ...), see `MediatorSchedule.metric`."""
    return (mean_abs if metric == "mae" else mean_square)(after - before)


def _levels(name: str, given: Any) -> Levels:
    """Convert the pairs to tuples.

    Raises:
        ValueError: no such pairs, or thresholds out of order.
    """
    found = []
    for pair in given if isinstance(given, Sequence) and not isinstance(given, str) else ():
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name} must hold pairs of a number and a number of mediators, got {pair!r}")
        threshold, count = pair
        if not is_number(threshold, 0) or (threshold == 0 and name != "fixed"):
            raise ValueError(f"{name} must hold positive numbers, got {threshold!r} for {count!r} mediators")
        check_count(name, count)
        found.append((float(threshold), count))
    if not found:
        raise ValueError(f"{name} must hold pairs such as ((0.4, 16),), got {given!r}")
    thresholds = [threshold for threshold, _ in found]
    if thresholds != sorted(thresholds, reverse=not _RULES[name].rising):
        order = "rise" if _RULES[name].rising else "fall"
        raise ValueError(f"{name} is out of order: its numbers must {order} from pair to pair, got {thresholds}")
    if name == "fixed" and len(set(thresholds)) < len(thresholds):
        raise ValueError(f"fixed must name every time once, got {thresholds}")
    return tuple(found)


def check_count(name: str, count: Any) -> None:
    """Raise a ValueError unless it is a square."""
    if not is_whole(count, 1) or math.isqrt(count) ** 2 != count:
        raise ValueError(f"{name}: the number of mediators must be a square, such as 4, 16 or 64, got {count!r}")
