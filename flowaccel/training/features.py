"""Training the small classifiers whose features serve the evaluator on embedded data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowaccel.data import ImageSet
from flowaccel.training.flow import shift_augment


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded as the evaluator rounds samples."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class ClassifierObjective:
    """`objective(classifier, generator)` -> the mean cross-entropy of one freshly drawn, jittered batch."""

    data: ImageSet
    batch_size: int = 100
    noise: float = 0.15
    """Standard deviation of the pixel noise added, in units of [-1, 1]."""

    def __call__(self, classifier: nn.Module, generator: torch.Generator) -> Tensor:
        """A scalar; all randomness comes from `generator`."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        images = shift_augment(self.data.images[index], generator, probability=0.7, reach=0.8)
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        device = next(classifier.parameters()).device
        features = classifier(to_uint8(images).to(device))
        return nn.functional.cross_entropy(classifier.logits(features), self.data.labels[index].to(device))  # type: ignore[operator]
