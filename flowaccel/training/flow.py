"""Training of class-conditional flow networks from scratch (SiT, arXiv 2401.08740, section 10.6 of its recipe)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowaccel.samplers.paths import LINEAR, ProbabilityPath, flow_loss
from flowaccel.training.labelled import LabelledBatch, LabelledObjective


@dataclass(frozen=True, kw_only=True)
class FlowObjective(LabelledObjective):
    """Flow-matching loss at times drawn uniformly from [0, 1)."""

    path: ProbabilityPath = LINEAR

    def times(self, generator: torch.Generator) -> Tensor:
        """Draw times (B,) in [0, 1)."""
        return torch.rand(self.batch_size, generator=generator)

    def arguments(self, batch: LabelledBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return images on the path, times and labels."""
        return self.path.interpolate(batch.images, batch.noise, batch.t), batch.t, batch.labels

    def loss(self, output: Tensor, batch: LabelledBatch) -> Tensor:
        """Return the mean squared error of the velocity."""
        return flow_loss(self.path, output, batch.images, batch.noise, batch.t).mean()


def shift_augment(
    images: Tensor, generator: torch.Generator, *, probability: float = 0.15, reach: float = 0.5
) -> Tensor:
    """Move a few images by up to `reach` pixels, bilinearly: (N, C, H, W) -> the same shape.

    The default touches 15% of the draws, enough to slow down memorising of a few hundred images.
    """
    count = len(images)
    moved = torch.rand(count, generator=generator) < probability
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * reach * moved.unsqueeze(1)
    height, width = images.shape[-2:]
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, 0, 2], theta[:, 1, 2] = 2 * shift[:, 0] / width, 2 * shift[:, 1] / height
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    shifted = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(moved.reshape(-1, 1, 1, 1), shifted, images)
