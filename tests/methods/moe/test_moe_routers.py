"""Routers: what they choose, written slowly; that an image does not depend on its batch; and padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.methods.moe.control import set_moe_budget, set_moe_selection
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from moe_parts import DIM, EXPERTS, ROUTERS, fit, gradients, moe_layer, tokens, weights_of

SAMPLES, LENGTH = 3, 10
POOL = SAMPLES * LENGTH
SELECTIONS = [(router, None) for router in ROUTERS] + [("diffmoe", "gate_threshold"), ("diffmoe", "gate_topk_count")]


# -- every router's choice, slowly: {(token, expert): weight} of scores as nested lists


def best(ranked: dict[Any, float], count: int) -> list[Any]:
    return sorted(ranked, key=lambda key: -ranked[key])[:count]


def by_expert(score: list[list[float]], rank: list[list[float]], pools: list[range], each: int) -> dict[Any, float]:
    taken = {}
    for expert in range(EXPERTS):
        for pool in pools:
            for token in best({token: rank[token][expert] for token in pool}, each):
                taken[token, expert] = score[token][expert]
    return taken


def by_token(score: list[list[float]], rank: list[list[float]], each: int, normalised: bool) -> dict[Any, float]:
    taken = {}
    for token, row in enumerate(score):
        chosen = best(dict(enumerate(rank[token])), each)
        total = sum(row[expert] for expert in chosen) if normalised else 1.0
        taken |= {(token, expert): row[expert] / total for expert in chosen}
    return taken


def above(score: list[list[float]], rank: list[list[float]], threshold: list[float]) -> dict[Any, float]:
    return {
        (token, expert): score[token][expert]
        for token in range(len(score))
        for expert in range(EXPERTS)
        if rank[token][expert] > threshold[expert]
    }


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in row]


def logits_of(layer: MoEFeedForward, pool: Tensor) -> list[list[float]]:
    if layer.gate_hidden is not None:
        pool = torch.nn.functional.gelu(pool @ layer.gate_hidden.weight.T + layer.gate_hidden.bias)
    found: list[list[float]] = (pool @ layer.gate.weight.T).tolist()
    return found


def predicted_of(layer: MoEFeedForward, pool: Tensor) -> list[list[float]]:
    first, last = layer.capacity_predictor[0], layer.capacity_predictor[2]
    hidden = pool @ first.weight.T + first.bias
    found: list[list[float]] = ((hidden * torch.sigmoid(hidden)) @ last.weight.T + last.bias).tolist()
    return found


WHOLE, APART = [range(POOL)], [range(LENGTH * sample, LENGTH * (sample + 1)) for sample in range(SAMPLES)]
FOUR_THIRDS = 4 / 3


def slowly(layer: MoEFeedForward, pool: Tensor) -> dict[Any, float]:
    """The rules of the papers, for a pool of POOL tokens."""
    router, training = layer.settings.router, layer.training
    logits = logits_of(layer, pool)
    score = [softmax(row) for row in logits]
    each = math.floor(POOL * layer.capacity / EXPERTS + 1e-9)
    if router == "expert_choice":
        return by_expert(score, score, APART, math.floor(LENGTH * layer.capacity / EXPERTS + 1e-9))
    if router in ("token_choice", "dit_moe"):
        return by_token(score, score, int(layer.capacity), bool(layer.settings.norm_topk))
    if router == "deepseek":
        score = [sigmoid(row) for row in logits]
        biased = [[value + float(b) for value, b in zip(row, layer.selection_bias, strict=True)] for row in score]
        return by_token(score, biased, int(layer.capacity), layer.capacity > 1)
    if router == "expert_race":
        if training:
            flat = {(token, expert): logits[token][expert] for token in range(POOL) for expert in range(EXPERTS)}
            return {pair: flat[pair] for pair in best(flat, math.floor(POOL * layer.capacity + 1e-9))}
        return above(logits, logits, layer.thresholds.gate.tolist())
    if training:
        return by_expert(score, score, WHOLE, each)
    if router == "expert_threshold" or layer.selection == "gate_threshold":
        return above(score, score, layer.thresholds.gate.tolist())
    predicted, threshold = predicted_of(layer, pool), layer.thresholds.predictor.tolist()
    taken = above(score, predicted, [math.log(value / (1 - value)) for value in threshold])
    if layer.selection == "predictor_mask":
        return taken
    counts = [sum(expert == other for _, other in taken) for expert in range(EXPERTS)]
    found = {}
    for expert, count in enumerate(counts):
        found |= {pair: w for pair, w in by_expert(score, score, WHOLE, count).items() if pair[1] == expert}
    return found


def assert_chosen(layer: MoEFeedForward, hidden: Tensor) -> None:
    plan = layer.route(hidden.flatten(0, 1), len(hidden)).plan
    expected = torch.zeros(POOL, EXPERTS, dtype=torch.float64)
    for pair, weight in slowly(layer, hidden.flatten(0, 1)).items():
        expected[pair] = weight
    assert 0 < int((expected != 0).sum()) < POOL * EXPERTS
    torch.testing.assert_close(weights_of(plan, POOL), expected, atol=1e-9, rtol=0)
    assert plan.experts.tolist() == sorted(plan.experts.tolist())
    assert plan.counts.tolist() == plan.mask(POOL).sum(0).tolist()
    assert plan.ends.tolist() == [sum(plan.counts.tolist()[: expert + 1]) for expert in range(EXPERTS)]
    assert plan.sizes() == plan.counts.tolist()


@pytest.mark.parametrize(("router", "selection"), SELECTIONS)
@pytest.mark.parametrize("capacity", [1, 2, FOUR_THIRDS], ids=["1", "2", "4/3"])
def test_choices(router: str, selection: str | None, capacity: float) -> None:
    if router in ("token_choice", "dit_moe", "deepseek") and capacity == FOUR_THIRDS:
        capacity = 3
    layer = moe_layer(router, capacity=capacity, norm_topk=True if router == "dit_moe" else None).double()
    if router == "deepseek":
        layer.selection_bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    assert_chosen(layer, hidden)
    fit(layer)
    if selection is not None:
        set_moe_selection(layer, selection)
    assert_chosen(layer, hidden)


def test_a_selection_bias_changes_choices_and_not_weights() -> None:
    layer = moe_layer("deepseek", capacity=2).double()
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    layer(hidden)
    assert layer.plan is not None
    before = layer.plan.counts.tolist()
    layer.selection_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    layer(hidden)
    assert before[0] < layer.plan.counts[0] == POOL
    sums = weights_of(layer.plan, POOL).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_groups_of_experts() -> None:
    """Only experts of the two best of four groups, by the sum of the group's two best scores."""
    layer = moe_layer("deepseek", num_experts=12, capacity=3, expert_groups=4, top_groups=2).double()
    pool = tokens(POOL, dtype=torch.float64)
    chosen = layer.route(pool, 1).plan.mask(POOL)
    differ = 0
    for token, row in enumerate(logits_of(layer, pool)):
        groups = [range(3 * group, 3 * group + 3) for group in range(4)]
        score = sigmoid(row)
        strength = {group: sum(sorted(score[i] for i in experts)[-2:]) for group, experts in enumerate(groups)}
        allowed = {i: score[i] for group in best(strength, 2) for i in groups[group]}
        assert set(chosen[token].nonzero().flatten().tolist()) == set(best(allowed, 3))
        differ += set(best(allowed, 3)) != set(best(dict(enumerate(score)), 3))
    assert differ > 0


