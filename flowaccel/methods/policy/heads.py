"""Small heads of a learned acceleration policy (RAPID3, arXiv 2509.22323), and their output distributions.

The paper's heads project a feature map, are modulated by the time and prompt embedding, pool, and end in a linear
layer; their sizes are a reconstruction after TPDM (arXiv 2412.01243), which comes to the parameter counts that the
paper reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta, Categorical
from torch.nn import functional

from flowaccel.models.routers import never_narrower

POOL = 16
"""Side of the map that is left to the final maximum."""
_STD, _EPS = 0.02, 1e-6
_RAW = 5.0
"""Raw numbers of the distribution of jumps are clamped to this."""
JUMP_MARGIN = 1e-3
"""Jumps are kept this far from 0 and 1, where their density may be infinite."""


class DecisionHead(nn.Module):
    """Network from a feature map and a condition to a few numbers, in float32.

    Args:
        in_channels: C of the map.
        condition_dim: D of the condition.
        bias: initial output, up to the small random weights before it; one entry per number.
        width: width of its layers.
    """

    def __init__(self, in_channels: int, condition_dim: int, bias: Sequence[float], width: int = 128) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm: nn.GroupNorm = nn.GroupNorm(1, width, eps=_EPS)
        self.modulation: nn.Linear = nn.Linear(condition_dim, 2 * width)
        self.conv2: nn.Conv2d = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.fc1: nn.Linear = nn.Linear(width, width)
        self.fc2: nn.Linear = nn.Linear(width, len(bias))
        layers: tuple[Any, ...] = (self.conv1, self.modulation, self.conv2, self.fc1, self.fc2)
        for layer in layers:
            nn.init.normal_(layer.weight, std=_STD)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.fc2.bias.copy_(torch.tensor(bias))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DecisionHead:
        """Move as `nn.Module` does, but never to a narrower dtype, because another decision changes the image."""
        return super()._apply(never_narrower(fn), recurse)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Apply the head: (R, C, H, W) and (R, D) -> (R, outputs)."""
        shift, scale = self.modulation(functional.silu(condition.float())).unsqueeze(-1).unsqueeze(-1).chunk(2, dim=1)
        hidden = functional.silu(self.norm(self.conv1(features.float())) * (1 + scale) + shift)
        hidden = functional.adaptive_avg_pool2d(self.conv2(hidden), POOL).amax(dim=(2, 3))
        numbers: Tensor = self.fc2(functional.silu(self.fc1(hidden)))
        return numbers


def jump_distribution(raw: Tensor) -> Beta:
    """Return the distribution of the share of the present time that a step leaves.

    It is Beta(1 + e^a, 1 + e^b), which has one peak.

    Args:
        raw: (R, 2).
    """
    alpha, beta = (1 + raw.clamp(-_RAW, _RAW).exp()).unbind(dim=1)
    return Beta(alpha, beta, validate_args=False)


def jump_mode(raw: Tensor) -> Tensor:
    """Return the mode of that distribution: (R, 2) -> (R,)."""
    above = raw.clamp(-_RAW, _RAW).exp()
    return above[:, 0] / above.sum(dim=1)


def choice_distribution(raw: Tensor) -> Categorical:
    """Return the distribution of one of several choices; `raw` (R, choices) are logits."""
    return Categorical(logits=raw, validate_args=False)


def logits_of(*shares: float) -> tuple[float, ...]:
    """Return the logits of choices that are made with these probabilities."""
    return tuple(math.log(share) for share in shares)
