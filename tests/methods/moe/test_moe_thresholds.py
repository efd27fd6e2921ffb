"""Thresholds: followed while training, fitted for any capacity, and the same in every process."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowaccel.methods.moe.control import set_moe_capacity, set_moe_selection
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.thresholds import LOWEST_CAPACITY
from moe_parts import EXPERTS, fit, moe_layer, tokens

THRESHOLDED = ("diffmoe", "expert_race", "expert_threshold")
KINDS = {"diffmoe": ("predictor", "gate"), "expert_race": ("gate",), "expert_threshold": ("gate",)}
POOL = 16
EACH = POOL // EXPERTS


def scores(layer: MoEFeedForward, hidden: Tensor) -> dict[str, Tensor]:
    """(S, E) of every kind."""
    pool = hidden.flatten(0, 1)
    if layer.settings.router == "expert_race":
        return {"gate": layer.gate(nn.functional.gelu(layer.gate_hidden(pool))).detach()}
    found = {"gate": layer.gate(pool).softmax(-1).detach()}
    if layer.capacity_predictor is not None:
        found["predictor"] = layer.capacity_predictor(pool).sigmoid().detach()
    return found


def last_taken(layer: MoEFeedForward, hidden: Tensor) -> dict[str, Tensor]:
    """(E,): the lowest score that capacity 1 takes; of the race, among all pairs."""
    found = {}
    for kind, values in scores(layer, hidden).items():
        if layer.settings.router == "expert_race":
            found[kind] = values.flatten().sort(descending=True).values[POOL - 1].expand(EXPERTS)
        else:
            found[kind] = values.sort(dim=0, descending=True).values[EACH - 1]
    return found


def current(layer: MoEFeedForward) -> dict[str, Tensor]:
    return {kind: getattr(layer.thresholds, kind).clone() for kind in KINDS[layer.settings.router]}


def state(layer: MoEFeedForward) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def assert_state(layer: MoEFeedForward, before: dict[str, Tensor]) -> None:
    for name, value in layer.named_buffers():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("router", THRESHOLDED)
def test_thresholds_follow_what_training_takes(router: str) -> None:
    """The first as it is; then a running average of the mean over a step's calls."""
    layer = moe_layer(router, threshold_momentum=0.9)
    first, second, third = (tokens(2, 8, seed=seed) for seed in (1, 2, 3))
    layer(first)
    layer.commit()
    expected = last_taken(layer, first)
    for kind in KINDS[router]:
        torch.testing.assert_close(current(layer)[kind], expected[kind])
    layer(second)
    layer(third)
    layer.commit()
    two, three = last_taken(layer, second), last_taken(layer, third)
    for kind in KINDS[router]:
        mean = (two[kind] + three[kind]) / 2
        torch.testing.assert_close(current(layer)[kind], 0.9 * expected[kind] + 0.1 * mean)
    assert int(layer.thresholds.updates) == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("router", [*THRESHOLDED, "deepseek"])
def test_what_checkpointing_repeats_changes_nothing(router: str, reentrant: bool) -> None:
    plain, repeated = (moe_layer(router, seed=3) for _ in range(2))
    for seed in (1, 2):
        hidden = tokens(2, 8, seed=seed)
        plain(hidden).sum().backward()
        checkpoint(repeated, hidden.requires_grad_(), use_reentrant=reentrant).sum().backward()
        plain.commit()
        repeated.commit()
        before = state(repeated)
        repeated.commit()  # nothing was observed since
        assert_state(repeated, before)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(repeated.get_buffer(name), value, equal_nan=True)


@pytest.mark.parametrize("router", [*THRESHOLDED, "deepseek"])
def test_use_and_validation_leave_thresholds(router: str) -> None:
    layer = moe_layer(router)
    layer(tokens(2, 8))
    layer.commit()
    before = state(layer)
    with torch.no_grad():
        layer(tokens(2, 8, seed=5))
    layer.eval()(tokens(2, 8, seed=6))
    layer.commit()
    assert_state(layer, before)


