"""Bounds on the decisions of a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowaccel.checks import check_whole, is_number, is_whole


@dataclass(frozen=True)
class Guard:
    """Steps that are computed regardless of the gate.

    Args:
        warmup: the first steps; a number below 1 is a part of the run (0.2 of 28 steps are the first 6). The very first
            is always computed.
        last: the final steps.
        max_run: the most steps in a row that an image is not computed; None for no bound.
        budget: the most that an image's scores at reused steps may add up to in a run, in thresholds of the gate; None
            for no bound.
        rounding: what a part of the run is rounded to where it is no whole number of steps: `up`, or `nearest`, as
            MagCache does.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "guard"

    warmup: int | float = 1
    last: int = 1
    max_run: int | None = None
    budget: float | None = None
    rounding: Literal["up", "nearest"] = "up"

    def __post_init__(self) -> None:
        if not is_number(self.warmup, 0):
            raise ValueError(f"warmup must be a number of steps, or a part of the run below 1, got {self.warmup!r}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be a whole number of steps where it is not below 1, got {self.warmup!r}")
        check_whole(self, last=0)
        if self.max_run is not None and not is_whole(self.max_run, 1):
            raise ValueError(f"max_run must be a whole number of at least 1, or None, got {self.max_run!r}")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget must be above 0, or None, got {self.budget!r}")
        if self.rounding not in ("up", "nearest"):
            raise ValueError(f"rounding must be 'up' or 'nearest', got {self.rounding!r}")

    def forces(self, step: int, count: int) -> bool:
        """Return whether step `step` of `count` is computed for every image."""
        warmup = self.warmup
        if warmup < 1:
            warmup = math.ceil(warmup * count) if self.rounding == "up" else math.floor(warmup * count + 0.5)
        return step < max(1, warmup) or step >= count - self.last


GUARDS: dict[str, type[Guard]] = {Guard.name: Guard}
