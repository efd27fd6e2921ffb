"""Training routers and a TD-LoRA alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamic_networks import sit
from flowaccel.data import digits
from flowaccel.methods.dynamic_width.adapter import add_timed_lora
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.td_lora import timed_layers
from flowaccel.methods.dynamic_width.train import MacsCosts, WidthObjective, freeze_backbone
from flowaccel.training.loop import LoopConfig, train


@pytest.mark.parametrize("timed", [False, True], ids=["routers", "routers and TD-LoRA"])
def test_only_routers_and_experts_learn(tmp_path: Path, timed: bool) -> None:
    network = make_dynamic(sit(), DynamicSettings(normalise=True, bias=1.0, token_bias=1.0))
    if timed:
        add_timed_lora(network)
    network.requires_grad_(True)
    freeze_backbone(network)
    example = {
        "hidden_states": torch.zeros(1, 1, 8, 8),
        "timestep": torch.zeros(1),
        "class_labels": torch.zeros(1, dtype=torch.long),
    }
    objective = WidthObjective(
        data=digits("generator"),
        null_label=network.null_label,
        costs=MacsCosts.of(network, example, 1),
        ramp_start=0,
        ramp=1,
        batch_size=8,
        complete_steps=3,
    )
    objective.prepare(network)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    assert len(list(train(network, objective, LoopConfig(steps=3, learning_rate=1e-2, ema_decay=0), tmp_path))) == 3
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    learned = {name for name in before if name.startswith("dynamic.blocks.") or ".lora_" in name}
    assert moved <= learned
    assert all(".tokens." in name for name in learned - moved)  # one hidden channel, which may be dead
    assert any(name.endswith(".tokens.2.bias") for name in moved)
    assert any(".lora_B." in name for name in moved) == timed


def test_experts_become_different() -> None:
    network = make_dynamic(sit())
    add_timed_lora(network)
    freeze_backbone(network)
    network.train()
    optimizer = torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=0.1)
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        with network.dynamic.complete():
            found = network(torch.randn(8, 1, 8, 8), torch.rand(8), torch.arange(8), return_dict=False)[0]
        (found - 1).square().mean().backward()
        optimizer.step()
    for layer in timed_layers(network).values():
        first, second, *_ = layer.experts.weight.detach().unflatten(1, (4, 4)).unbind(1)
        assert float((first - second).norm() / first.norm()) > 1e-3  # of experts that start alike: about 1e-7


def test_the_loss_of_the_whole_network_reaches_the_experts() -> None:
    network = make_dynamic(sit())
    add_timed_lora(network)
    freeze_backbone(network)
    network.train()
    with network.dynamic.complete():
        network(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]), return_dict=False)[
            0
        ].square().mean().backward()
    reached = {name for name, value in network.named_parameters() if value.grad is not None and bool(value.grad.any())}
    assert reached and all(".lora_B.timed." in name for name in reached)  # the first factor follows, once these moved