@pytest.mark.parametrize("router", THRESHOLDED)
def test_thresholds_that_were_never_fitted(router: str) -> None:
    layer = moe_layer(router).eval()
    with pytest.raises(ValueError, match=r"never fitted.*moe_step\(.*calibrate_thresholds\("):
        layer(tokens(2, 8))
    with pytest.raises(ValueError, match="no thresholds for other capacities yet"):
        set_moe_capacity(layer, 2.0)
    with pytest.raises(ValueError, match="no scores were collected"):
        layer.thresholds.fit(1.0)
    layer.load_state_dict(fit(moe_layer(router)).state_dict())
    assert layer(tokens(2, 8)).isfinite().all()


def realised(layer: MoEFeedForward, hidden: Tensor) -> Tensor:
    """(E,): the share of tokens of every expert, times E."""
    with torch.no_grad():
        layer(hidden)
    assert layer.plan is not None
    return layer.plan.counts * (EXPERTS / hidden.flatten(0, 1).shape[0])


@pytest.mark.parametrize("selection", ["predictor_mask", "gate_threshold", "gate_topk_count"])
@pytest.mark.parametrize("capacity", [0.3, 1, 2.5, EXPERTS])
def test_fitted_capacity_is_exact(capacity: float, selection: str) -> None:
    """Of every expert, to one token; over several batches and with padding."""
    layer, hidden = moe_layer().eval(), tokens(8, 64, seed=2)
    mask = torch.arange(64).expand(8, 64) < torch.arange(57, 65).unsqueeze(1)
    layer.thresholds.collecting = True
    with torch.no_grad():
        for rows in range(0, 8, 4):
            layer(hidden[rows : rows + 4], token_mask=mask[rows : rows + 4])
    layer.thresholds.collecting = False
    layer.thresholds.fit(capacity)
    set_moe_selection(layer, selection)
    with torch.no_grad():
        layer(hidden, token_mask=mask)
    assert layer.plan is not None
    expected = round(capacity / EXPERTS * int(mask.sum()))
    assert all(abs(count - expected) <= 1 for count in layer.plan.counts.tolist())


@pytest.mark.parametrize("router", THRESHOLDED)
def test_other_capacities(router: str) -> None:
    """From the curve: the average over tokens is what was asked, and None goes back. Just below all experts, the curve
    has no points among the few least scores."""
    hidden = tokens(16, 128, seed=2)
    layer = fit(moe_layer(router), hidden)
    assert float(realised(layer, hidden).mean()) == pytest.approx(1, abs=0.01)
    for capacity in (0.1, 0.5, 1.0, 1.7, 2.5, 3.3, 3.8, EXPERTS):
        set_moe_capacity(layer, capacity)
        counts = realised(layer, hidden)
        assert float(counts.mean()) == pytest.approx(capacity, abs=0.01, rel=0.06 if capacity == 3.8 else 0.02)
        if router != "expert_race":
            assert counts.tolist() == pytest.approx([capacity] * EXPERTS, rel=0.07)
    set_moe_capacity(layer, None)
    assert float(realised(layer, hidden).mean()) == pytest.approx(1, abs=0.01)
    allowed = re.escape(f"between {LOWEST_CAPACITY} and the number of experts, {EXPERTS}, got")
    for wrong in (0.01, EXPERTS + 0.1, -1.0):
        with pytest.raises(ValueError, match=allowed):
            set_moe_capacity(layer, wrong)
        assert float(realised(layer, hidden).mean()) == pytest.approx(1, abs=0.01)


def test_all_experts_means_all_of_tokens_never_seen() -> None:
    layer = fit(moe_layer("expert_race"))
    set_moe_capacity(layer, EXPERTS)
    far = 100 * tokens(4, 32, seed=9)
    assert realised(layer, far).tolist() == [EXPERTS] * EXPERTS
    layer = fit(moe_layer("expert_race"), capacity=EXPERTS)
    assert realised(layer, far).tolist() == [EXPERTS] * EXPERTS
    for wrong in (0.0, EXPERTS + 1.0):
        with pytest.raises(ValueError, match=f"capacity must be above 0 and at most the number of experts, {EXPERTS}"):
            fit(moe_layer(), capacity=wrong)


def test_loaded_thresholds_count() -> None:
    """Not what was known of those before: whether there are any, and those of another capacity."""
    hidden = tokens(8, 64, seed=2)
    layer, other = fit(moe_layer(), hidden), fit(moe_layer(seed=5), hidden)
    set_moe_capacity(layer, 2.0)
    assert float(realised(layer, hidden).mean()) == pytest.approx(2, rel=0.02)
    layer.load_state_dict(other.state_dict())
    assert float(realised(layer, hidden).mean()) == pytest.approx(2, rel=0.02)
    set_moe_capacity(layer, None)
    assert torch.equal(realised(layer, hidden), realised(other, hidden))
    layer.load_state_dict(moe_layer(seed=5).state_dict())
    with pytest.raises(ValueError, match="never fitted"):
        layer(hidden)


