"""Hold: the last computed value again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowaccel.caching.predictors.base import Predictor, hold_weights


@dataclass(frozen=True)
class Hold(Predictor):
    """Repeat the last computed value."""

    name: ClassVar[str] = "hold"

    @property
    def anchors(self) -> int:
        """One."""
        return 1

    def weights(self, times: Tensor, now: Tensor) -> Tensor:
        """One for the newest value."""
        return hold_weights(times)