def test_expert_threshold_warms_up() -> None:
    """The best of the pool until the threshold was set so many times, scores above it from then on."""
    layer = moe_layer("expert_threshold", threshold_warmup=2, threshold_momentum=0.0).double()
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    for updates in range(2):
        layer(hidden)
        assert layer.plan is not None
        assert layer.plan.counts.tolist() == [POOL // EXPERTS] * EXPERTS, updates
        layer.commit()
    layer.thresholds.gate.copy_(torch.tensor([0.1, 0.5, 0.2, 0.9]))
    layer(hidden)
    score = torch.tensor([softmax(row) for row in logits_of(layer, hidden.flatten(0, 1))])
    assert torch.equal(layer.plan.mask(POOL), score > layer.thresholds.gate)
    layer.commit()
    assert layer.thresholds.gate.tolist() == pytest.approx(score.topk(POOL // EXPERTS, 0).values[-1].tolist())


# -- what a sample depends on


@pytest.mark.parametrize(("router", "selection"), SELECTIONS)
def test_a_sample_does_not_depend_on_its_batch(router: str, selection: str | None) -> None:
    layer = fit(moe_layer(router, capacity=2, shared_inner_dim=8).double())
    if selection is not None:
        set_moe_selection(layer, selection)
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    together = layer(hidden)
    alone = torch.cat([layer(hidden[sample : sample + 1]) for sample in range(SAMPLES)])
    mixed = layer(hidden[[2, 0]])
    if layer.invariance == "batch":
        assert selection == "gate_topk_count"
        assert (together - alone).abs().max() > 0.01
        return
    torch.testing.assert_close(alone, together, atol=1e-10, rtol=0)
    torch.testing.assert_close(mixed, together[[2, 0]], atol=1e-10, rtol=0)
    tokenwise = torch.cat([layer(token.view(1, 1, DIM)) for token in hidden.flatten(0, 1)]).view_as(hidden)
    if layer.invariance == "token":
        torch.testing.assert_close(tokenwise, together, atol=1e-10, rtol=0)
        torch.testing.assert_close(layer(hidden.flatten(0, 1)), together.flatten(0, 1), atol=1e-10, rtol=0)
    else:
        assert layer.invariance == "sample"
        assert (tokenwise - together).abs().max() > 0.01


# -- padding

MASK = torch.tensor([[True] * 10, [True] * 6 + [False] * 4, [False] * 3 + [True] * 7])


PHASES = [(router, None, True) for router in ROUTERS] + [(router, selection, False) for router, selection in SELECTIONS]


@pytest.mark.parametrize(("router", "selection", "training"), PHASES)
def test_padding_changes_nothing(router: str, selection: str | None, training: bool) -> None:
    layer = moe_layer(router, capacity=2, threshold_momentum=0.0).double()
    if not training:
        fit(layer)
    if selection is not None:
        set_moe_selection(layer, selection)
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    found = []
    for value in (0.0, 1e3, -7.0):
        layer.zero_grad()
        output = layer(torch.where(MASK.unsqueeze(2), hidden, value), token_mask=MASK)
        assert output[~MASK].abs().max() == 0
        assert layer.plan is not None
        assert not layer.plan.mask(POOL)[~MASK.flatten()].any()
        output.square().sum().backward()
        loss = torch.zeros(()) if layer.aux_loss is None else layer.aux_loss
        found.append([output[MASK], loss, *gradients(layer).values()])
        layer.commit()
        if layer.settings.thresholded:
            found[-1].append(layer.thresholds.gate.clone())
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["training", "use"])
@pytest.mark.parametrize("router", ROUTERS)
def test_padded_is_as_if_it_were_cut_off(router: str, training: bool) -> None:
    layer = moe_layer(router, capacity=2).double()
    layer.train() if training else fit(layer)
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    found = layer(hidden, token_mask=MASK)[MASK]
    loss = layer.aux_loss
    if router == "expert_choice":
        cut = torch.cat([layer(rows[mask].unsqueeze(0))[0] for rows, mask in zip(hidden, MASK, strict=True)])
    else:
        cut = layer(hidden[MASK])
    torch.testing.assert_close(found, cut, atol=1e-10, rtol=0)
    if loss is not None:
        torch.testing.assert_close(loss, layer.aux_loss)


@pytest.mark.parametrize("training", [True, False], ids=["training", "use"])
@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_but_padding(router: str, training: bool) -> None:
    layer = moe_layer(router, shared_inner_dim=8)
    layer.train() if training else fit(layer)
    hidden = tokens(2, 4)
    found = layer(hidden, token_mask=torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(found, layer.shared(hidden))
    if training:
        layer.commit()
        assert all(int(value) == 0 for name, value in layer.named_buffers() if name.endswith("updates"))


def test_a_mask_of_another_shape() -> None:
    layer = moe_layer()
    with pytest.raises(ValueError, match=r"token_mask must be bool of shape \(2, 4\).*got torch.bool \(2, 5\)"):
        layer(tokens(2, 4), token_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"token_mask must be bool of shape \(2, 4\).*got torch.float32 \(2, 4\)"):
        layer(tokens(2, 4), token_mask=torch.ones(2, 4))


# -- a bound on the tokens of an expert

BOUNDED = [
    ("diffmoe", "predictor_mask"),
    ("diffmoe", "gate_threshold"),
    ("expert_race", None),
    ("expert_threshold", None),
]


@pytest.mark.parametrize(("router", "selection"), BOUNDED)
def test_a_budget_leaves_out_what_does_not_fit(router: str, selection: str | None) -> None:
    layer = fit(moe_layer(router, capacity=2).double())
    if selection is not None:
        set_moe_selection(layer, selection)
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    exact = layer(hidden)
    assert layer.plan is not None
    weights, chosen = weights_of(layer.plan, POOL), layer.plan.mask(POOL)
    set_moe_budget(layer, float(EXPERTS))
    torch.testing.assert_close(layer(hidden), exact, atol=1e-10, rtol=0)
    assert int(layer.overflow) == 0
    set_moe_budget(layer, 1.3)
    bounded = layer(hidden)
    each = math.ceil(1.3 * LENGTH / EXPERTS)
    assert layer.plan.each == SAMPLES * each
    rank = weights
    if layer.score_kind == "predictor":
        rank = torch.tensor([sigmoid(row) for row in predicted_of(layer, hidden.flatten(0, 1))], dtype=torch.float64)
    expected, over = torch.zeros_like(weights), 0
    for expert in range(EXPERTS):
        for pool in APART:
            wanted = {token: float(rank[token, expert]) for token in pool if chosen[token, expert]}
            over += max(0, len(wanted) - each)
            for token in best(wanted, each):
                expected[token, expert] = weights[token, expert]
    assert over > 0
    assert int(layer.overflow) == over
    torch.testing.assert_close(weights_of(layer.plan, POOL), expected, atol=1e-12, rtol=0)
    alone = torch.cat([layer(hidden[sample : sample + 1]) for sample in range(SAMPLES)])
    torch.testing.assert_close(alone, bounded, atol=1e-10, rtol=0)
    assert (bounded - exact).abs().max() > 0.01


def test_a_budget_and_padding() -> None:
    layer = fit(moe_layer(capacity=2).double())
    hidden = tokens(SAMPLES, LENGTH, dtype=torch.float64)
    exact = layer(hidden, token_mask=MASK)
    set_moe_budget(layer, float(EXPERTS))
    torch.testing.assert_close(layer(hidden, token_mask=MASK), exact, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="budget must be positive, or None for no bound, got 0"):
        set_moe_budget(layer, 0)


@pytest.mark.parametrize(
    ("router", "selection", "backend"),
    [(*BOUNDED[0], "eager"), *((router, selection, "aot_eager") for router, selection in BOUNDED)],
)
def test_a_budget_compiles_without_a_break(router: str, selection: str | None, backend: str) -> None:
    layer = fit(moe_layer(router, shared_inner_dim=8))
    if selection is not None:
        set_moe_selection(layer, selection)
    set_moe_budget(layer, 1.5)
    hidden = tokens(SAMPLES, LENGTH)
    mask = MASK if router == "diffmoe" else None
    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer(hidden, token_mask=mask)
        found = torch.compile(layer, backend=backend, fullgraph=True)(hidden, token_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
