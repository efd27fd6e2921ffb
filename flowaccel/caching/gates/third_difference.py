"""AdaptiveDiffusion: the third difference of the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowaccel.caching.gates.base import Gate, State, Step, check_threshold, mean_abs


@dataclass(frozen=True)
class ThirdDifference(Gate):
    """AdaptiveDiffusion (arXiv 2410.09873): compute where the latents' path bends.

    With d the last three steps of the latents, newest first, a step is reused if |(d0 + d2) / 2 - d1| is at most
    `threshold` |d1|. The first four steps are computed. For deterministic samplers: noise hides the bend.

    Args:
        threshold: compute from this relative third difference on (published: 0.01 at 50 steps of SD and SDXL).
        mode: `scalar`, of the mean absolute steps (the released code); `vector`, the mean absolute value of the
            difference of the steps themselves (the paper's norm).
        per_time: divide each step by its time first; for uneven grids, whose steps bend by themselves.

    Raises:
        ValueError: out of range, or an unknown mode.
    """

    name: ClassVar[str] = "third_difference"
    signal = "input"

    threshold: float = 0.01
    mode: Literal["scalar", "vector"] = "scalar"
    per_time: bool = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.mode not in ("scalar", "vector"):
            raise ValueError(f"mode must be 'scalar' or 'vector', got {self.mode!r}")

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the relative third difference, over the threshold; infinite in the first four steps."""
        assert signal is not None
        state = self._moved(state, signal, step)
        if step.index < 4 or "d2" not in state:
            return torch.full((len(signal),), torch.inf, device=signal.device), state
        newest, middle, oldest = state["d0"], state["d1"], state["d2"]
        bend = mean_abs((newest + oldest) / 2 - middle)
        return bend / mean_abs(middle) / self.threshold, state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Store the latents of the first step; `score` stores those of later steps."""
        assert signal is not None
        if not state:
            return {"latents": signal, "time": torch.full((len(signal),), step.time, dtype=torch.float64)}
        return state

    def _moved(self, state: State, signal: Tensor, step: Step) -> State:
        """Return the state after the step to these latents."""
        change = signal - state["latents"]
        if self.per_time:
            gap = (step.time - state["time"]).abs().clamp(min=1e-12).to(change)
            change = change / gap.view(-1, *[1] * (change.dim() - 1))
        if self.mode == "scalar":
            change = mean_abs(change)[:, None]
        kept = {name: state[older] for name, older in (("d1", "d0"), ("d2", "d1")) if older in state}
        time = torch.full_like(state["time"], step.time)
        return {"latents": signal, "time": time, "d0": change, **kept}
