"""Interpolant paths x_t = alpha(t) * data + sigma(t) * noise of SiT (arXiv 2401.08740), with t = 0 noise and t = 1
data.

Pure tensor maths shared by the stochastic sampler and by training. Times `t` have shape (B,); states, velocities,
scores and noises have shape (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ProbabilityPath:
    """A path given by its coefficients and their derivatives in t. The built-in ones are `LINEAR`, `GVP` and `VP`."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    alpha_ratio: Callable[[Tensor], Tensor]
    """Ratio d_alpha / alpha, in a form that is finite wherever the quotient is."""

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the state x_t."""
        return _like(self.alpha(t), data) * data + _like(self.sigma(t), data) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity d x_t / dt."""
        return _like(self.d_alpha(t), data) * data + _like(self.d_sigma(t), data) * noise

    def drift_variance(self, t: Tensor) -> Tensor:
        """Return the factor of the score in the probability-flow velocity, shape (B,)."""
        return self.alpha_ratio(t) * self.sigma(t) ** 2 - self.sigma(t) * self.d_sigma(t)

    def score_from_velocity(self, velocity: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """Return the score of the marginal density of x_t."""
        inverse_ratio = _like(self.alpha(t) / self.d_alpha(t), state)
        sigma, d_sigma = _like(self.sigma(t), state), _like(self.d_sigma(t), state)
        return (inverse_ratio * velocity - state) / (sigma**2 - inverse_ratio * d_sigma * sigma)

    def noise_from_velocity(self, velocity: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """Return the expected noise given x_t, as SiT's code does."""
        inverse_ratio = _like(self.alpha(t) / self.d_alpha(t), state)
        sigma, d_sigma = _like(self.sigma(t), state), _like(self.d_sigma(t), state)
        return (inverse_ratio * velocity - state) / (inverse_ratio * d_sigma - sigma)

    def velocity_from_score(self, score: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """Return the probability-flow velocity of a score."""
        return _like(self.drift_variance(t), state) * score + _like(self.alpha_ratio(t), state) * state


def _like(coefficient: Tensor, state: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ...), so that it broadcasts over `state`."""
    return coefficient.reshape(-1, *[1] * (state.dim() - 1))


def _vp_log_alpha(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    return -0.25 * (1 - t) ** 2 * (beta_max - beta_min) - 0.5 * (1 - t) * beta_min


def _vp_alpha_ratio(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    return 0.5 * (1 - t) * (beta_max - beta_min) + 0.5 * beta_min


def _vp_sigma(t: Tensor) -> Tensor:
    return torch.sqrt(1 - torch.exp(2 * _vp_log_alpha(t)))


LINEAR = ProbabilityPath(
    name="linear",
    alpha=lambda t: t,
    d_alpha=torch.ones_like,
    sigma=lambda t: 1 - t,
    d_sigma=lambda t: -torch.ones_like(t),
    alpha_ratio=lambda t: 1 / t,
)
GVP = ProbabilityPath(
    name="gvp",
    alpha=lambda t: torch.sin(t * math.pi / 2),
    d_alpha=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
    sigma=lambda t: torch.cos(t * math.pi / 2),
    d_sigma=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
    alpha_ratio=lambda t: math.pi / (2 * torch.tan(t * math.pi / 2)),
)
VP = ProbabilityPath(
    name="vp",
    alpha=lambda t: torch.exp(_vp_log_alpha(t)),
    d_alpha=lambda t: torch.exp(_vp_log_alpha(t)) * _vp_alpha_ratio(t),
    sigma=_vp_sigma,
    d_sigma=lambda t: -torch.exp(2 * _vp_log_alpha(t)) * _vp_alpha_ratio(t) / _vp_sigma(t),
    alpha_ratio=_vp_alpha_ratio,
)
PATHS = {path.name: path for path in (LINEAR, GVP, VP)}

PREDICTIONS = ("velocity", "score", "noise")
WEIGHTINGS = ("none", "velocity", "likelihood")


def flow_loss(
    path: ProbabilityPath,
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    prediction: str = "velocity",
    weighting: str = "none",
) -> Tensor:
    """Return SiT's training loss per sample, the mean over all but the first axis, shape (B,).

    Args:
        path: the interpolant.
        output: the network's output at `path.interpolate(data, noise, t)`.
        data, noise: the two ends, of the output's shape.
        t: (B,) times in (0, 1).
        prediction: type of `output`: `velocity`, `score` or `noise`.
        weighting: `none`, `velocity` or `likelihood`; ignored for velocities, as in SiT.

    Raises:
        ValueError: unknown `prediction` or `weighting`.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    if prediction == "velocity":
        return (output - path.velocity(data, noise, t)).square().flatten(1).mean(1)
    sigma = path.sigma(t)
    variance = path.drift_variance(t)
    weight = {"none": torch.ones_like(t), "velocity": (variance / sigma) ** 2, "likelihood": variance / sigma**2}[
        weighting
    ]
    residual = output - noise if prediction == "noise" else output * _like(sigma, output) + noise
    return (_like(weight, output) * residual.square()).flatten(1).mean(1)


DIFFUSIONS: dict[str, Callable[[ProbabilityPath, Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: norm * torch.ones_like(t),
    "sbdm": lambda path, t, norm: norm * path.drift_variance(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
}


def diffusion(path: ProbabilityPath, t: Tensor, form: str, norm: float = 1.0) -> Tensor:
    """Return SiT's diffusion coefficient w(t), shape (B,), of dx = (v + w * score) dt + sqrt(2 w) dW.

    w is half of the coefficient that the paper writes. `sbdm` is infinite at t = 0 on the linear path.

    Raises:
        ValueError: unknown form.
    """
    if form not in DIFFUSIONS:
        raise ValueError(f"diffusion form must be one of {sorted(DIFFUSIONS)}, got {form!r}")
    return DIFFUSIONS[form](path, t, norm)
