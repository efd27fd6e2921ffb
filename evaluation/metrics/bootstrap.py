"""Seeded bootstrap over sample ids: standard errors and normal intervals.

Two runs that share their ids are resampled **jointly**: the same `resample_indices` for both, then the spread of the
difference. What an id contributes to both runs cancels, so the difference is known many times better than either value.

Intervals are always `value +- 1.96 * stderr`. The percentile interval is never used: resampling with replacement adds
to a Fréchet distance a bias as large as its noise, so that interval need not even hold the value itself.
`n` samples, `R` resamples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resample_indices(n: int, resamples: int, seed: int) -> Tensor:
    """Draw `(resamples, n)` int64 positions in [0, n) with replacement, reproducibly on every machine.

    `ValueError` unless n >= 2 and resamples >= 2: fewer have no spread.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2: one sample has no spread, got {n}; add samples")
    if resamples < 2:
        raise ValueError(
            f"resamples must be at least 2: a standard error is their spread, got {resamples}; 200 is usual"
        )
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


def resample_counts(indices: Tensor) -> Tensor:
    """Count each sample in each resample: `(R, n)` int64 from `indices` `(R, n)`; each row sums to n."""
    return torch.zeros_like(indices).scatter_add_(1, indices, torch.ones_like(indices))


def stderr(replicates: Tensor) -> float | None:
    """Return the standard deviation (divisor R - 1) of the finite `replicates` `(R,)`; None if fewer than two are.

    A replicate is NaN where its resample leaves the statistic undefined.
    """
    finite = replicates[replicates.isfinite()]
    return None if len(finite) < 2 else float(finite.std())


def ci95(value: float | None, stderr: float | None) -> list[float] | None:
    """Return `[value - 1.96 stderr, value + 1.96 stderr]`, or None where either is None.

    It is a list, since JSON has no tuples.
    """
    return None if value is None or stderr is None else [value - 1.96 * stderr, value + 1.96 * stderr]
