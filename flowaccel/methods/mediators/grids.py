"""Conversion between image tokens, in row-major order, and images."""

from __future__ import annotations

from torch import Tensor


def as_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens (B, H * W, D) as (B, D, H, W), a view that is channels-last in memory for any batch size.

    A transposition that is unflattened is not: for one row torch then sees another layout, copies in pooling and
    convolution, and what comes out has channels that are far apart, which fused attention does not take.
    """
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(image: Tensor) -> Tensor:
    """Return an image (B, D, H, W) as tokens (B, H * W, D)."""
    return image.flatten(2).transpose(1, 2)
