"""Which of a network's two outputs is the conditional one, told from what guidance made of them."""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 0.02
"""Part of the guided output that may be something else than a mixture of the two; half precision rounds."""


def first_is_conditional(first: Tensor, second: Tensor, guided: Tensor) -> bool | None:
    """Whether `first` is the conditional output, where the pipeline guides by a scale above 1; None where that cannot
    be told: guidance off, outputs alike, or a pipeline that does something else with them.

    Guidance moves away from the unconditional output: guided = a * cond + b * uncond with b against a + b. That holds
    of `u + s (c - u)`, of the same rescaled, projected, or with its sign turned.

    Args:
        first: (images, ...) half of the network's output.
        second: (images, ...) the other half.
        guided: (images, ...) what the scheduler was handed.
    """
    parts = [first, second]
    if guided.dim() > 1 and first.dim() == guided.dim() and first.shape[1] == 2 * guided.shape[1]:
        parts = [part.chunk(2, dim=1)[0] for part in parts]  # without the variance, which is not guided
    if any(part.shape != guided.shape for part in parts):
        return None
    pair = torch.stack([part.flatten(1).double() for part in parts], dim=2)  # (images, n, 2)
    target = guided.flatten(1).double()
    gram = pair.mT @ pair
    if not bool((torch.linalg.det(gram) > 1e-9 * gram.diagonal(dim1=1, dim2=2).prod(dim=1)).all()):  # alike, or NaN
        return None
    weights = torch.linalg.solve(gram, pair.mT @ target[..., None])[..., 0]  # (images, 2)
    misfit = ((pair @ weights[..., None])[..., 0] - target).norm(dim=1)
    if not bool((misfit <= CLOSE * target.norm(dim=1)).all()):
        return None
    against = weights * weights.sum(dim=1, keepdim=True) < 0
    if bool((against == torch.tensor([False, True], device=against.device)).all()):
        return True
    return False if bool((against == torch.tensor([True, False], device=against.device)).all()) else None
