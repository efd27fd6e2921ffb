"""MagCache: the ratio of the magnitudes of successive residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.gates.base import Gate, State, Step, check_threshold, where


@dataclass(frozen=True)
class Magnitude(Gate):
    """MagCache (NeurIPS 2025): compute where the residual's magnitude has drifted away from the last computed one.

    gamma(t) is the mean over the tokens of |residual(t)| / |residual(t - 1)|. While reusing, the product of the gammas
    since the last computed step is tracked, and the sum of its distances from 1 is compared with the threshold.

    Args:
        threshold: compute from this sum on.
        ratios: gamma of every step, the first one 1, as measured by `flowaccel calibrate --method magcache`; for other
            numbers of steps the nearest in relative position are taken. None estimates gamma from the last two computed
            steps of each image instead (not published, and ours).

    Raises:
        ValueError: out of range, or a ratio that is not above 0.
    """

    name: ClassVar[str] = "magnitude"

    threshold: float = 0.06
    ratios: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.ratios is not None:
            if not self.ratios or any(not ratio > 0 for ratio in self.ratios):
                raise ValueError(f"ratios must hold numbers above 0, got {self.ratios!r}")
            object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))

    @property
    def feedback(self) -> str:  # type: ignore[override]
        """Cached feature, or none if the ratios are given."""
        return "none" if self.ratios is not None else "feature"

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the sum with this step, over the threshold."""
        gamma = state["gamma"] if self.ratios is None else torch.tensor([self._ratio(step)])
        product = state["product"] * gamma
        total = state["total"] + (1 - product).abs()
        return total / self.threshold, state | {"product": product, "total": total}

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Reset the computed units, and measure their residual unless the ratios are given."""
        ones = torch.ones(len(computed), device=None if feedback is None else feedback.device)
        state = {
            **state,
            "product": where(computed, ones, state.get("product")),
            "total": where(computed, torch.zeros_like(ones), state.get("total")),
        }
        return (
            state if self.ratios is not None or feedback is None else state | _measured(state, feedback, computed, step)
        )

    def _ratio(self, step: Step) -> float:
        assert self.ratios is not None
        last = len(self.ratios) - 1
        scale = last / max(step.count - 1, 1)
        return self.ratios[min(round(step.index * scale), last)]


def _measured(state: State, feature: Tensor, computed: Tensor, step: Step) -> State:
    """Return the magnitudes of the tokens, and the ratio per step since the last computed one."""
    size = magnitudes(feature)
    index = torch.full((len(size),), float(step.index), device=size.device)
    if "size" not in state:  # no ratio from one value: infinite, so that the next step is computed
        return {"size": size, "index": index, "gamma": torch.full_like(index, torch.inf)}
    steps = (index - state["index"]).clamp(min=1)
    gamma = (size / state["size"]).mean(dim=1) ** (1 / steps)
    return {
        name: where(computed, new, state[name]) for name, new in (("size", size), ("index", index), ("gamma", gamma))
    }


def magnitudes(feature: Tensor) -> Tensor:
    """Return the norms of the tokens, (units, ..., width) -> (units, tokens), in float32."""
    return torch.linalg.vector_norm(feature.flatten(1, -2), dim=-1, dtype=torch.float32).clamp(min=1e-12)
