"""The routers' own losses, and how they reach the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowaccel.methods.moe.control import set_aux_loss_scale
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.routing import similarity_loss
from moe_parts import EXPERTS, ROUTERS, assert_same, gradients, moe_layer, tokens

WITH_LOSS = ("diffmoe", "token_choice", "dit_moe", "expert_race")


def own_loss(layer: MoEFeedForward, hidden: Tensor) -> Tensor:
    loss = layer.route(hidden.flatten(0, 1), len(hidden)).loss
    assert loss is not None
    return loss


PUBLISHED = [("token_choice", 0.01), ("dit_moe", 0.01), ("diffmoe", 1.0), ("expert_race", 1e-4)]


@pytest.mark.parametrize(("router", "weight"), PUBLISHED)
def test_published_weights(router: str, weight: float) -> None:
    layer, hidden = moe_layer(router), tokens(2, 8)
    layer(hidden)
    torch.testing.assert_close(layer.aux_loss, weight * own_loss(layer, hidden).detach())


def test_routers_without_a_loss() -> None:
    for router in set(ROUTERS) - set(WITH_LOSS):
        layer = moe_layer(router)
        layer(tokens(2, 8))
        assert layer.aux_loss is None


def test_balance_loss() -> None:
    """alpha = 1 when all is even, whatever is chosen; else, the sum of shares times mean scores."""
    layer, hidden = moe_layer("token_choice", capacity=2).double(), tokens(2, 8, dtype=torch.float64)
    scores = (hidden.flatten(0, 1) @ layer.gate.weight.T).softmax(-1).detach()
    shares = [0.0] * EXPERTS
    for row in scores:
        for expert in row.topk(2).indices.tolist():
            shares[expert] += EXPERTS / (2 * len(scores))
    expected = sum(share * float(scores[:, expert].mean()) for expert, share in enumerate(shares))
    assert expected > 1.01
    assert own_loss(layer, hidden).item() == pytest.approx(expected)
    nn.init.zeros_(layer.gate.weight)
    assert own_loss(layer, hidden).item() == pytest.approx(1)


def test_similarity_loss() -> None:
    layer, hidden = moe_layer("expert_race", capacity=2).double(), tokens(3, 10, dtype=torch.float64)
    routed = layer.route(hidden.flatten(0, 1), 3)
    read = nn.functional.gelu(layer.gate_hidden(hidden.flatten(0, 1)))
    scores, chosen = layer.gate(read).softmax(-1).detach(), routed.plan.mask(30).double()
    alike, together = scores.T @ scores, chosen.T @ chosen
    apart = sum(float(together[i, j]) for i in range(EXPERTS) for j in range(EXPERTS) if i != j)
    expected = 0.0
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            own, other = together[i, i] / together.trace(), together[i, j] / apart
            share = EXPERTS * own if i == j else (EXPERTS**2 - EXPERTS) * other
            expected += float(share * alike[i, j]) / 30
    assert routed.loss is not None
    assert routed.loss.item() == pytest.approx(expected)
    even = torch.zeros(30, EXPERTS, dtype=torch.float64)
    everything = moe_layer("expert_race", capacity=EXPERTS).route(tokens(30), 1).plan
    assert float(similarity_loss(even, everything)) == pytest.approx(1)


def test_predictor_loss() -> None:
    """Mean binary cross-entropy, against what training took."""
    layer, hidden = moe_layer().double(), tokens(2, 8, dtype=torch.float64)
    layer(hidden)
    assert layer.plan is not None
    taken, logits = layer.plan.mask(16), layer.capacity_predictor(hidden.flatten(0, 1)).detach()
    total = 0.0
    for token in range(16):
        for expert in range(EXPERTS):
            share = 1 / (1 + math.exp(-float(logits[token, expert])))
            total -= math.log(share if taken[token, expert] else 1 - share)
    assert float(layer.aux_loss) == pytest.approx(total / (16 * EXPERTS))


def test_the_predictor_loss_reaches_the_predictor_alone() -> None:
    found = []
    for weight in (0.0, 1.0):
        layer, hidden = moe_layer(aux_loss_weight=weight), tokens(2, 8).requires_grad_()
        layer(hidden).square().sum().backward()
        assert hidden.grad is not None
        found.append({"input": hidden.grad, **gradients(layer)})
    predictor = {name for name in found[0] if name.startswith("capacity_predictor")}
    assert len(predictor) == 4
    for name, without in found[0].items():
        if name in predictor:
            assert without.abs().max() == 0
            assert found[1][name].abs().max() > 1e-4
        else:
            assert torch.equal(without, found[1][name]), name


# -- injection

MODES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda layer, given: layer(given),
    "reentrant": lambda layer, given: checkpoint(layer, given, use_reentrant=True),
    "non-reentrant": lambda layer, given: checkpoint(layer, given, use_reentrant=False),
}


def added(layer: MoEFeedForward, hidden: Tensor, share: float = 1.0) -> dict[str, Tensor]:
    """Gradients where the loss is added up by hand; the layer adds nothing to them."""
    weight = layer.settings.aux_weight
    silent = moe_layer(layer.settings.router, aux_loss_weight=0.0)
    silent.load_state_dict(layer.state_dict())
    for rows in hidden.split(2):
        total = silent(rows).square().sum() + weight * own_loss(silent, rows)
        (share * total).backward()
    return gradients(silent)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", WITH_LOSS)
def test_a_loss_reaches_the_gradient(router: str, mode: str) -> None:
    """Also where checkpointing computes the layer again; once, whatever is made of the output."""
    layer, hidden = moe_layer(router, aux_loss_weight=0.7), tokens(2, 8)
    MODES[mode](layer, hidden.clone().requires_grad_()).square().sum().backward()
    found, expected = gradients(layer), added(layer, hidden)
    assert_same(found, expected, 1e-5)
    silent = moe_layer(router, aux_loss_weight=0.0)
    silent(hidden).square().sum().backward()
    assert max(float((found[name] - value).abs().max()) for name, value in gradients(silent).items()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", WITH_LOSS)
def test_accumulation(router: str, mode: str) -> None:
    """Two micro-batches, each with half of the loss: their mean."""
    layer, hidden = moe_layer(router, aux_loss_weight=0.7), tokens(4, 8)
    set_aux_loss_scale(layer, 0.5)
    for rows in hidden.split(2):
        (MODES[mode](layer, rows.clone().requires_grad_()).square().sum() / 2).backward()
    assert_same(gradients(layer), added(layer, hidden, 0.5), 1e-5)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        set_aux_loss_scale(layer, 0)


def test_use_has_no_loss() -> None:
    """Nor has collecting, though it chooses as training does while there are no thresholds."""
    layer = moe_layer().eval()
    layer.thresholds.collecting = True
    layer(tokens(2, 8).requires_grad_()).sum().backward()
    assert layer.aux_loss is None
    assert gradients(layer)["capacity_predictor.2.bias"].abs().max() == 0
