"""Base class of gates: pure functions that decide for each unit whether to compute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowaccel.checks import is_number

State = dict[str, Tensor]
"""State of a gate, each tensor with a leading units axis; empty before the first step."""

Signal = Literal["none", "input", "condition", "first_block", "modulated_input", "time_embedding", "time_projection"]
"""Signal that a gate reads before it decides: nothing; the network's input; the embedding that modulates the blocks;
the residual of its first blocks; the input of the first block's attention, which is normalised and modulated by the
timestep; the embedding of the time alone; the projection of it to the shifts and scales of the blocks (see
`hooks.Family.time_embedding`)."""
TIME_SIGNALS = ("time_embedding", "time_projection")
INSIDE = ("condition", "first_block", "modulated_input", *TIME_SIGNALS)
"""Signals that are only available within the network."""

Feedback = Literal["none", "output", "feature", "middle_block"]
"""Feedback that a gate gets from a computed step: nothing; the network's output; what the scope caches; the residual
of the middle block."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Position in the run at which a decision is taken."""

    index: int
    """Index of the evaluation, 0 .. `count` - 1."""
    count: int
    time: float
    """The scheduler's timestep."""
    sigma: float = math.nan
    """Noise level, see `flowaccel.hooks.Run.sigmas`."""
    grid: tuple[int, ...] | None = None
    """Height and width of the latents, for videos with the frames before them; for gates that ask for it."""


@dataclass(frozen=True)
class Gate(ABC):
    """Abstract base class of gates. A subclass is a frozen dataclass with a `name`, entered in `GATES`.

    A unit is an image, a row or a whole batch. At every step `score` is called, and then `update`. A unit is computed
    if its score is not below 1, which includes NaN; the score is the gate's signal divided by its threshold, and at
    least 0 unless the gate states otherwise.
    """

    name: ClassVar[str]
    """Name in recipes."""
    signal: ClassVar[Signal] = "none"
    feedback: ClassVar[Feedback] = "none"
    needs_grid: ClassVar[bool] = False
    """Whether it reads `Step.grid`; on some models the host waits for that."""

    @property
    def static(self) -> bool:
        """Whether the decisions do not depend on the images, so that there is a single unit."""
        return self.signal == "none" and self.feedback == "none"

    @property
    def probe(self) -> int:
        """Number of blocks that run before the gate decides."""
        return 0

    @abstractmethod
    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the score of every unit.

        Args:
            state: the state that `update` returned last, not empty.
            signal: (units, ...) signal of the gate; None for the signal "none".
            step: the position in the run.

        Returns:
            (units,) float scores, and the state that goes to `update`.
        """

    @abstractmethod
    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Return the state after a step.

        Args:
            state: from `score`, or empty at the first step.
            signal: as in `score`.
            feedback: (units, ...) feedback of the step, undefined for units that were not computed; None if no unit
                was computed.
            computed: (units,) bool, on the CPU.
            step: the position in the run.

        Returns:
            The state for the next step.
        """


def check_threshold(threshold: float) -> None:
    """Raise a ValueError unless `threshold` is a number of at least 0."""
    if not is_number(threshold, 0):
        raise ValueError(f"threshold must be a finite number of at least 0 (0 computes every step), got {threshold!r}")


def mean_abs(tensor: Tensor) -> Tensor:
    """Return the mean absolute value per unit, (units, ...) -> (units,), in float32, or in float64 for float64."""
    flat = tensor.flatten(1)
    return torch.linalg.vector_norm(flat, ord=1, dim=1, dtype=_precise(flat)) / flat.shape[1]


def mean_square(tensor: Tensor) -> Tensor:
    """Return the mean square per unit, (units, ...) -> (units,), in the dtype of `mean_abs`."""
    flat = tensor.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=_precise(flat)).square() / flat.shape[1]


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Return the relative change mean|new - old| / mean|old| per unit, (units, ...) twice -> (units,)."""
    return mean_abs(new - old) / mean_abs(old)


def where(units: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Return `new` at the units that are true, `old` (None: `new`) at the others; `units` is on the CPU."""
    if old is None or bool(units.all()):
        return new
    if not bool(units.any()):
        return old
    return torch.where(units.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, old)