def test_the_race_has_one_threshold_for_all() -> None:
    """So experts may take unequal shares; they would be equal with one threshold each."""
    hidden = tokens(16, 128, seed=2)
    layer = fit(moe_layer("expert_race"), hidden)
    assert len(set(layer.thresholds.gate.tolist())) == 1
    assert realised(layer, hidden).max() > 1.1
    assert torch.equal(layer.thresholds.gate_curve.amin(1), layer.thresholds.gate_curve.amax(1))


def test_a_capacity_is_not_for_routers_without_thresholds() -> None:
    for router in ("token_choice", "deepseek", "expert_choice"):
        layer = moe_layer(router)
        with pytest.raises(ValueError, match=f"capacity cannot be set after training.*router='{router}'"):
            set_moe_capacity(layer, 2.0)
        set_moe_capacity(layer, None)


def test_ways_to_choose() -> None:
    layer = fit(moe_layer())
    with pytest.raises(ValueError, match=r"selection must be one of \['predictor_mask', .*got 'best'"):
        set_moe_selection(layer, "best")
    with pytest.raises(ValueError, match=r"is for router='diffmoe', got 'gate_threshold' for router='expert_race'"):
        set_moe_selection(moe_layer("expert_race"), "gate_threshold")


def test_biases_move_against_the_load() -> None:
    layer, hidden = moe_layer("deepseek", bias_rate=0.25), tokens(2, 8)
    nn.init.zeros_(layer.gate.weight)
    layer.selection_bias.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    layer(hidden)  # all take expert 0
    layer.commit()
    assert layer.selection_bias.tolist() == [3.75, 3.25, 2.25, 1.25]
    for _ in range(200):
        layer(tokens(2, 8, seed=3))
        layer.commit()
    assert layer.selection_bias.max() - layer.selection_bias.min() <= 1
    layer.commit()  # nothing was observed
    before = layer.selection_bias.clone()
    layer.eval()(hidden)
    layer.commit()
    assert torch.equal(layer.selection_bias, before)


# -- two processes


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for router in (*THRESHOLDED, "deepseek"):
        layer = moe_layer(router, threshold_momentum=0.5, bias_rate=1.0)
        for seed in (10 + rank, 20 + rank):
            layer(tokens(2, 8, seed=seed))
            layer.commit()
        found[router] = state(layer)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process")
def test_two_processes_have_the_mean_of_both(tmp_path: Path) -> None:
    method = "fork" if sys.platform == "linux" else "spawn"  # which would import everything again, twice
    torch.multiprocessing.start_processes(in_process, (str(tmp_path),), nprocs=2, start_method=method)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for router in (*THRESHOLDED, "deepseek"):
        layer = moe_layer(router, threshold_momentum=0.5, bias_rate=1.0)
        lone = moe_layer(router, threshold_momentum=0.5, bias_rate=1.0)
        for seed in (10, 20):
            for rank in range(2):
                layer(tokens(2, 8, seed=seed + rank))  # two calls of a step have the same mean
            layer.commit()
            lone(tokens(2, 8, seed=seed))
            lone.commit()
        for rank in range(2):
            assert_state_close(ranks[rank][router], state(layer))
        assert any(not torch.allclose(state(lone)[name], value, equal_nan=True) for name, value in state(layer).items())


def assert_state_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, equal_nan=True)


def test_scores_of_large_calls_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowaccel.methods.moe.thresholds.MOST_COLLECTED", 500)
    layer = moe_layer("diffmoe").eval()
    hidden = tokens(4, 512)
    layer.thresholds.collecting = True
    with torch.no_grad():
        layer(hidden)
        layer(hidden)
    kept = layer.thresholds._collected["predictor"]
    assert [len(scores) for scores in kept] == [500, 500] and not torch.equal(*kept)
    layer.thresholds.collecting = False
    layer.thresholds.fit(1.0)
    with torch.no_grad():
        layer(hidden)
    assert layer.plan is not None and 0.85 < layer.plan.pairs / 2048 < 1.15
