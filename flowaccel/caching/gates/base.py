"""What every gate is: a pure function that says for each unit whether to compute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What a gate remembers, each tensor with a leading units axis; empty before the first step."""

Signal = Literal["none", "input", "condition", "first_block", "modulated_input", "time_embedding", "time_projection"]
"""What a gate reads before it decides: nothing; the network's input; the embedding that modulates the blocks; the
residual of its first blocks; the input of the first block's attention, which is normalised and modulated by the
timestep; the embedding of the time alone; the projection of it to the shifts and scales of the blocks (see
`hooks.Family.time_embedding`)."""
TIME_SIGNALS = ("time_embedding", "time_projection")
INSIDE = ("condition", "first_block", "modulated_input", *TIME_SIGNALS)
"""Those that are only known within the network."""

Feedback = Literal["none", "output", "feature", "middle_block"]
"""What a gate sees of a step that was computed: nothing; the network's output; what the scope caches; the residual of
the middle block."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where in the run a decision is taken."""

    index: int
    """0 .. `count` - 1."""
    count: int
    time: float
    """The scheduler's timestep."""
    sigma: float = math.nan
    """Noise level, see `flowaccel.hooks.Run.sigmas`."""
    grid: tuple[int, ...] | None = None
    """Height and width of the latents, for videos with the frames before them; for gates that ask for it."""


@dataclass(frozen=True)
class Gate(ABC):
    """Abstract base. A subclass is a frozen dataclass with a `name`, entered in `GATES`.

    A unit is an image, a row or a whole batch. Every step `score` is asked, and then `update` told what was done. A
    unit is computed where its score is not below 1, thus also where it is not a number; the score is the gate's signal
    divided by its threshold, and at least 0 unless the gate says otherwise.
    """

    name: ClassVar[str]
    """The name in recipes."""
    signal: ClassVar[Signal] = "none"
    feedback: ClassVar[Feedback] = "none"
    needs_grid: ClassVar[bool] = False
    """Whether it reads `Step.grid`; on some models the host waits for that."""

    @property
    def static(self) -> bool:
        """Whether the decisions do not depend on the images, so that there is one unit for all."""
        return self.signal == "none" and self.feedback == "none"

    @property
    def probe(self) -> int:
        """How many blocks run before the gate decides."""
        return 0

    @abstractmethod
    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Score of every unit.

        Args:
            state: what `update` returned last, not empty.
            signal: (units, ...), what the gate reads; None for the signal "none".
            step: where.

        Returns:
            (units,) float scores, and the state that goes to `update`.
        """

    @abstractmethod
    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Take note of what was done at a step.

        Args:
            state: from `score`, or empty at the first step.
            signal: as in `score`.
            feedback: (units, ...), what the gate sees of a computed step; None where no unit was computed, and at
                units that were not computed it holds nothing of use.
            computed: (units,) bool, on the CPU.
            step: where.

        Returns:
            The state for the next step.
        """


def check_threshold(threshold: float) -> None:
    """Raise a ValueError unless `threshold` is a number of at least 0."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be a finite number of at least 0 (0 computes every step), got {threshold!r}")


def mean_abs(tensor: Tensor) -> Tensor:
    """(units, ...) -> (units,) mean of the absolute values, in float32 or, if they are, in float64."""
    flat = tensor.flatten(1)
    return torch.linalg.vector_norm(flat, ord=1, dim=1, dtype=_precise(flat)) / flat.shape[1]


def mean_square(tensor: Tensor) -> Tensor:
    """(units, ...) -> (units,) mean of the squares, in the type of `mean_abs`."""
    flat = tensor.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=_precise(flat)).square() / flat.shape[1]


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """(units, ...) twice -> (units,) mean|new - old| / mean|old|."""
    return mean_abs(new - old) / mean_abs(old)


def where(units: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """`new` at the units that are true, `old` (None: `new`) at the others; `units` is on the CPU."""
    if old is None or bool(units.all()):
        return new
    if not bool(units.any()):
        return old
    return torch.where(units.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, old)
