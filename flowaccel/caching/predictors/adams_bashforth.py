"""Adams-Bashforth extrapolation over the steps of the run, as AB-Cache is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowaccel.caching.predictors.base import Axis, OrderedPredictor, lagrange_weights


@dataclass(frozen=True)
class AdamsBashforth(OrderedPredictor):
    """AB-Cache (arXiv 2504.10540): f_n = sum over i = 1..k of (-1)^(i + 1) C(k, i) f_{n - i}, with n counting steps.

    The weights are our reading of the abstract. The sum is the polynomial of degree k - 1 through k steps in a row, and
    where the last k computed values lie further apart, it is that polynomial through them: the error stays O(h^k), and
    no forecast is made from forecasts.

    Args:
        order: k - 1, 0 to 4.

    Raises:
        ValueError: an order out of range.
    """

    name: ClassVar[str] = "adams_bashforth"
    axis: ClassVar[Axis] = "step"

    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Return alternating binomial coefficients, of an order up to the number of consecutive steps computed."""
        return lagrange_weights(times, now)
