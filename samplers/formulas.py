"""Arithmetic of a step, shared by the schedulers and by the compiled blocks of `SiTPipeline`.

`state` and velocities are (B, ...) tensors, `width` the change of sigma over the step (negative); widths and noise
levels are numbers or 0-dim tensors. Velocities are diffusers' (noise - data).
"""

from __future__ import annotations

from torch import Tensor


def predicted(state: Tensor, width: float | Tensor, velocity: Tensor) -> Tensor:
    """Return the state after an Euler step."""
    return state + width * velocity


def extrapolated(velocity: Tensor, previous: Tensor, ratio: float | Tensor) -> Tensor:
    """Return the slope of a second-order Adams-Bashforth step; `ratio` is its width over that of the previous step."""
    return velocity + ratio / 2 * (velocity - previous)


def corrected(state: Tensor, width: float | Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the state after a trapezoidal step with the velocities at its start and at its predicted end."""
    return state + width / 2 * (start + end)


def noised(sample: Tensor, sigma: float | Tensor, noise: Tensor) -> Tensor:
    """Return (1 - sigma) * `sample` + sigma * `noise` on the linear path; exactly `sample` at 0, and `noise` at 1."""
    return sigma * noise + (1 - sigma) * sample
