"""Improved precision and recall by k-nearest-neighbour manifolds (Kynkäänniemi et al., arXiv 1904.06991).

A set's manifold is the union of balls around its samples, each reaching to the sample's k-th nearest neighbour.
Precision is the share of generated samples inside the reference manifold (fidelity), recall the share of reference
samples inside the generated manifold (diversity). `N` generated, `M` reference samples, `d` features; distances are
computed in blocks of rows. Both numbers depend on N and M: compare only equal sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowaccel.evaluation.metrics.frechet import check_features
from flowaccel.evaluation.metrics.metric import Case, Estimate, Metric, mean

_NEIGHBOURS = 3  # arXiv 1904.06991

_BLOCK_ENTRIES = 2**23  # distances in one block: 64 MiB in float64


def precision_indicators(generated: Tensor, reference: Tensor, k: int = 3) -> Tensor:
    """Return `(N,)` bool, whether each generated sample `(N, d)` is inside the manifold of `reference` `(M, d)`.

    The mean is the precision. `ValueError` unless 1 <= k < M, the widths agree and all features are finite.
    """
    return _inside(generated, reference, k, names=("generated", "reference"))


def recall_indicators(generated: Tensor, reference: Tensor, k: int = 3) -> Tensor:
    """Return `(M,)` bool, whether each reference sample `(M, d)` is inside the manifold of `generated` `(N, d)`.

    The mean is the recall. `ValueError` unless 1 <= k < N, the widths agree and all features are finite.
    """
    return _inside(reference, generated, k, names=("reference", "generated"))


def _inside(points: Tensor, manifold: Tensor, k: int, names: tuple[str, str]) -> Tensor:
    points, manifold = check_features(points, names[0]), check_features(manifold, names[1])
    if points.shape[1] != manifold.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have equally many features, got {points.shape[1]} and "
            f"{manifold.shape[1]}; were they made by the same feature network?"
        )
    if not 1 <= k < len(manifold):
        raise ValueError(
            f"k must be in [1, {len(manifold) - 1}] for {len(manifold)} {names[1]} samples, got {k}; "
            "add samples, or lower k"
        )
    centre = manifold.mean(dim=0)  # distances come from |x|^2 + |y|^2 - 2 x.y, which cancels far from the origin
    points, manifold = points - centre, manifold - centre
    # k + 1, since the nearest neighbour of a sample within its own set is itself
    radius = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _squared_distances(manifold, manifold)])
    return torch.cat([(d <= radius).any(dim=1) for d in _squared_distances(points, manifold)])


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows of the `(len(x), len(y))` squared Euclidean distances."""
    step = max(1, _BLOCK_ENTRIES // len(y))
    lengths = y.square().sum(dim=1)
    for rows in torch.split(x, step):
        yield (rows.square().sum(dim=1, keepdim=True) + lengths - 2 * rows @ y.T).clamp_min_(0)


def _precision(case: Case) -> Estimate:
    assert case.reference.features is not None
    return mean(precision_indicators(case.row.features, case.reference.features, _NEIGHBOURS), case)


def _recall(case: Case) -> Estimate:
    """Compute recall; the M reference samples are resampled, since recall is a mean over them.

    The generated set is held fixed. A resampled one would have fewer distinct samples and so a smaller manifold.
    """
    assert case.reference.features is not None
    return mean(recall_indicators(case.row.features, case.reference.features, _NEIGHBOURS), case)


METRICS = {
    "precision": Metric(
        title=f"Precision (k={_NEIGHBOURS}), {{features}}",
        higher_is_better=True,
        estimate=_precision,
        needs=("reference_features",),
    ),
    "recall": Metric(
        title=f"Recall (k={_NEIGHBOURS}), {{features}}",
        higher_is_better=True,
        estimate=_recall,
        needs=("reference_features",),
    ),
}
