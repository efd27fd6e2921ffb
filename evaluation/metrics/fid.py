"""Frechet distance to the reference (FID with Inception features), and its extrapolation to infinitely many images."""

from __future__ import annotations

import torch
from torch import Tensor

from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance, frechet_infinity
from flowaccel.evaluation.metrics.metric import Case, Estimate, Metric


def _fid(case: Case) -> Estimate:
    features = case.row.features.to(torch.float64)
    replicates = [
        frechet_distance(Moments.of(features[chosen]), case.reference.moments) for chosen in case.indices(len(features))
    ]
    value = frechet_distance(Moments.of(features), case.reference.moments)
    return Estimate(value=value, replicates=torch.tensor(replicates, dtype=torch.float64))


def _fid_inf(case: Case) -> Estimate:
    features = case.row.features.to(torch.float64)

    def distance(samples: Tensor) -> float:
        return frechet_infinity(samples, case.reference.moments, seed=case.seed)

    replicates = [distance(features[chosen]) for chosen in case.indices(len(features))]
    return Estimate(value=distance(features), replicates=torch.tensor(replicates, dtype=torch.float64))


METRICS = {
    "fid": Metric(
        title="Frechet distance, {features}",
        higher_is_better=False,
        estimate=_fid,
        resamples_wide=20,
        covariance=True,
    ),
    "fid_inf": Metric(
        title="Frechet distance extrapolated to infinite n, {features}",
        higher_is_better=False,
        estimate=_fid_inf,
        resamples=50,
        resamples_wide=10,
        covariance=True,
    ),
}
