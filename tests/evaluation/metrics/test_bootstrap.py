"""The bootstrap is seeded, gives the known standard error, and its intervals cover."""

from __future__ import annotations

import pytest
import torch

from flowaccel.evaluation.metrics.bootstrap import ci95, resample_counts, resample_indices, stderr
from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance


def test_indices_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = resample_indices(50, 10, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, resample_indices(50, 10, seed=3))
    assert not torch.equal(first, resample_indices(50, 10, seed=4))
    assert first.shape == (10, 50)
    assert sorted(set(first.flatten().tolist())) == list(range(50))


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    resample_indices(5, 5, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_counts_say_how_often_each_sample_was_drawn() -> None:
    indices = torch.tensor([[0, 0, 2], [1, 2, 0]])
    assert resample_counts(indices).tolist() == [[2, 0, 1], [1, 1, 1]]


def test_error_of_a_mean_is_the_known_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = stderr(values[resample_indices(400, 2000, seed=1)].mean(dim=1))
    assert found == pytest.approx(float(values.std()) / 20, rel=0.1)


def test_interval_of_a_mean_covers_in_95_of_100() -> None:
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for run in range(300):
        values = torch.rand(60, generator=generator, dtype=torch.float64)
        interval = ci95(float(values.mean()), stderr(values[resample_indices(60, 100, seed=run)].mean(dim=1)))
        assert interval is not None
        covered += interval[0] <= 0.5 <= interval[1]
    assert 0.90 <= covered / 300 <= 0.985


def test_interval_of_a_frechet_distance_covers_where_percentiles_do_not() -> None:
    width, count, runs = 8, 60, 25
    generator = torch.Generator().manual_seed(3)
    sets = [torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(8 * runs)]
    reference = Moments.from_mean_covariance(torch.zeros(width), torch.eye(width))
    expected = sum(frechet_distance(Moments.of(features), reference) for features in sets) / len(sets)
    covered = percentile = 0
    for features in sets[:runs]:
        chosen = resample_indices(count, 40, seed=0)
        replicates = torch.tensor([frechet_distance(Moments.of(features[ids]), reference) for ids in chosen])
        interval = ci95(frechet_distance(Moments.of(features), reference), stderr(replicates))
        assert interval is not None
        covered += interval[0] <= expected <= interval[1]
        percentile += bool(replicates.quantile(0.025) <= expected <= replicates.quantile(0.975))
    assert covered >= 0.9 * runs
    assert percentile <= 0.4 * runs


def test_undefined_replicates_are_left_out() -> None:
    assert stderr(torch.tensor([1.0, float("nan"), 3.0])) == pytest.approx(2**0.5)
    assert stderr(torch.tensor([1.0, float("nan")])) is None


def test_interval_is_symmetric_and_undefined_without_value_or_error() -> None:
    assert ci95(2.0, 0.5) == pytest.approx([1.02, 2.98])
    assert ci95(None, 0.5) is None
    assert ci95(2.0, None) is None


@pytest.mark.parametrize(("n", "resamples", "message"), [(1, 10, "n must be .* got 1"), (5, 1, "resamples .* got 1")])
def test_wrong_use_is_explained(n: int, resamples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resample_indices(n, resamples, seed=0)
