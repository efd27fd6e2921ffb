"""The kernel distance is unbiased, agrees with torchmetrics, and its weighted form is that of the resampled set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from flowaccel.evaluation.metrics import kid as kernel
from flowaccel.evaluation.metrics.bootstrap import resample_counts, resample_indices, stderr
from flowaccel.evaluation.metrics.kid import kernel_distance, kernel_distance_resampled


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_pairs(features: Tensor, reference: Tensor, original: Tensor) -> float:
    """The definition, pair by pair; pairs of one `original` are left out."""
    width = features.shape[1]

    def mean(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        return ((x @ y.T / width + 1) ** 3)[keep].mean()

    everything = torch.ones(len(features), len(reference), dtype=torch.bool)
    other = ~torch.eye(len(reference), dtype=torch.bool)
    distinct = original[:, None] != original[None, :]
    within = mean(features, features, distinct) + mean(reference, reference, other)
    return float(within - 2 * mean(features, reference, everything))


def test_equals_torchmetrics_on_the_full_sets() -> None:
    class Pixels(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).float() / 255

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (80, 3, 2, 2), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 200, (80, 3, 2, 2), generator=generator, dtype=torch.uint8)
    network = Pixels()
    oracle = KernelInceptionDistance(feature=network, subsets=1, subset_size=80)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    assert kernel_distance(network(fake), network(real)) == pytest.approx(float(oracle.compute()[0]), rel=1e-3)


def test_is_zero_on_average_for_equal_distributions() -> None:
    values = torch.tensor([kernel_distance(normal(20, 4, 2 * run), normal(30, 4, 2 * run + 1)) for run in range(300)])
    error = float(values.std()) / 300**0.5
    assert abs(float(values.mean())) < 3 * error
    assert error < 0.02  # the biased estimator is off by about 8 here: k(x, x) / n on each side


def test_sees_a_shift() -> None:
    assert kernel_distance(normal(100, 4, 0) + 0.5, normal(100, 4, 1)) > 0.3


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_resampled_form_is_the_distance_of_the_resampled_set(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCK_ENTRIES", block)
    features, reference = normal(12, 3, 2), normal(9, 3, 3)
    indices = resample_indices(12, 5, seed=0)
    expected = [by_pairs(features[chosen], reference, chosen) for chosen in indices]
    found = kernel_distance_resampled(features, reference, resample_counts(indices))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert kernel_distance(features, reference) == pytest.approx(by_pairs(features, reference, torch.arange(12)))


def test_bootstrap_error_is_the_spread_over_new_samples() -> None:
    reference = normal(200, 4, 4)
    sets = [normal(100, 4, 50 + run) + 0.4 for run in range(60)]
    spread = float(torch.tensor([kernel_distance(features, reference) for features in sets]).std())
    counts = resample_counts(resample_indices(100, 100, seed=0))
    errors = [stderr(kernel_distance_resampled(features, reference, counts)) for features in sets[:20]]
    assert 0.7 < sum(error or 0.0 for error in errors) / 20 / spread < 1.4


def test_a_resample_of_one_sample_is_undefined() -> None:
    found = kernel_distance_resampled(normal(3, 2, 0), normal(3, 2, 1), torch.tensor([[0, 3, 0], [1, 1, 1]]))
    assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least 2 samples on each side, got 1"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "equally many features, got 3 and 4"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "reference must be finite"),
    ],
)
def test_wrong_use_is_explained(features: Tensor, reference: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_distance(features, reference)


def test_counts_of_another_set_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(resamples, 5\), got \(2, 4\)"):
        kernel_distance_resampled(torch.zeros(5, 3), torch.zeros(5, 3), torch.ones(2, 4))
