"""Routers of dynamic width and dynamic tokens (DyDiT, arXiv 2410.03456), and their relaxation.

A router gives logits; a gate is on where its logit is positive. While training, logistic noise is added and the
gradient is that of a sigmoid (straight through). Logits are float32 whatever the weights are, or float64 for an input
of float64, because a flipped gate changes the network.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

WIDTH_BIAS, TOKEN_BIAS, TAU = 15.0, 35.0, 5.0
"""Published initial biases (nearly everything on) and temperature."""
_BOTTLENECK = 16


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Sample logistic noise, the difference of two Gumbel variables, on the CPU in float32.

    Args:
        shape: shape of the result.
        generator: the random generator; None takes torch's default.
    """
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform)


def straight_through(logits: Tensor, noise: Tensor, tau: float = TAU) -> Tensor:
    """Return gates of exactly 0 or 1 whose gradient is that of sigmoid((logits + noise) / tau).

    The probability that a gate is on is sigmoid(logit) whatever `tau` is; `tau` shapes the gradient alone.

    Args:
        logits: any shape.
        noise: logistic noise of that shape.
        tau: temperature, positive.
    """
    soft = torch.sigmoid((logits + noise) / tau)
    hard = (logits + noise > 0).to(soft.dtype)
    return hard - soft.detach() + soft


def widened(value: Tensor) -> Tensor:
    """Return `value` in float32, or unchanged if it is float64: the dtype of logits."""
    return value if value.dtype == torch.float64 else value.float()


def never_narrower(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap `fn` of `Module._apply` so that it never narrows floating-point tensors; those are only moved.

    For routers, `network.to(dtype)` then behaves as `_keep_in_fp32_modules` does when diffusers loads a network.
    """

    def moved(value: Tensor) -> Tensor:
        result = fn(value)
        narrower = value.is_floating_point() and result.element_size() < value.element_size()
        return value.to(result.device) if narrower else result

    return moved


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that disables autocast on a device, which may not support it, such as `meta`."""
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    off: AbstractContextManager[None] = torch.autocast(kind, enabled=False) if casts else nullcontext()
    return off


class _WideLinear(nn.Linear):
    """Linear layer that computes in the dtype of its input, even under autocast."""

    def forward(self, value: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(value.dtype)
        with without_autocast(value.device):
            return nn.functional.linear(value, self.weight.to(value.dtype), bias)


class WidthRouter(_WideLinear):
    """Router from a timestep embedding (B, width) to logits (B, units - 1); the first unit is always on.

    Args:
        width: width of the timestep embedding.
        units: heads, or groups of channels.
        bias: initial value of the logits.
        gain: gain of the Xavier weights; with 0 all logits start at `bias` exactly.
    """

    def __init__(self, width: int, units: int, bias: float = WIDTH_BIAS, gain: float = 1.0) -> None:
        super().__init__(width, units - 1)
        if units > 1:
            nn.init.xavier_uniform_(self.weight, gain)
        nn.init.constant_(self.bias, bias)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return logits in float32 or wider."""
        return super().forward(widened(embedding))


class TokenRouter(nn.Sequential):
    """Router from the residual stream (B, tokens, width) to logits (B, tokens, 1).

    Args:
        width: width of the residual stream.
        bias: initial value of the logits.
        gain: gain of the last layer's Xavier weights; with 0 all logits start at `bias` exactly.
    """

    def __init__(self, width: int, bias: float = TOKEN_BIAS, gain: float = 1.0) -> None:
        inner = max(1, width // _BOTTLENECK)
        first, last = _WideLinear(width, inner), _WideLinear(inner, 1)
        super().__init__(first, nn.ReLU(), last)
        nn.init.xavier_uniform_(first.weight)
        nn.init.xavier_uniform_(last.weight, gain)
        nn.init.zeros_(first.bias)
        nn.init.constant_(last.bias, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return logits in float32 or wider."""
        logits: Tensor = super().forward(widened(hidden_states))
        return logits
