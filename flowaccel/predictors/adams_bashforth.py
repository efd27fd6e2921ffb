"""Adams-Bashforth weights of even steps, as AB-Cache is described."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.predictors.base import OrderedPredictor


@dataclass(frozen=True)
class AdamsBashforth(OrderedPredictor):
    """AB-Cache (arXiv 2504.10540): f_n = sum over i = 1..k of (-1)^(i + 1) C(k, i) f_{n - i}, as if steps were even.

    The weights are our reading of the abstract (the degree k - 1 polynomial through k even steps). They are applied to
    computed values only, whatever their distance; `Newton` takes the distances into account.

    Args:
        order: k - 1, 0 to 4.

    Raises:
        ValueError: an order out of range.
    """

    name: ClassVar[str] = "adams_bashforth"

    def weights(self, times: Tensor, now: Tensor) -> Tensor:
        """Alternating binomial coefficients."""
        count = times.shape[1]
        row = torch.tensor([(-1) ** i * math.comb(count, i + 1) for i in range(count)], dtype=times.dtype)
        return row.to(times.device).expand(len(times), count)
