"""Detection of the conditional output among a network's two outputs, from the guided output."""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 0.02
"""Part of the guided output that may not be a linear combination of the two outputs; half precision rounds."""


def first_is_conditional(first: Tensor, second: Tensor, guided: Tensor) -> bool | None:
    """Return whether `first` is the conditional output, where the pipeline's guidance scale is above 1.

    None if that cannot be determined: guidance is off, the outputs are alike, or the pipeline combines them otherwise.

    Guidance moves away from the unconditional output: guided = a * cond + b * uncond, where b and a + b have opposite
    signs. That holds for `u + s (c - u)`, also if it is rescaled, projected, or negated.

    Args:
        first: (images, ...) half of the network's output.
        second: (images, ...) the other half.
        guided: (images, ...) the output that the scheduler received.
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
