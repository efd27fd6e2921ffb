"""Tokens of an image, row by row, and the image that they are."""

from __future__ import annotations

from torch import Tensor


def as_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H * W, D) -> (B, D, H, W), a view that is channels-last in memory, for one row as for many.

    A transposition that is unflattened is not: for one row torch then sees another layout, copies in pooling and
    convolution, and what comes out has channels that are far apart, which fused attention does not take.
    """
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(image: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H * W, D)."""
    return image.flatten(2).transpose(1, 2)
