"""Modules that compute a subset of the tokens (DyDiT's spatial-wise dynamic token, arXiv 2410.03456).

Shapes: B rows, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

BUCKETS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the tokens that capacities are rounded up to, so that few shapes occur."""


class TokenChoice:
    """Base class of modules that compute a subset of the tokens they are given."""

    keep: Tensor | None = None
    """(B, N, 1): bool, or 0 and 1 with a gradient while training; None computes all tokens."""
    logits: Tensor | None = None
    """(B, N, 1) what `keep` was made of; ranks the tokens where `capacity` is too small for them."""
    gather: bool = True
    """Compute the tokens that are kept and no others; else all, and clear what is left out. The result is the same, and
    which is faster depends on the sizes and the device."""
    capacity: int | None = None
    """Compute so many tokens of every row, those with the largest logits; what is not kept is cleared. Shapes are then
    known beforehand, so the host never waits for the device. None computes as many as are kept."""
    rows_differ: bool = False
    """Whether the layers within hold a mask per row, so that tokens of all rows may not be put into one."""

    @property
    def dense(self) -> bool:
        """Whether all tokens are computed and those that are left out are cleared."""
        return not self.gather or self.keep is None or self.keep.dtype != torch.bool or torch.is_grad_enabled()

    def places(self) -> tuple[Tensor, Tensor]:
        """Return the tokens to compute, (B, M), and which of these are kept, bool (B, M, 1).

        M is the capacity, or else the largest number that any row keeps. Every row depends on itself alone.
        """
        assert self.keep is not None
        keep = self.keep.squeeze(-1)
        if self.capacity is None:
            most = int(keep.sum(1).max())
            places = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].contiguous()
        else:
            scores = keep.float() if self.logits is None else self.logits.squeeze(-1)
            places = scores.topk(min(self.capacity, keep.shape[1]), dim=1).indices
        return places, keep.gather(1, places).unsqueeze(-1)


class TokenFeedForward(TokenChoice, FeedForward):
    """Feed-forward that returns 0 for the tokens that are left out.

    Every diffusers `FeedForward` can become one (`take_over`): parameters, hooks and names stay.
    """

    @staticmethod
    def take_over(module: nn.Module) -> TokenFeedForward:
        """Convert `module` to a `TokenFeedForward` in place.

        Raises:
            TypeError: it is no diffusers `FeedForward`.
        """
        if type(module) is not FeedForward and not isinstance(module, TokenFeedForward):
            raise TypeError(f"tokens are left out of a diffusers FeedForward, got a {type(module).__name__}")
        module.__class__ = TokenFeedForward
        assert isinstance(module, TokenFeedForward)
        return module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the feed-forward to the kept tokens: (B, N, D) -> (B, N, D)."""
        if self.keep is None:
            return super().forward(hidden_states, *args, **kwargs)
        if self.dense:
            return super().forward(hidden_states, *args, **kwargs) * self.keep.to(hidden_states.dtype)
        if self.capacity is None and not self.rows_differ:
            return self._packed(hidden_states, self.keep)
        places, kept = self.places()
        computed = super().forward(take_tokens(hidden_states, places))
        output = computed.new_zeros(*hidden_states.shape[:-1], computed.shape[-1])
        return put_tokens(output, places, computed * kept)

    def _packed(self, hidden_states: Tensor, keep: Tensor) -> Tensor:
        """Compute the kept tokens of all rows as one row, without padding."""
        places = keep.flatten().nonzero().squeeze(1)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        computed = super().forward(tokens.index_select(0, places))
        output = computed.new_zeros(len(tokens), computed.shape[-1])
        return output.index_copy_(0, places, computed).reshape(*hidden_states.shape[:-1], -1)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Gather tokens (B, N, D) at places (B, M): (B, M, D)."""
    taken = tokens.flatten(0, 1).index_select(0, _flat(places, tokens.shape[1]))
    return taken.view(*places.shape, tokens.shape[-1])


def put_tokens(tokens: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Add values (B, M, D) to tokens (B, N, D) at places (B, M), which differ within a row."""
    added = tokens.flatten(0, 1).index_add(0, _flat(places, tokens.shape[1]), values.flatten(0, 1))
    return added.view_as(tokens)


def _flat(places: Tensor, tokens: int) -> Tensor:
    """Return the places as indices into the tokens of all B rows, flattened."""
    first = torch.arange(len(places), device=places.device).unsqueeze(1) * tokens
    return (places + first).flatten()


def fitted_capacity(counts: Tensor, tokens: int, *, quantile: float = 1.0, margin: float = 0.05) -> int:
    """Return a capacity that is enough for most of the observed counts.

    Args:
        counts: numbers of kept tokens, any shape.
        tokens: number of all tokens.
        quantile: the share of `counts` that must fit, in (0, 1]; 1 takes the largest.
        margin: margin to add, as a share of all tokens, at least 0.

    Returns:
        A share of `BUCKETS` of all tokens, rounded up.

    Raises:
        ValueError: an argument out of its range, or no counts.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if not counts.numel():
        raise ValueError("counts must hold at least one number, got none: run the network on something first")
    if tokens < 1 or int(counts.max()) > tokens:
        raise ValueError(f"tokens must be at least 1 and the largest count, {int(counts.max())}, got {tokens}")
    fits = math.ceil(quantile * counts.numel() - 1e-9)  # a whole number up to rounding counts as one
    needed = int(counts.flatten().sort().values[fits - 1]) / tokens + margin
    bucket = next((share for share in BUCKETS if needed <= share), 1.0)
    return math.ceil(bucket * tokens)
