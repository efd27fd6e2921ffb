"""A stand-in for xformers' attention, whose real one has no kernel for the CPU: as strict about masks, and counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from torch import Tensor


class Op:
    """`xformers.ops.memory_efficient_attention`, without torch's own attention.

    It is called with (B, L, M, d) or (B * M, L, d), and refuses masks as xformers does: of another shape than (B, M, Q,
    K) or (B * M, Q, K), as nothing is broadcast, and where rows begin elsewhere than at multiples of 16 bytes.

    Args:
        masks: whether it takes masks at all, which not every kernel does.
    """

    def __init__(self, masks: bool = True) -> None:
        self.masks = masks
        self.seen: list[tuple[int, ...] | None] = []
        """The shapes of the masks of all calls, None where there was none."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
    ) -> Tensor:
        apart = query.ndim == 4
        query, key, value = (part.transpose(1, 2) if apart else part for part in (query, key, value))
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_bias is not None:
            self._check(attn_bias, logits.shape)
            logits = logits + attn_bias
        self.seen.append(None if attn_bias is None else tuple(attn_bias.shape))
        found = logits.softmax(-1) @ value
        return found.transpose(1, 2) if apart else found

    def _check(self, bias: Tensor, shape: tuple[int, ...]) -> None:
        if not self.masks:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith a mask")
        if bias.shape != shape:
            raise ValueError(f"Invalid shape for attention bias: {bias.shape} (expected {shape})")
        aligned = 128 // torch.finfo(bias.dtype).bits
        if bias.stride(-1) > 1 or any(stride % aligned for stride in bias.stride()[:-1]):
            raise NotImplementedError(f"attn_bias.stride(-2) % {aligned} != 0 (attn_bias.stride() = {bias.stride()})")


def put_in_place(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any]) -> None:
    """Let `kernel` be xformers' attention, for everybody who imports or has imported it."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_processor, "xformers", package)
    monkeypatch.setattr(attention_dispatch, "xops", ops)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
