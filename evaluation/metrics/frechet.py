"""Fréchet distance between two sets of features, from float64 moments that merge exactly.

Shapes: `N` samples, `d` features. Everything is float64: float32 moments are wrong by about 1e-5 even on equal sets.

The Fréchet distance (Heusel et al., arXiv 1706.08500) is `|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`. With
`S = F F^T` the last trace is the nuclear norm of `F1^T F2`, so no squared matrix is ever rooted: the result is real,
never NaN, and exact to rounding when there are fewer samples than features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SMALLEST_SUBSET = 5000  # below this, the 1/n law of the distance's bias has visible higher orders (arXiv 1911.07023)


_ROUNDING = 1e-4  # of the largest entry; statistics kept in float32 stay far below it


def check_features(features: Tensor, name: str = "features") -> Tensor:
    """Return `features` as float64 `(N, d)`; `ValueError` unless it is two-dimensional, not empty and finite."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} must have shape (samples, features) with at least one of each, got "
            f"{tuple(features.shape)}; flatten or pool them to one vector per image"
        )
    features = features.to(torch.float64)
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite().all(dim=1)).sum())
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in {bad} of {len(features)} samples; look at "
            "those images, or compute the features in float32 instead of half precision"
        )
    return features


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Count, mean and scatter of a set of feature vectors: a monoid, so shards and resumed runs combine by `sum`.

    Raises `ValueError` when the shapes do not fit or an entry is not finite.
    """

    count: int | None
    """Number of samples; None for imported statistics that do not say (they can be compared, not merged)."""
    mean: Tensor
    """`(d,)` float64."""
    scatter: Tensor
    """`(d, d)` float64: sum of the outer products of deviations from the mean. The covariance where count is None."""

    def __post_init__(self) -> None:
        width = len(self.mean) if self.mean.ndim == 1 else -1
        if tuple(self.scatter.shape) != (width, width):
            raise ValueError(
                f"mean must have shape (d,) and scatter (d, d), got mean {tuple(self.mean.shape)} and "
                f"scatter {tuple(self.scatter.shape)}; were the two swapped?"
            )
        if not bool(self.mean.isfinite().all() and self.scatter.isfinite().all()):
            raise ValueError("mean and scatter must be finite, got NaN or infinity; make the statistics again")

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Compute the moments of `features` `(N, d)`, N >= 1, of any float dtype; `ValueError` if not finite."""
        features = check_features(features)
        mean = features.mean(dim=0)
        centred = features - mean  # two passes: E[x x^T] - m m^T cancels when the mean is large
        return cls(count=len(features), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def from_mean_covariance(cls, mean: Tensor, covariance: Tensor, count: int | None = None) -> Moments:
        """Create moments from a mean and a covariance, such as published statistics.

        `mean` is `(d,)`, `covariance` is unbiased, `(d, d)`, of `count >= 2` samples, if known.
        """
        if count is not None and count < 2:
            raise ValueError(f"count must be at least 2 (a covariance needs two samples) or None, got {count}")
        mean = torch.as_tensor(mean, dtype=torch.float64)
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        return cls(count=count, mean=mean, scatter=covariance * (1 if count is None else count - 1))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the union (Chan, Golub & LeVeque 1979)."""
        if not isinstance(other, Moments):
            return NotImplemented
        if self.count is None or other.count is None:
            raise ValueError("Moments with count=None cannot be merged: their weights are unknown; give count=")
        _check_widths(self, other)
        count, delta = self.count + other.count, other.mean - self.mean
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        mean = self.mean + delta * (other.count / count)
        return Moments(count=count, mean=mean, scatter=self.scatter + other.scatter + between)

    def __radd__(self, other: object) -> Moments:
        return self if other == 0 else NotImplemented  # sum() starts from 0

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divisor n - 1), `(d, d)`; `ValueError` for fewer than two samples."""
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}; add samples")
        return self.scatter / (self.count - 1)

    @cached_property
    def factor(self) -> Tensor:
        """`F` `(d, d)` with `F F^T` = covariance; cached, since one reference is compared with many rows.

        `ValueError` where the covariance is none: not symmetric, or with eigenvalues further below 0 than rounding
        brings them.
        """
        covariance = self.covariance
        scale = float(covariance.abs().max())
        if float((covariance - covariance.T).abs().max()) > _ROUNDING * scale:
            raise ValueError("the covariance is not symmetric; is it one, and not a table of something else?")
        values, vectors = torch.linalg.eigh(covariance)
        least = float(values.min())
        if least < -_ROUNDING * scale:
            raise ValueError(
                f"the covariance has the negative eigenvalue {least:.3g}, beside entries up to {scale:.3g}: no set of "
                "samples has such a one; make the statistics again"
            )
        factor: Tensor = vectors * values.clamp_min(0).sqrt()
        return factor


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet distance of two Gaussians with these moments (arXiv 1706.08500).

    It is >= 0 up to rounding.

    Biased upwards by about 1/n: compare only values of equal `n`. `ValueError` where the widths differ or a side has
    fewer than two samples.
    """
    _check_widths(a, b)
    nuclear = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * nuclear)


def frechet_infinity(features: Tensor, reference: Moments, *, seed: int, points: int = 15) -> float:
    """Extrapolate the Fréchet distance to infinitely many samples, with a line in 1/n (arXiv 1911.07023).

    The distance of `points` seeded random subsets of `features` `(N, d)`, their sizes evenly spaced from
    `max(N/10, min(5000, N/2))` to N, is extrapolated to 1/n = 0 by least squares. For N < 10000 a start at N/2 has less
    bias and less spread than one at N/10, where n comes close to d. Much less biased than the distance itself, and it
    may be below 0; the bias from the reference's own size stays. `ValueError` for fewer than 4 samples or 2 points.
    """
    features = check_features(features)
    sizes = _subset_sizes(len(features), points)
    generator = torch.Generator().manual_seed(seed)
    subsets = (features[torch.randperm(len(features), generator=generator)[:size]] for size in sizes)
    distances = [frechet_distance(Moments.of(subset), reference) for subset in subsets]
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    distance = torch.tensor(distances, dtype=torch.float64)
    deviation = inverse - inverse.mean()
    slope = (deviation * (distance - distance.mean())).sum() / deviation.square().sum()
    return float(distance.mean() - slope * inverse.mean())


def warn_if_rank_deficient(count: int, width: int) -> None:
    """Issue a `UserWarning` where `count` samples are too few for a `width` x `width` covariance (< 2 x width)."""
    if count < 2 * width:
        rank = "rank-deficient" if count <= width else "nearly rank-deficient"
        warnings.warn(
            f"Frechet distance of {count} samples in {width} features is {rank} and mostly bias; take at "
            f"least {2 * width} samples, or prefer kid",
            UserWarning,
            stacklevel=2,
        )


def _subset_sizes(count: int, points: int) -> list[int]:
    if points < 2 or count < 4:
        raise ValueError(
            f"extrapolation needs at least 4 samples and points >= 2, got {count} samples and "
            f"points={points}; add samples, or ask for fid"
        )
    smallest = max(count // 10, min(_SMALLEST_SUBSET, count // 2))
    return sorted(set(torch.linspace(smallest, count, points, dtype=torch.float64).round().long().tolist()))


def _check_widths(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"both sides must have equally many features, got {len(a.mean)} and {len(b.mean)}; "
            "were they made by the same feature network?"
        )
