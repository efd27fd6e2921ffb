"""Training of the small networks that judge images of the embedded data sets: classifiers and a CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.data import CaptionedSet, ImageSet
from flowaccel.data.shapes import NOT_STATED
from flowaccel.training.flow import shift_augment


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8, rounded as the evaluator rounds samples."""
    return unit_to_uint8(images / 2 + 0.5)


def unit_to_uint8(images: Tensor) -> Tensor:
    """Convert images in [0, 1] to uint8, rounded as by `to_uint8`; values outside are clipped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class ClassifierObjective:
    """Training objective: `objective(classifier, generator)` -> mean cross-entropy of a fresh, jittered batch."""

    data: ImageSet
    batch_size: int = 100
    noise: float = 0.15
    """Standard deviation of the pixel noise added, in units of [-1, 1]."""

    def __call__(self, classifier: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar; all randomness comes from `generator`."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        images = shift_augment(self.data.images[index], generator, probability=0.7, reach=0.8)
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        device = next(classifier.parameters()).device
        features = classifier(to_uint8(images).to(device))
        return nn.functional.cross_entropy(classifier.logits(features), self.data.labels[index].to(device))  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class AttributesObjective:
    """Training objective: `objective(classifier, generator)` -> mean cross-entropy of the captions' attributes."""

    data: CaptionedSet
    batch_size: int = 128
    noise: float = 0.12
    """Largest standard deviation of the pixel noise added, in units of [-1, 1]: generated pictures are not clean."""

    def __call__(self, classifier: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar; all randomness comes from `generator`."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        images = roughened(self.data.images[index], generator, self.noise)
        device = next(classifier.parameters()).device
        stated = self.data.attributes[index].to(device)
        features = classifier(to_uint8(images).to(device))
        logits = classifier.attribute_logits(features)  # type: ignore[operator]
        losses = [
            nn.functional.cross_entropy(found, asked, ignore_index=NOT_STATED, reduction="sum")
            for found, asked in zip(logits, stated.unbind(1), strict=True)
        ]
        return torch.stack(losses).sum() / (stated != NOT_STATED).sum()


def roughened(images: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Add pixel noise of a random deviation up to `noise` to every image, (N, C, H, W) in [-1, 1]."""
    deviation = noise * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + deviation * torch.randn(images.shape, generator=generator)


@dataclass(frozen=True, kw_only=True)
class ClipObjective:
    """Training objective: `objective(clip, generator)` -> CLIP's contrastive loss (arXiv 2103.00020) of one batch.

    Images of one caption are no negatives of each other: each row's target is spread over the captions equal to its
    own.
    """

    data: CaptionedSet
    input_ids: Tensor
    """(N, L), the captions."""
    mean: Tensor
    """(3,) and `std` as the evaluator normalises images for a CLIP, in units of [0, 1]."""
    std: Tensor
    batch_size: int = 256
    noise: float = 0.12

    def __call__(self, clip: Any, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar; all randomness comes from `generator`."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        pixels = to_uint8(roughened(self.data.images[index], generator, self.noise)).float() / 255
        pixels = (pixels - self.mean.reshape(3, 1, 1)) / self.std.reshape(3, 1, 1)
        device = next(clip.parameters()).device
        ids = self.input_ids[index].to(device)
        scores = clip(input_ids=ids, pixel_values=pixels.to(device)).logits_per_text
        equal = (ids.unsqueeze(0) == ids.unsqueeze(1)).all(dim=2).float()
        target = equal / equal.sum(dim=1, keepdim=True)
        return (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2
