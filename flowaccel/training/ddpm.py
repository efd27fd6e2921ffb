"""Objective of DiT (arXiv 2212.09748): noise prediction with a learned variance (Improved DDPM, arXiv 2102.09672).

Times are integers t in 0 .. T - 1; t = T - 1 is nearly noise. Shapes: B rows, C channels, data and noise (B, C, ...),
network outputs (B, 2C, ...): the noise, then where the variance lies between its bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowaccel.training.labelled import LabelledBatch, LabelledObjective

_BIN = 1 / 255
"""Half the distance of two pixel values of data scaled to [-1, 1]."""
_LOWEST, _HIGHEST = -0.999, 0.999
"""Beyond these a value belongs to the first or last bin, which reaches to infinity."""
_SMALLEST = 1e-12


@dataclass(frozen=True)
class DiffusionTerms:
    """Terms of the loss of a batch."""

    mse: Tensor
    """(B,) mean squared error of the noise."""
    vb: Tensor
    """(B,) the step's term of the variational bound in bits per dimension; its gradient reaches the variance alone."""

    @property
    def loss(self) -> Tensor:
        """(B,) sum of the terms, which DiT trains on."""
        return self.mse + self.vb


class Diffusion:
    """Diffusion process q(x_t | x_(t-1)) = N(sqrt(1 - beta_t) x_(t-1), beta_t), and its loss.

    Args:
        betas: (T,) variances in (0, 1), in the order of t.

    Raises:
        ValueError: fewer than two, or out of range.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double().cpu()
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be at least two variances in (0, 1), got shape {tuple(betas.shape)}")
        kept = (1 - betas).cumprod(0)
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        posterior = betas * (1 - before) / (1 - kept)
        posterior[0] = posterior[1]  # it is 0 at the first step, whose logarithm is needed
        self.steps: int = len(betas)
        self._signal, self._noise = kept.sqrt(), (1 - kept).sqrt()
        self._log_lower, self._log_upper = posterior.log(), betas.log()
        self._of_data = betas * before.sqrt() / (1 - kept)
        self._of_state = (1 - before) * (1 - betas).sqrt() / (1 - kept)

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, the shape of `data`, at times `t` (B,)."""
        return _at(self._signal, t, data) * data + _at(self._noise, t, data) * noise

    def terms(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> DiffusionTerms:
        """Return the terms of the loss, Improved DDPM's equations 15 (the variance) and 16 (the sum; DiT's weights are
        1).

        Args:
            output: the network's (B, 2C, ...) at `noised(data, noise, t)`.
            data, noise: (B, C, ...), in float32 or float64; the terms are computed in this type.
            t: (B,) integers in 0 .. steps - 1.

        Raises:
            ValueError: an output of another shape.
        """
        wanted = (len(data), 2 * data.shape[1], *data.shape[2:])
        if tuple(output.shape) != wanted:
            raise ValueError(
                f"output must hold noise and variance channels, shape {wanted} for data of shape "
                f"{tuple(data.shape)}, got {tuple(output.shape)}"
            )
        predicted, share = output.to(data.dtype).chunk(2, dim=1)
        mse = (predicted - noise).square().flatten(1).mean(1)
        return DiffusionTerms(mse, self._bound(predicted.detach(), share, data, self.noised(data, noise, t), t))

    def _bound(self, predicted: Tensor, share: Tensor, data: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """Return the variational bound (B,) in bits per dimension.

        It is KL(q(x_(t-1) | x_t, x_0), p), and at t = 0 the negative log-likelihood of x_0.
        """
        lower, upper = _at(self._log_lower, t, data), _at(self._log_upper, t, data)
        log_variance = lower + (share + 1) / 2 * (upper - lower)
        guess = (state - _at(self._noise, t, data) * predicted) / _at(self._signal, t, data)
        of_data, of_state = _at(self._of_data, t, data), _at(self._of_state, t, data)
        mean = of_data * guess + of_state * state
        distance = (of_data * (data - guess)).square()
        divergence = 0.5 * (log_variance - lower - 1 + (lower - log_variance).exp() + distance * (-log_variance).exp())
        bound = torch.where(_shaped(t == 0, data), -_log_likelihood(data, mean, log_variance), divergence)
        return bound.flatten(1).mean(1) / math.log(2)


def _log_likelihood(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-likelihood of data in [-1, 1], rounded to 256 values, under a normal distribution."""
    scale = (-0.5 * log_variance).exp()
    above, below = (_normal_cdf(scale * (data - mean + offset)) for offset in (_BIN, -_BIN))
    within = torch.where(data > _HIGHEST, 1 - below, above - below)
    return torch.where(data < _LOWEST, above, within).clamp(min=_SMALLEST).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the normal distribution function as Improved DDPM does, to about 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return table entries at `t` (B,), to be broadcast over `like` (B, ...)."""
    return _shaped(table.to(like.device, like.dtype)[t], like)


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))


DIT = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
"""DiT's chain: 1000 steps, linear."""


@dataclass(frozen=True, kw_only=True)
class DDPMObjective(LabelledObjective):
    """DiT's loss at times drawn uniformly from the chain, for networks that return noise and variance."""

    chain: Diffusion = DIT

    def times(self, generator: torch.Generator) -> Tensor:
        """Draw times (B,), int64 in 0 .. T - 1."""
        return torch.randint(self.chain.steps, (self.batch_size,), generator=generator)

    def arguments(self, batch: LabelledBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return noised images, times and labels."""
        return self.chain.noised(batch.images, batch.noise, batch.t), batch.t, batch.labels

    def loss(self, output: Tensor, batch: LabelledBatch) -> Tensor:
        """Return the mean of DiT's loss."""
        return self.chain.terms(output, batch.images, batch.noise, batch.t).loss.mean()
