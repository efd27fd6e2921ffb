"""Forecasts of TaylorSeer and HiCache as published: derivatives over the last gap only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.predictors.base import TimedPredictor, differences


@dataclass(frozen=True)
class Taylor(TimedPredictor):
    """TaylorSeer (arXiv 2503.06923): F(t + k) = sum over i of D_i k^i / i!.

    D_i is the i-th difference quotient, always over the last gap. For `order` 2 and more that is not the divided
    difference unless all gaps are alike, and even then a quadratic series is not met: `Newton` corrects both.

    Args:
        order: of the series, 0 to 4.
        axis: what t counts: `time` the scheduler's timesteps, `step` the steps of the run, as published.

    Raises:
        ValueError: an order or axis out of range.
    """

    name: ClassVar[str] = "taylor"

    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Return the weights of the values in the series."""
        distance = now - times[:, 0]
        terms = torch.stack([distance**i / math.factorial(i) for i in range(times.shape[1])], dim=1)
        return (terms[:, :, None] * differences(times)).sum(dim=1)


@dataclass(frozen=True)
class Hermite(TimedPredictor):
    """HiCache: TaylorSeer's series with k^i replaced by scale^i H_i(scale k), H_i the physicists' Hermite polynomial.

    Here k is counted in last gaps. At the published scale of 0.5 the linear term is halved, which damps the forecast.

    Args:
        order: of the series, 0 to 4.
        scale: contraction, above 0.
        normalised: divide each polynomial by (2 scale^2)^i, so that its leading term is k^i and order 1 is linear.
        axis: what time counts: `time` the scheduler's timesteps, `step` the steps of the run, as published.

    Raises:
        ValueError: an order or axis out of range, or a scale that is not above 0.
    """

    name: ClassVar[str] = "hermite"

    order: int = 2
    scale: float = 0.5
    normalised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale!r}")

    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Return the weights of the values in the series."""
        count = times.shape[1]
        gap = times[:, 0] - times[:, 1] if count > 1 else torch.ones_like(now)
        distance = (now - times[:, 0]) / gap
        hermite = [torch.ones_like(distance), 2 * self.scale * distance]
        for i in range(1, count - 1):
            hermite.append(2 * self.scale * distance * hermite[i] - 2 * i * hermite[i - 1])
        unit = 2 * self.scale**2 if self.normalised else 1.0
        terms = [hermite[i] * (self.scale / unit) ** i / math.factorial(i) for i in range(count)]
        return (torch.stack(terms, dim=1)[:, :, None] * differences(times / gap[:, None])).sum(dim=1)
