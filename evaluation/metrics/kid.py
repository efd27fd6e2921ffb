"""Kernel distance (KID): unbiased squared MMD with a cubic polynomial kernel (Bińkowski et al., arXiv 1801.01401).

Unbiased at every number of samples, so values of different N may be compared, unlike the Fréchet distance.
`N` generated and `M` reference samples, `d` features, `R` resamples. Kernels are computed in blocks of rows, so memory
grows with N + M, time with N^2 + N M + M^2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowaccel.evaluation.metrics.bootstrap import resample_counts
from flowaccel.evaluation.metrics.frechet import check_features
from flowaccel.evaluation.metrics.metric import Case, Estimate, Metric

_BLOCK_ENTRIES = 2**23  # kernel entries in one block: 64 MiB in float64


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Return the unbiased squared MMD of `features` `(N, d)` and `reference` `(M, d)`; may be below 0.

    The kernel is `(x.y / d + 1)^3`. `ValueError` for fewer than 2 samples, different widths or non-finite features.
    """
    ones = torch.ones(1, len(features), dtype=torch.int64)
    return float(kernel_distance_resampled(features, reference, ones)[0])


def kernel_distance_resampled(features: Tensor, reference: Tensor, counts: Tensor) -> Tensor:
    """Return the squared MMD `(R,)` of resampled sets in which sample i occurs `counts[r, i]` times.

    `counts` is `(R, N)`.

    All resamples share one pass over the kernel. The mean over pairs leaves out a sample's pairs with itself and its
    own copies: a copy is no independent draw, and its `k(x, x)` would bring back the bias that this estimator lacks.
    The reference is held fixed. NaN where a resample has only one distinct sample. `ValueError` as `kernel_distance`.
    """
    features, reference = check_features(features), check_features(reference, "reference")
    _check_sizes(features, reference)
    if counts.ndim != 2 or counts.shape[1] != len(features):
        raise ValueError(f"counts must have shape (resamples, {len(features)}), got {tuple(counts.shape)}")
    weights = counts.to(torch.float64)
    total = weights.sum(dim=1)
    within = _weighted_pairs(features, weights) / (total.square() - weights.square().sum(dim=1))
    across = weights @ _row_means(features, reference) / total
    unit = torch.ones(1, len(reference), dtype=torch.float64)
    reference_within = _weighted_pairs(reference, unit) / (len(reference) * (len(reference) - 1))
    return within + reference_within - 2 * across


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ENTRIES // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _weighted_pairs(x: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over i != j of `w_i w_j k(x_i, x_j)` for each row of `weights` `(R, N)`: `(R,)`."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for rows in _blocks(len(x), len(x)):
        total += ((weights[:, rows] @ _kernel(x[rows], x)) * weights).sum(dim=1)
    diagonal = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
    return total - weights.square() @ diagonal


def _row_means(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean over y of `k(x_i, y)` for each i: `(N,)`."""
    return torch.cat([_kernel(x[rows], y).mean(dim=1) for rows in _blocks(len(x), len(y))])


def _check_sizes(features: Tensor, reference: Tensor) -> None:
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features and reference must have equally many features, got {features.shape[1]} and "
            f"{reference.shape[1]}; were they made by the same feature network?"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(
            f"the kernel distance needs at least 2 samples on each side, got {len(features)} features "
            f"and {len(reference)} reference samples"
        )


def _kid(case: Case) -> Estimate:
    features, reference = case.row.features, case.reference.features
    assert reference is not None  # declared in `needs`
    counts = resample_counts(case.indices(len(features)))
    original = torch.ones_like(counts[:1])  # along with the resamples: the kernel is then computed once
    distances = kernel_distance_resampled(features, reference, torch.cat([original, counts]))
    return Estimate(value=float(distances[0]), replicates=distances[1:])


METRICS = {
    "kid": Metric(
        title="Kernel distance (unbiased cubic MMD^2), {features}",
        higher_is_better=False,
        estimate=_kid,
        needs=("reference_features",),
    ),
}
