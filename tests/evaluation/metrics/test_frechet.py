"""Frechet distance against closed forms, scipy and torchmetrics; moments that merge exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from flowaccel.evaluation.metrics import frechet as moments
from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance, frechet_infinity, warn_if_rank_deficient


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_moments(width: int, seed: int) -> Moments:
    root = normal(width, width, seed)
    return Moments.from_mean_covariance(normal(1, width, seed + 1)[0], root @ root.T + torch.eye(width))


def correlated(count: int, width: int, seed: int) -> Tensor:
    """Samples whose covariance is far from diagonal, the same one for every seed."""
    return normal(count, width, seed) @ (torch.eye(width) + 0.4 * normal(width, width, 1000) / width**0.5)


@pytest.mark.parametrize("width", [2, 7, 32])
def test_equals_the_matrix_square_root_of_scipy(width: int) -> None:
    a, b = random_moments(width, 1), random_moments(width, 2)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * numpy.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_equals_the_closed_form_of_diagonal_gaussians() -> None:
    mean, other = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, 3.0])
    sd, other_sd = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([3.0, 0.1, 2.0])
    a = Moments.from_mean_covariance(mean, torch.diag(sd**2))
    b = Moments.from_mean_covariance(other, torch.diag(other_sd**2))
    expected = float((mean - other).square().sum() + (sd - other_sd).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_equals_torchmetrics_with_the_same_network() -> None:
    class Pixels(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).float() / 255

    def images(seed: int, high: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, high, (200, 3, 2, 2), generator=generator, dtype=torch.uint8)

    network, real, fake = Pixels(), images(0, 256), images(1, 180)
    oracle = FrechetInceptionDistance(feature=network, input_img_size=(3, 2, 2))
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    ours = frechet_distance(Moments.of(network(fake)), Moments.of(network(real)))
    assert ours == pytest.approx(float(oracle.compute()), rel=1e-3)


def test_is_symmetric() -> None:
    a, b = random_moments(9, 3), random_moments(9, 4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize(("count", "width"), [(10, 64), (2, 16), (200, 16)])
def test_is_zero_on_itself_also_with_fewer_samples_than_features(count: int, width: int) -> None:
    whole = Moments.of(normal(count, width, 5))
    assert abs(frechet_distance(whole, whole)) < 1e-9


def test_a_shift_of_a_rank_deficient_set_is_measured_exactly() -> None:
    features = normal(10, 64, 6)
    assert frechet_distance(Moments.of(features), Moments.of(features + 1e-3)) == pytest.approx(64e-6, rel=1e-6)


def test_does_not_change_under_a_common_rotation() -> None:
    rotation = torch.linalg.qr(normal(8, 8, 7)).Q
    a, b = correlated(100, 8, 8), 2 * correlated(100, 8, 9) + 1
    plain = frechet_distance(Moments.of(a), Moments.of(b))
    assert frechet_distance(Moments.of(a @ rotation), Moments.of(b @ rotation)) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (150,), (17, 100, 101, 290)])
def test_merged_parts_equal_the_whole_far_from_the_origin(cuts: tuple[int, ...]) -> None:
    features = normal(300, 6, 10)
    shifted = features + 1e8
    parts = [Moments.of(part) for part in torch.tensor_split(shifted, cuts)]
    merged = sum(parts)
    assert isinstance(merged, Moments)
    assert merged.count == 300
    torch.testing.assert_close(merged.mean, shifted.mean(dim=0), rtol=0, atol=1e-7)
    torch.testing.assert_close(merged.covariance, torch.cov(features.T), rtol=0, atol=1e-6)


def test_covariance_is_the_unbiased_one() -> None:
    features = normal(20, 5, 11)
    torch.testing.assert_close(Moments.of(features.float()).covariance, torch.cov(features.T), rtol=1e-5, atol=1e-6)


def test_imported_statistics_with_a_count_merge_like_samples() -> None:
    whole = normal(50, 4, 12)
    first, rest = Moments.of(whole[:20]), Moments.of(whole[20:])
    imported = Moments.from_mean_covariance(first.mean, first.covariance, count=20)
    torch.testing.assert_close((imported + rest).covariance, torch.cov(whole.T))


def test_extrapolation_is_less_biased_than_the_distance() -> None:
    width, count, runs = 16, 400, 8
    reference = Moments.from_mean_covariance(torch.zeros(width), torch.eye(width))
    truth = width * (1.2 - 1) ** 2
    sets = [1.2 * normal(count, width, 100 + run) for run in range(runs)]
    plain = sum(frechet_distance(Moments.of(features), reference) for features in sets) / runs
    extrapolated = sum(frechet_infinity(features, reference, seed=0) for features in sets) / runs
    assert plain - truth > 0.1
    assert abs(extrapolated - truth) < 0.3 * (plain - truth)


@pytest.mark.parametrize(("count", "smallest"), [(4, 2), (2000, 1000), (20_000, 5000), (100_000, 10_000)])
def test_extrapolation_starts_where_the_law_holds(count: int, smallest: int) -> None:
    sizes = moments._subset_sizes(count, 15)
    assert (sizes[0], sizes[-1]) == (smallest, count)
    assert len(sizes) == min(15, count - smallest + 1)


def test_extrapolation_is_seeded() -> None:
    features, reference = normal(60, 4, 13), Moments.of(normal(60, 4, 14))
    values = [frechet_infinity(features, reference, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(("count", "message"), [(64, "is rank-deficient"), (127, "nearly rank-deficient")])
def test_too_few_samples_for_the_features_warn(count: int, message: str) -> None:
    with pytest.warns(UserWarning, match=f"{count} samples in 64 features .*{message}.* prefer kid"):
        warn_if_rank_deficient(count, 64)


def test_enough_samples_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_rank_deficient(128, 64)


NARROW, WIDE = Moments.of(normal(5, 2, 0)), Moments.of(normal(5, 3, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.of(torch.zeros(3)), r"shape \(samples, features\).* got \(3,\)"),
        (lambda: Moments.of(torch.zeros(0, 3)), r"got \(0, 3\)"),
        (lambda: Moments.of(torch.tensor([[1.0, float("nan")], [0.0, 0.0]])), "finite.* in 1 of 2 samples"),
        (lambda: Moments.of(torch.tensor([[float("inf")]])), "must be finite"),
        (lambda: Moments(count=2, mean=torch.zeros(2), scatter=torch.zeros(3, 3)), r"mean \(2,\) and scatter \(3, 3\)"),
        (lambda: Moments.from_mean_covariance(torch.zeros(1), torch.full((1, 1), torch.nan)), "must be finite"),
        (lambda: Moments.from_mean_covariance(torch.zeros(1), torch.ones(1, 1), count=1), "at least 2.* got 1"),
        (lambda: frechet_distance(NARROW, WIDE), "equally many features, got 2 and 3"),
        (lambda: NARROW + WIDE, "equally many features"),
        (lambda: frechet_distance(Moments.of(torch.ones(1, 2)), NARROW), "at least 2 samples, got 1"),
        (lambda: Moments.from_mean_covariance(torch.zeros(2), torch.eye(2)) + NARROW, "count=None cannot be merged"),
        (lambda: frechet_infinity(torch.ones(3, 2), NARROW, seed=0), "at least 4 samples.* got 3"),
        (lambda: frechet_infinity(torch.ones(9, 2), NARROW, seed=0, points=1), "points=1"),
    ],
)
def test_wrong_use_is_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (-torch.eye(3), "negative eigenvalue -1"),
        (torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "negative eigenvalue -1"),
        (torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "not symmetric"),
    ],
)
def test_a_table_that_is_no_covariance_is_refused(covariance: torch.Tensor, message: str) -> None:
    moments = Moments.from_mean_covariance(torch.zeros(3), covariance)
    with pytest.raises(ValueError, match=message):
        frechet_distance(moments, Moments.of(torch.randn(9, 3, generator=torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_makes_no_covariance_a_wrong_one(dtype: torch.dtype, scale: float) -> None:
    """Of fewer samples than features, so that most eigenvalues are 0 up to rounding."""
    features = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    covariance = features.T.cov().to(dtype)
    moments = Moments.from_mean_covariance(features.mean(0), covariance * scale)
    assert torch.allclose(moments.factor @ moments.factor.T, covariance.double() * scale, atol=1e-5 * scale)
    assert Moments.from_mean_covariance(torch.zeros(2), torch.zeros(2, 2)).factor.eq(0).all()
