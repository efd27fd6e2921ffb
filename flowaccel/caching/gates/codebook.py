"""AdaCache: a codebook says how many steps to reuse after each computed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.gates.base import Gate, State, Step, mean_abs, where

CODEBOOKS: dict[str, tuple[tuple[float, int], ...]] = {
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1)),
    "slow": ((0.08, 3), (0.16, 2), (1.0, 1)),
    "fast-100": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)),
}
"""Published codebooks, for 30 steps and for 100."""


@dataclass(frozen=True)
class Codebook(Gate):
    """AdaCache (arXiv 2411.02397): at a computed step the middle block's change sets when to compute next.

    The change is mean|old - new| / mean|old| of that block's residual since the last computed step, divided by the
    number of steps between them. The first entry of the codebook whose bound is above it says after how many steps to
    compute again. The released code takes the residual of the block's attention alone.

    Args:
        codebook: (bound, steps) in rising order of the bounds, the last for all changes above; or `fast` or `slow`
            (30 steps), or `fast-100`.

    Raises:
        ValueError: an unknown name, bounds that do not rise, or a number of steps below 1.
    """

    name: ClassVar[str] = "codebook"
    feedback = "middle_block"

    codebook: str | Sequence[tuple[float, int]] = "fast"

    def __post_init__(self) -> None:
        if isinstance(self.codebook, str):
            if self.codebook not in CODEBOOKS:
                raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, or pairs, got {self.codebook!r}")
            return
        pairs = tuple((float(bound), int(steps)) for bound, steps in self.codebook)
        bounds = [bound for bound, _ in pairs]
        if not pairs or bounds != sorted(set(bounds)) or bounds[0] <= 0:
            raise ValueError(f"the bounds of codebook must rise and be above 0, got {self.codebook!r}")
        if any(steps < 1 for _, steps in pairs):
            raise ValueError(f"the steps of codebook must be at least 1, got {self.codebook!r}")
        object.__setattr__(self, "codebook", pairs)

    @property
    def pairs(self) -> tuple[tuple[float, int], ...]:
        """Pairs (bound, steps) of the codebook."""
        return CODEBOOKS[self.codebook] if isinstance(self.codebook, str) else tuple(self.codebook)

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return 2 if the step is due, else 0, so that no score is a near-tie."""
        return 2.0 * (step.index >= state["due"]), state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Look up the next step to compute."""
        if feedback is None:
            return state
        index = torch.full((len(feedback),), step.index, device=feedback.device)
        if not state:
            return {"residual": feedback, "index": index, "due": index + 1}
        gap = (index - state["index"]).clamp(min=1)
        change = mean_abs(state["residual"] - feedback) / mean_abs(state["residual"]) / gap
        return {
            "residual": where(computed, feedback, state["residual"]),
            "index": where(computed, index, state["index"]),
            "due": where(computed, index + self._steps(change), state["due"]),
        }

    def _steps(self, change: Tensor) -> Tensor:
        bounds = torch.tensor([bound for bound, _ in self.pairs[:-1]], device=change.device)
        steps = torch.tensor([steps for _, steps in self.pairs], device=change.device)
        # The first bound above the change; NaN sorts last, to the fewest steps.
        return steps[torch.bucketize(change, bounds, right=True)]
