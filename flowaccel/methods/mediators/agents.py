"""Agent Attention (arXiv 2312.08874) without training, for attention modules of diffusers.

Pooled queries, the agents, read keys and values like queries, and every query reads the agents like keys. It is an
approximation with no weights of its own: softmax attention was trained, and this computes something else.

Shapes: B rows, N = H * W tokens of an image (row by row), A agents, M heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowaccel.methods.mediators.grids import as_image, as_tokens
from flowaccel.models.stand_in import StandIn

READING_SHARPNESS = 0.15
"""Queries read agents with logits times d to the power of minus this, the published value; attention has 0.5."""
SHORTCUT = 0.075
"""Published share of a token's own value that is added."""


def agent_attention(query: Tensor, key: Tensor, value: Tensor, agents: Tensor) -> Tensor:
    """Compute softmax(d^-0.15 q a^T) softmax(d^-0.5 a k^T) v + 0.075 v, as released for Stable Diffusion.

    Args:
        query, key, value: (B, M, N, d).
        agents: (B, M, A, d).

    Returns:
        (B, M, N, d).
    """
    read = functional.scaled_dot_product_attention(agents, key, value)
    sharp = query.shape[-1] ** -READING_SHARPNESS
    return functional.scaled_dot_product_attention(query, agents, read, scale=sharp) + SHORTCUT * value


def pooled_queries(query: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Average the queries (B, N, D) over cells of stride x stride places, smaller at the far edges: (B, A, D).

    A projection without anything but a matrix and a bias gives the same of the pooled input, so that nothing is
    projected twice.
    """
    return as_tokens(functional.avg_pool2d(as_image(query, grid), stride, ceil_mode=True))


def grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid (H, W) of `tokens` tokens of an image of that size, downscaled by an integer; None if none fits.

    Sides are rounded up.
    """
    for factor in range(1, max(size) + 1):
        grid = (-(-size[0] // factor), -(-size[1] // factor))
        if grid[0] * grid[1] <= tokens:
            return grid if grid[0] * grid[1] == tokens else None
    return None


@dataclass(frozen=True)
class AgentLayer:
    """Layer that ran with agents."""

    path: str
    rows: int
    macs_spared: int
    """Multiply-adds saved against full attention, of all rows."""


@dataclass
class AgentSwitch:
    """Shared state of a network's processors: whether agents are on, and for which image size."""

    stride: int
    min_tokens: int
    size: tuple[int, int] | None = None
    """Size of the image in the current call; None while agents are off."""
    applies: Callable[[], bool] = field(default=lambda: True)
    """Whether `size` belongs to the call that runs now, rather than to that of another thread or pipeline."""
    ran: list[AgentLayer] = field(default_factory=list)
    largest: int = 0
    """Largest number of tokens that a layer had since agents were last switched on."""

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Return the grid of a layer where agents are to be used, or None for full attention."""
        if self.size is None or not (torch.compiler.is_compiling() or self.applies()):
            return None
        self.largest = max(self.largest, tokens)
        return grid_of(tokens, self.size) if tokens >= self.min_tokens else None


class AgentAttnProcessor(StandIn):
    """Processor of a diffusers `Attention` with agents where `switch` says so; else it calls `stock`.

    Args:
        stock: the processor in whose place it stands.
        path: name of the attention in its network.
        switch: shared with the other processors of the network.
    """

    def __init__(self, stock: Any, path: str, switch: AgentSwitch) -> None:
        self.stock, self.path, self.switch = stock, path, switch

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute attention and the output projection: `hidden_states` (B, N, D) -> (B, N, D)."""
        plain = encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3
        grid = self.switch.grid(hidden_states.shape[1]) if plain else None
        if grid is None:
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return stock
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        agents = pooled_queries(query, grid, self.switch.stride)
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value, agents)]
        attended = agent_attention(*heads).transpose(1, 2).flatten(2).to(query.dtype)
        self._note(query, agents.shape[1])
        for layer in attn.to_out:
            attended = layer(attended)
        return attended

    def _note(self, query: Tensor, agents: int) -> None:
        if not torch.compiler.is_compiling():
            rows, tokens, width = query.shape
            spared = rows * tokens * width * (2 * tokens - 4 * agents)
            self.switch.ran.append(AgentLayer(self.path, rows, spared))
