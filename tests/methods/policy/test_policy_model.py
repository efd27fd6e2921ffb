"""The heads of a policy, and how likely they find what was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowaccel.methods.policy import network as policy_model
from flowaccel.methods.policy.heads import jump_distribution, jump_mode
from flowaccel.methods.policy.network import CACHE, COUNT, SPARSE, STEP, AccelerationPolicy, Choices

SMALL = {"in_channels": 3, "condition_dim": 6, "width": 8}


COUNTED = {"levels": (COUNT, CACHE), "counts": (4, 6, 10), "sparsity": ()}


def policy(**config: object) -> AccelerationPolicy:
    torch.manual_seed(0)
    return AccelerationPolicy(**{**SMALL, "levels": (STEP, CACHE, SPARSE), "sparsity": (0.7, 0.4), **config}).eval()


def test_at_first_it_jumps_like_tpdm_and_hardly_reuses() -> None:
    heads = policy()
    features, condition = torch.randn(4, 3, 8, 8), torch.randn(4, 6)
    raw = heads(STEP, features, condition)
    assert torch.allclose(raw, torch.tensor([2.5, 1.0]), atol=0.05)
    assert jump_mode(raw)[0].item() == pytest.approx(0.818, abs=0.01)
    assert jump_distribution(raw).mean[0].item() == pytest.approx(0.78, abs=0.01)
    gap = torch.cat([condition, torch.zeros(4, 1)], dim=1)
    assert torch.allclose(heads(CACHE, features, gap).softmax(dim=1)[:, 1], torch.tensor(0.1), atol=0.01)
    shares = heads(SPARSE, features, condition).softmax(dim=1)
    assert torch.allclose(shares, torch.tensor([0.85, 0.075, 0.075]), atol=0.01)


def test_at_first_all_counts_are_as_likely() -> None:
    shares = policy(**COUNTED)(COUNT, torch.randn(4, 3, 8, 8), torch.randn(4, 6)).softmax(dim=1)
    assert torch.allclose(shares, torch.full((4, 3), 1 / 3), atol=0.01)


def test_likelihoods_are_of_what_was_sampled() -> None:
    heads = policy()
    features, condition = torch.randn(5, 3, 6, 4), torch.randn(5, 6)
    shares = torch.tensor([0.2, 0.5, 0.9, 1.0, 0.0])
    found = heads.weigh(STEP, Choices(torch.arange(5), features, condition, shares))[0]
    expected = jump_distribution(heads(STEP, features, condition)).log_prob(shares.clamp(1e-3, 1 - 1e-3))
    assert torch.equal(found, expected) and found.isfinite().all()
    chosen = torch.tensor([0, 2, 1, 0, 0])
    found, entropy = heads.weigh(SPARSE, Choices(torch.arange(5), features, condition, chosen))
    logits = heads(SPARSE, features, condition).log_softmax(dim=1)
    assert torch.allclose(found, logits[torch.arange(5), chosen])
    assert torch.allclose(entropy, -(logits.exp() * logits).sum(dim=1))


def test_large_maps_are_weighed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    features, condition = torch.randn(5, 3, 6, 4), torch.randn(5, 6)
    choices = Choices(torch.arange(5), features, condition, torch.tensor([0.2, 0.5, 0.9, 0.4, 0.6]))

    def weighed() -> tuple[torch.Tensor, torch.Tensor]:
        heads = policy()
        likely, entropy = heads.weigh(STEP, choices)
        (likely.sum() + entropy.sum()).backward()
        return likely, heads.heads[STEP].conv1.weight.grad

    whole = weighed()
    seen: list[int] = []
    forward = AccelerationPolicy.forward
    monkeypatch.setattr(policy_model, "_AT_ONCE", 2 * 8 * 6 * 4)
    monkeypatch.setattr(
        AccelerationPolicy,
        "forward",
        lambda self, level, maps, by: seen.append(len(maps)) or forward(self, level, maps, by),
    )
    for expected, found in zip(whole, weighed(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert set(seen) == {1, 2}


def test_heads_compute_in_float32_whatever_is_around() -> None:
    heads = policy()
    features, condition = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads(STEP, features.bfloat16(), condition.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, heads(STEP, features.bfloat16().float(), condition.bfloat16().float()))


def test_saved_and_loaded(tmp_path: Path) -> None:
    heads = policy(costs={"reuse": 0.1, "sparse": [0.9, 0.8]}, base="SiT")
    heads.save_pretrained(tmp_path)
    loaded = AccelerationPolicy.from_pretrained(tmp_path)
    assert loaded.levels == (STEP, CACHE, SPARSE)
    assert loaded.config.costs == {"reuse": 0.1, "sparse": [0.9, 0.8]}
    features, condition = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
    assert torch.equal(loaded(STEP, features, condition), heads(STEP, features, condition))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"levels": ()}, "at least one of step, cache, sparse"),
        ({"levels": "step"}, "at least one of"),
        ({"levels": ("width",)}, "at least one of"),
        ({"sparsity": (0.4, 0.7)}, "that fall"),
        ({"sparsity": (1.2, 0.7)}, "that fall"),
        ({"sparsity": ()}, "come together"),
        ({"levels": (STEP,)}, "come together"),
        (COUNTED | {"counts": ()}, "counts and the level 'count' come together"),
        ({"counts": (4, 6)}, "counts and the level 'count' come together"),
        (COUNTED | {"counts": (4, 4)}, "that rise, such as"),
        (COUNTED | {"counts": (6, 4)}, "that rise, such as"),
        (COUNTED | {"counts": (0, 4)}, "whole numbers of at least 1"),
        (COUNTED | {"counts": (4.0, 6.0)}, "whole numbers of at least 1"),
        (COUNTED | {"counts": (True, 4)}, "whole numbers of at least 1"),
        (COUNTED | {"levels": (STEP, COUNT)}, "must not hold both 'step' and 'count'"),
        ({"max_reuse": 0}, "max_reuse must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_bad_configurations(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**config)
