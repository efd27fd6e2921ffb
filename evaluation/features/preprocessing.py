"""Preprocessing of images for a feature network of fixed input size.

The resize is part of the metric, so there is only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Antialiased bicubic resize to a square, then `(pixel - shift) / scale`.

    The resize is the one called "clean" (Parmar et al., arXiv 2104.11222): PIL's, each channel in float32, clipped to
    [0, 255], not rounded. The aspect ratio is not kept and nothing is cropped.
    """

    size: int
    """Height and width that the network sees."""
    shift: tuple[float, float, float]
    """Shift per channel, in units of the pixels' [0, 255]."""
    scale: tuple[float, float, float]
    """Scale per channel, in units of the pixels' [0, 255]."""

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Preprocess uint8 images (C, H, W) with 1 or 3 channels, of any sizes, to float32 (N, 3, size, size)."""
        resized = torch.stack([resize(image, self.size) for image in images])
        return (resized - torch.tensor(self.shift)[:, None, None]) / torch.tensor(self.scale)[:, None, None]

    def describe(self) -> str:
        """Return a description that identifies the preprocessing, for a fingerprint."""
        return f"PIL bicubic float32 clipped {self.size} {self.shift} {self.scale} float32"


def resize(image: Tensor, size: int) -> Tensor:
    """Resize a uint8 image (C, H, W), 1 or 3 channels, to float32 (3, size, size) in [0, 255]; grey is repeated.

    Raises:
        TypeError: not uint8: rounding is part of the metric and must come first.
        ValueError: another number of channels.
    """
    if image.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8, got {image.dtype}; round them first: (x * 255).round().clamp(0, 255).byte()"
        )
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, (C, H, W), got shape {tuple(image.shape)}")
    channels = [_resize_channel(channel.numpy(), size) for channel in image.cpu()]
    return torch.from_numpy(np.stack(channels)).expand(3, -1, -1)


def _resize_channel(pixels: np.ndarray, size: int) -> np.ndarray:
    resized = Image.fromarray(pixels.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized).clip(0, 255)
