"""Handwritten digits: 1797 real 8x8 grey images with 17 levels, shipped inside scikit-learn (UCI optdigits, CC BY 4.0).

Alpaydin and Kaynak (1998), doi 10.24432/C50P49; scikit-learn ships the test half of the collection, 13 writers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

# Disjoint by image (the writers overlap: scikit-learn does not record them).
SPLITS = {"generator": slice(0, 900), "features": slice(900, 1300), "reference": slice(1300, 1797)}
NUM_CLASSES = 10
IMAGE_SIZE = 8
_LEVELS = 16
_SHUFFLE_SEED = 2409


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images with class labels."""

    images: Tensor
    """Images (N, C, H, W), float32 in [-1, 1]."""
    labels: Tensor
    """Class ids (N,), int64."""

    def __len__(self) -> int:
        return len(self.labels)


def digits(split: str) -> ImageSet:
    """Load one split of the digits: `generator` (900 images), `features` (400) or `reference` (497).

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    bunch = load_digits()
    chosen = np.random.default_rng(_SHUFFLE_SEED).permutation(len(bunch.target))[SPLITS[split]]
    images = torch.tensor(bunch.images[chosen], dtype=torch.float32) / (_LEVELS / 2) - 1
    return ImageSet(images=images.unsqueeze(1), labels=torch.tensor(bunch.target[chosen], dtype=torch.int64))
