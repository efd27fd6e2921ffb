"""Newton's predictor: the polynomial through the last computed values at their true positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.predictors.base import TimedPredictor, hold_weights, lagrange_weights


@dataclass(frozen=True)
class Newton(TimedPredictor):
    """Newton's divided differences: exact for polynomials up to `order` on any grid of times.

    Until `order` + 1 values were computed the order is lower; order 0 holds.

    Args:
        order: degree of the polynomial, 0 to 4.
        reach: hold instead where the time to predict is further from the newest value than `reach` mean gaps of the
            values used; None for never. A step over many steps is where polynomials go astray.
        axis: `time` counts the scheduler's timesteps, `step` the steps of the run.

    Raises:
        ValueError: an order or axis out of range, or a reach that is not above 0.
    """

    name: ClassVar[str] = "newton"

    reach: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach is not None and not self.reach > 0:
            raise ValueError(f"reach must be above 0, or None, got {self.reach!r}")

    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Return the Lagrange weights of the same polynomial."""
        count = times.shape[1]
        weights = lagrange_weights(times, now)
        if self.reach is None or count == 1:
            return weights
        gap = (times[:, 0] - times[:, -1]).abs() / (count - 1)
        near = (now - times[:, 0]).abs() <= self.reach * gap * (1 + 1e-9)
        return torch.where(near[:, None], weights, hold_weights(times))
