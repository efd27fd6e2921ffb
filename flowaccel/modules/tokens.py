"""Feed-forwards that take part of the tokens (DyDiT's spatial-wise dynamic token, arXiv 2410.03456)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn


class TokenFeedForward(FeedForward):
    """A feed-forward that returns 0 for the tokens that are left out.

    Every diffusers `FeedForward` can become one (`take_over`): parameters, hooks and names stay.
    """

    keep: Tensor | None = None
    """(B, N, 1): bool, or 0 and 1 with a gradient while training; None computes all tokens."""
    gather: bool = True
    """Compute the tokens that are kept and no others; else all, and clear what is left out. The result is the same, and
    which is faster depends on the sizes and the device."""

    @staticmethod
    def take_over(module: nn.Module) -> TokenFeedForward:
        """Make `module` itself a `TokenFeedForward`."""
        if type(module) is not FeedForward and not isinstance(module, TokenFeedForward):
            raise TypeError(f"tokens are left out of a diffusers FeedForward, got a {type(module).__name__}")
        module.__class__ = TokenFeedForward
        assert isinstance(module, TokenFeedForward)
        return module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        keep = self.keep
        if keep is None:
            return super().forward(hidden_states, *args, **kwargs)
        dense = not self.gather or keep.dtype != torch.bool or torch.is_grad_enabled()
        if dense or any(getattr(module, "rowwise", False) for module in self.net.modules()):  # by image, not by token
            return super().forward(hidden_states, *args, **kwargs) * keep.to(hidden_states.dtype)
        places = keep.flatten().nonzero().squeeze(1)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        computed = super().forward(rows.index_select(0, places))
        output = computed.new_zeros(len(rows), computed.shape[-1])
        return output.index_copy_(0, places, computed).reshape(*hidden_states.shape[:-1], -1)
