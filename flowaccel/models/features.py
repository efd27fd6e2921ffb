"""Small classifiers whose last hidden layer provides features for Frechet distances on the embedded data sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from flowaccel.compat import register_components

register_components()


class FeatureClassifier(ModelMixin, ConfigMixin):
    """Abstract base class: a convolutional trunk on uint8 images that outputs features, and classifier heads on these.

    Called on uint8 images it returns features, so it can be handed to torchmetrics as `feature=`.
    """

    image_shape: ClassVar[tuple[int, int, int]]
    """Shape of an image, (C, H, W)."""
    num_features: int
    trunk: nn.Module

    @abstractmethod
    def __init__(self) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, *image_shape) to features (N, num_features), float32, in (-1, 1)."""
        return self.trunk(self.preprocess(images))

    def preprocess(self, images: Tensor) -> Tensor:
        """Convert uint8 images in 0 .. 255 to this network's dtype in [-1, 1].

        Raises:
            ValueError: images that are not uint8 or of another shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be uint8 of shape (N, {wanted}), got {images.dtype} {tuple(images.shape)}")
        return images.to(self.dtype) / 127.5 - 1


class DigitsClassifier(FeatureClassifier):
    """Classifier of 8x8 grey digits.

    Args:
        num_features: width of the last hidden layer; small, so that a few hundred samples give a full-rank covariance.
        num_classes: number of classes.
        channels: width of the convolutions.
    """

    image_shape = (1, 8, 8)

    @register_to_config
    def __init__(self, num_features: int = 32, num_classes: int = 10, channels: int = 32) -> None:
        super().__init__()
        self.num_features = num_features
        self.trunk: nn.Sequential = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * 4, num_features),
            nn.Tanh(),
        )
        self.head: nn.Linear = nn.Linear(num_features, num_classes)

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, num_features) to class logits (N, num_classes)."""
        return self.head(features)


class ShapesClassifier(FeatureClassifier):
    """Classifier of the attributes of 3x32x32 pictures of `flowaccel.data.shapes`.

    Args:
        attribute_sizes: number of values of each attribute, in the order of `flowaccel.data.shapes.ATTRIBUTES`.
        num_features: width of the last hidden layer.
        channels: width of the first convolution.
    """

    image_shape = (3, 32, 32)

    @register_to_config
    def __init__(self, attribute_sizes: Sequence[int], num_features: int = 64, channels: int = 32) -> None:
        super().__init__()
        self.num_features = num_features
        self.trunk: nn.Sequential = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(2 * channels, 3 * channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(3 * channels, channels, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),  # not pooled: positions are attributes
            nn.Linear(channels * 16, num_features),
            nn.Tanh(),
        )
        self.heads: nn.ModuleList = nn.ModuleList(nn.Linear(num_features, size) for size in attribute_sizes)

    def attribute_logits(self, features: Tensor) -> list[Tensor]:
        """Map features (N, num_features) to the logits of each attribute (N, its number of values)."""
        return [head(features) for head in self.heads]

    def attributes(self, features: Tensor) -> Tensor:
        """Map features (N, num_features) to the index of the likeliest value of every attribute, (N, A) int64."""
        return torch.stack([logits.argmax(1) for logits in self.attribute_logits(features)], dim=1)
