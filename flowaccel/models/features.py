"""A small digit classifier whose last hidden layer serves as features for Frechet distances on 8x8 digits."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class DigitsClassifier(ModelMixin, ConfigMixin):
    """Convolutional classifier of small grey images, and the feature network made of all but its last layer.

    Called on uint8 images it returns features, so it can be handed to torchmetrics as `feature=`.

    Args:
        num_features: width of the last hidden layer; small, so that a few hundred samples give a full-rank covariance.
        num_classes: number of classes.
        channels: width of the convolutions.
    """

    @register_to_config
    def __init__(self, num_features: int = 32, num_classes: int = 10, channels: int = 32) -> None:
        super().__init__()
        self.num_features = num_features
        self.trunk = nn.Sequential(
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
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 1, 8, 8) -> features (N, num_features), float32, in (-1, 1)."""
        return self.trunk(self.preprocess(images))

    def logits(self, features: Tensor) -> Tensor:
        """Features (N, num_features) -> class logits (N, num_classes)."""
        return self.head(features)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 in 0 .. 255 -> this network's dtype in [-1, 1].

        Raises:
            ValueError: images that are not uint8 or not (N, 1, 8, 8).
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (1, 8, 8):
            raise ValueError(f"images must be uint8 of shape (N, 1, 8, 8), got {images.dtype} {tuple(images.shape)}")
        return images.to(self.dtype) / 127.5 - 1
