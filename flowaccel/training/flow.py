"""Training a class-conditional flow network from scratch (SiT, arXiv 2401.08740, section 10.6 of its recipe)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowaccel.data import ImageSet
from flowaccel.samplers.paths import LINEAR, Path, flow_loss


@dataclass(frozen=True, kw_only=True)
class FlowObjective:
    """`objective(network, generator)` -> the mean flow-matching loss of one freshly drawn batch."""

    data: ImageSet
    null_label: int
    batch_size: int = 128
    label_drop: float = 0.1
    """Probability of training on the null label instead, for classifier-free guidance."""
    path: Path = LINEAR
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __call__(self, network: nn.Module, generator: torch.Generator) -> Tensor:
        """Draw data, noise, times in [0, 1) and label drops from `generator`; a scalar."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        images, labels = self.data.images[index], self.data.labels[index]
        if self.augment is not None:
            images = self.augment(images, generator)
        noise = torch.randn(images.shape, generator=generator)
        t = torch.rand(self.batch_size, generator=generator)
        dropped = torch.rand(self.batch_size, generator=generator) < self.label_drop
        labels = torch.where(dropped, self.null_label, labels)
        device = next(network.parameters()).device
        images, noise, t, labels = (value.to(device) for value in (images, noise, t, labels))
        output = network(self.path.interpolate(images, noise, t), t, labels, return_dict=False)[0]
        return flow_loss(self.path, output.float(), images, noise, t).mean()


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
