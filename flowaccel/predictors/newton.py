"""Newton: the polynomial through the last computed values, on their true times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.predictors.base import OrderedPredictor, hold_weights


@dataclass(frozen=True)
class Newton(OrderedPredictor):
    """Newton's divided differences: exact for polynomials up to `order` on any grid of times.

    Until `order` + 1 values were computed the order is lower; order 0 holds.

    Args:
        order: degree of the polynomial, 0 to 4.
        reach: hold instead where the time to predict is further from the newest value than `reach` mean gaps of the
            values used; None for never. A step over many steps is where polynomials go astray.

    Raises:
        ValueError: an order out of range, or a reach that is not above 0.
    """

    name: ClassVar[str] = "newton"

    reach: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach is not None and not self.reach > 0:
            raise ValueError(f"reach must be above 0, or None, got {self.reach!r}")

    def weights(self, times: Tensor, now: Tensor) -> Tensor:
        """Lagrange's form of the same polynomial, which has the values' weights for its coefficients."""
        count = times.shape[1]
        weights = torch.ones_like(times)
        for anchor in range(count):
            for other in range(count):
                if other != anchor:
                    weights[:, anchor] *= (now - times[:, other]) / (times[:, anchor] - times[:, other])
        if self.reach is None or count == 1:
            return weights
        gap = (times[:, 0] - times[:, -1]).abs() / (count - 1)
        near = (now - times[:, 0]).abs() <= self.reach * gap * (1 + 1e-9)
        return torch.where(near[:, None], weights, hold_weights(times))
