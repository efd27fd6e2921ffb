"""Precision and recall on sets whose answer is known, and against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowaccel.evaluation.metrics import precision_recall as manifold
from flowaccel.evaluation.metrics.precision_recall import precision_indicators, recall_indicators


def cluster(count: int, centre: float, seed: int) -> Tensor:
    return centre + torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(points: Tensor, others: Tensor, k: int) -> Tensor:
    within = (others[:, None] - others[None, :]).norm(dim=-1)
    radius = within.sort(dim=1).values[:, k]
    return ((points[:, None] - others[None, :]).norm(dim=-1) <= radius).any(dim=1)


def test_equal_sets_have_precision_and_recall_one() -> None:
    features = cluster(30, 0.0, 0)
    assert precision_indicators(features, features).all()
    assert recall_indicators(features, features).all()


def test_a_dropped_mode_costs_recall_only() -> None:
    reference = torch.cat([cluster(40, 0.0, 1), cluster(40, 100.0, 2)])
    generated = reference[:40]
    assert precision_indicators(generated, reference).all()
    assert recall_indicators(generated, reference).tolist() == [True] * 40 + [False] * 40


def test_an_invented_mode_costs_precision_only() -> None:
    generated = torch.cat([cluster(40, 0.0, 1), cluster(40, 100.0, 2)])
    reference = generated[:40]
    assert precision_indicators(generated, reference).tolist() == [True] * 40 + [False] * 40
    assert recall_indicators(generated, reference).all()


def test_a_ball_reaches_exactly_to_the_kth_neighbour() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # radii for k=2: 2, 1, 1, 2
    generated = torch.tensor([[-2.0], [-2.01], [5.0], [5.01]])
    assert precision_indicators(generated, reference, k=2).tolist() == [True, False, True, False]


@pytest.mark.parametrize("block", [1, 100, 10**6])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_the_definition_in_blocks_of_any_size(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK_ENTRIES", block)
    generated, reference = cluster(50, 1.0, 3), cluster(35, 0.0, 4)
    inside = precision_indicators(generated, reference, k)
    assert 0 < int(inside.sum()) < 50
    assert torch.equal(inside, by_definition(generated, reference, k))
    assert torch.equal(recall_indicators(generated, reference, k), by_definition(reference, generated, k))


def test_does_not_depend_on_the_distance_from_the_origin() -> None:
    generated, reference = cluster(60, 1.0, 5), cluster(60, 0.0, 6)
    assert torch.equal(
        precision_indicators(generated + 1e7, reference + 1e7), precision_indicators(generated, reference)
    )


@pytest.mark.parametrize(
    ("generated", "reference", "k", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(3, 3), 3, r"k must be in \[1, 2\] for 3 reference samples, got 3"),
        (torch.zeros(5, 3), torch.zeros(5, 3), 0, r"k must be in \[1, 4\].* got 0"),
        (torch.zeros(5, 3), torch.zeros(5, 2), 3, "equally many features, got 3 and 2"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), 3, "generated must be finite"),
    ],
)
def test_wrong_use_is_explained(generated: Tensor, reference: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision_indicators(generated, reference, k)
