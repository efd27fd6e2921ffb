"""Predictor that repeats the last computed value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowaccel.caching.predictors.base import Predictor, hold_weights


@dataclass(frozen=True)
class Hold(Predictor):
    """Predictor that repeats the last computed value."""

    name: ClassVar[str] = "hold"

    @property
    def anchors(self) -> int:
        """Number of values, 1."""
        return 1

    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Return weight 1 for the newest value."""
        return hold_weights(times)
