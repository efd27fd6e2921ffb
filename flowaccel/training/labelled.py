"""Base class of the objectives of class-conditional networks, which draws the data of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowaccel.data import ImageSet


@dataclass(frozen=True)
class LabelledBatch:
    """Training data of one step."""

    images: Tensor
    """(B, C, H, W)."""
    noise: Tensor
    """(B, C, H, W), standard normal."""
    t: Tensor
    """(B,), the times of the objective."""
    labels: Tensor
    """(B,) int64."""


@dataclass(frozen=True, kw_only=True)
class LabelledObjective(ABC):
    """Training objective: `objective(network, generator)` -> the mean loss of one freshly drawn batch, a scalar.

    Raises:
        ValueError: no rows, or a probability out of range.
    """

    data: ImageSet
    null_label: int
    batch_size: int = 128
    label_drop: float = 0.1
    """Probability of training on the null label instead, for classifier-free guidance."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop must lie in [0, 1], got {self.label_drop}")

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> LabelledBatch:
        """Draw data, noise, times and label drops from `generator`, a CPU generator."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        images, labels = self.data.images[index], self.data.labels[index]
        if self.augment is not None:
            images = self.augment(images, generator)
        noise = torch.randn(images.shape, generator=generator)
        t = self.times(generator)
        dropped = torch.rand(self.batch_size, generator=generator) < self.label_drop
        labels = torch.where(dropped, self.null_label, labels)
        return LabelledBatch(*(value.to(device) for value in (images, noise, t, labels)))

    def __call__(self, network: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar."""
        batch = self.draw(generator, next(network.parameters()).device)
        return self.loss(network(*self.arguments(batch), return_dict=False)[0].float(), batch)

    @abstractmethod
    def times(self, generator: torch.Generator) -> Tensor:
        """Draw times (B,)."""

    @abstractmethod
    def arguments(self, batch: LabelledBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the network's arguments: noised images, times and labels."""

    @abstractmethod
    def loss(self, output: Tensor, batch: LabelledBatch) -> Tensor:
        """Return the mean loss of the network's output, a scalar."""
