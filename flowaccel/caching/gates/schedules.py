"""Gates that follow a schedule, the same for all images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.gates.base import Gate, State, Step
from flowaccel.checks import is_whole

# Step masks at 28 steps as (steps computed, steps reused) in turn (cache-dit's step computation masks).
_REFERENCE_STEPS = 28
MASKS = {
    "slow": ((8, 1), (3, 2), (3, 2), (2, 2), (1, 3), (1, 0)),
    "medium": ((6, 1), (2, 3), (2, 3), (2, 3), (2, 3), (1, 0)),
    "fast": ((6, 1), (1, 3), (1, 4), (1, 5), (1, 4), (1, 0)),
    "ultra": ((4, 2), (1, 5), (1, 6), (1, 7), (1, 0)),
}
"""Named masks, from most to fewest steps computed."""


class _Schedule(Gate):
    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        return torch.tensor([2.0 if self.computes(state, step) else 0.0]), state  # no score is a near-tie

    @abstractmethod
    def computes(self, state: State, step: Step) -> bool:
        """Return whether the step is computed."""

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        return {"last": torch.tensor([step.index])} if bool(computed) or not state else state


@dataclass(frozen=True)
class Interval(_Schedule):
    """Gate that computes every `interval`-th step.

    Args:
        interval: at least 1; 1 computes every step.
        phase: compute the steps whose index minus `phase` is a multiple of `interval`; None counts from the last step
            that was computed.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "interval"

    interval: int = 2
    phase: int | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.interval, 1):
            raise ValueError(
                f"interval must be a whole number of at least 1 (1 computes every step), got {self.interval!r}"
            )
        if self.phase is not None and not is_whole(self.phase):
            raise ValueError(f"phase must be a whole number or None, got {self.phase!r}")

    def computes(self, state: State, step: Step) -> bool:
        """Return whether the step is a multiple of the interval."""
        if self.phase is not None:
            return (step.index - self.phase) % self.interval == 0
        return step.index - int(state["last"]) >= self.interval


@dataclass(frozen=True)
class Mask(_Schedule):
    """Gate that computes the steps of a mask.

    Args:
        mask: one entry per step of the run, 1 or True computes; or the name of a mask, `slow`, `medium`, `fast` or
            `ultra`, which is stretched to the number of steps: as large a part of the steps is computed, as early.

    Raises:
        ValueError: an unknown name, an entry that is neither 0 nor 1, or a mask that computes nothing. In a run of
            another number of steps a mask of the wrong length is an error too.
    """

    name: ClassVar[str] = "mask"

    mask: str | Sequence[int] = "medium"

    def __post_init__(self) -> None:
        if isinstance(self.mask, str):
            if self.mask not in MASKS:
                raise ValueError(f"mask must be one of {', '.join(MASKS)}, or a list of 0 and 1, got {self.mask!r}")
            return
        if any(entry not in (0, 1) for entry in self.mask) or 1 not in self.mask:
            raise ValueError(f"mask must hold 0 and 1, and 1 at least once, got {self.mask!r}")
        object.__setattr__(self, "mask", tuple(int(entry) for entry in self.mask))

    def computes(self, state: State, step: Step) -> bool:
        """Return whether the step is in the mask."""
        return bool(self.at(step.count)[step.index])

    def at(self, steps: int) -> tuple[int, ...]:
        """Return the mask of a run.

        Raises:
            ValueError: it is a list for another number of steps.
        """
        if not isinstance(self.mask, str):
            if len(self.mask) != steps:
                raise ValueError(
                    f"the mask has {len(self.mask)} entries and the run {steps} steps; give one entry per step, or a "
                    f"name ({', '.join(MASKS)})"
                )
            return tuple(self.mask)
        reference = [entry for one, zero in MASKS[self.mask] for entry in (1,) * one + (0,) * zero]
        return _stretched(reference, steps)


def _stretched(reference: Sequence[int], steps: int) -> tuple[int, ...]:
    """Stretch a mask to `steps` steps, with the same proportion computed, and as early."""
    cumulative = [0, *torch.tensor(reference).cumsum(0).tolist()]
    stretched, done = [], 0
    for step in range(steps):
        place = (step + 1) * len(reference) / steps
        whole = min(int(place), len(reference) - 1)
        due = cumulative[whole] + (place - whole) * reference[whole]
        compute = step == 0 or due * steps / len(reference) - done >= 0.5
        stretched.append(int(compute))
        done += compute
    return tuple(stretched)
