"""EasyCache: the change of the output, predicted from the change of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.gates.base import Gate, State, Step, check_threshold, mean_abs, where


@dataclass(frozen=True)
class Easy(Gate):
    """EasyCache (arXiv 2507.02860): compute where the predicted relative changes of the output have added up.

    Two computed steps give the rate k = mean|output change| / mean|input change|. A step's predicted change is k times
    its input change over mean|last computed output|. It reads nothing inside the network, so it works on every network.

    Args:
        threshold: compute from this sum on.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "easy"
    signal = "input"
    feedback = "output"

    threshold: float = 0.05

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the sum with this step's prediction, over the threshold; infinite until the rate is known."""
        assert signal is not None
        change = state["rate"] * mean_abs(signal - state["before"]) / state["size"]
        total = state["total"] + change
        return total / self.threshold, state | {"total": total}

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Measure the rate of the computed units, and reset their sum to 0."""
        assert signal is not None
        if not state:
            assert feedback is not None
            unknown = torch.full((len(signal),), torch.inf, device=signal.device)
            return {
                "before": signal,
                "input": signal,
                "output": feedback,
                "size": mean_abs(feedback),
                "rate": unknown,
                "total": torch.zeros_like(unknown),
            }
        if feedback is None:
            return state | {"before": signal}
        rate = mean_abs(feedback - state["output"]) / mean_abs(signal - state["input"])
        return {
            "before": signal,
            "input": where(computed, signal, state["input"]),
            "output": where(computed, feedback, state["output"]),
            "size": where(computed, mean_abs(feedback), state["size"]),
            "rate": where(computed, rate, state["rate"]),
            "total": where(computed, torch.zeros_like(rate), state["total"]),
        }
