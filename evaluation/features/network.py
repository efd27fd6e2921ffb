"""Networks that turn images into features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowaccel.evaluation.features.preprocessing import Preprocessing
from flowaccel.evaluation.features.pretrained import TextEncoder

_BATCH = 500
_BATCH_RESIZED = 32  # networks with a fixed input size are large


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """Network that turns images into features, with its identity."""

    name: str
    module: nn.Module
    fingerprint: str
    """sha256 over the network's class and weights and, where images are resized for it, how; 16 hex digits."""
    classify: Callable[[Tensor], Tensor] | None
    """Features (N, d) -> class ids (N,), where the network is a classifier."""
    attributes: Callable[[Tensor], Tensor] | None = None
    """Features (N, d) -> the index of each attribute's value (N, A), where the network sees attributes."""
    preprocessing: Preprocessing | None = None
    """Preprocessing to the network's size; None where it takes images as they are."""
    encode_text: TextEncoder | None = None
    """Texts -> (N, d) in the space of the features, where the network is a CLIP with its text half."""
    device: str = "cpu"
    """Device on which features are computed; the network is there only meanwhile, so that it is in no measurement of
    memory."""

    @torch.no_grad()
    def __call__(self, images: Iterable[Tensor]) -> Tensor:
        """Return the features, float (N, d), of uint8 images (N, C, H, W).

        Where the network resizes, any iterable of uint8 (C, H, W) will do.
        """
        self.module.to(self.device)
        try:
            return torch.cat([self.module(batch.to(self.device)).float().cpu() for batch in self._batches(images)])
        finally:
            self.module.to("cpu")

    def _batches(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        if self.preprocessing is None:
            yield from (images if isinstance(images, Tensor) else torch.stack(list(images))).split(_BATCH)
            return
        remaining = iter(images)
        while batch := list(itertools.islice(remaining, _BATCH_RESIZED)):
            yield self.preprocessing(batch)
