"""Experts as modules, for adapters, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flowaccel.methods.moe.control import pack_experts, set_experts_backend, unpack_experts
from flowaccel.methods.moe.experts import ExpertModules, Experts
from moe_parts import EXPERTS, fit, gradients, moe_layer, tokens


class Holder(nn.Module):
    """A network of one layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.ff = moe_layer(**settings)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.ff(hidden)
        return output


@pytest.mark.parametrize("activation_fn", ["gelu-approximate", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["training", "use"])
def test_unpacked_computes_the_same(activation_fn: str, bias: bool, training: bool) -> None:
    network, hidden = Holder(activation_fn=activation_fn, bias=bias), tokens(2, 8)
    if not training:
        fit(network.ff)
    output = network(hidden)
    output.square().sum().backward()
    packed = gradients(network)
    network.zero_grad()
    unpack_experts(network)
    assert isinstance(network.ff.experts, ExpertModules)
    assert network.ff.experts.training == training
    found = network(hidden)
    torch.testing.assert_close(found, output)
    found.square().sum().backward()
    parts = gradients(network)
    names = [("w_in", "proj_in.weight"), ("w_out", "proj_out.weight")]
    names += [("b_in", "proj_in.bias"), ("b_out", "proj_out.bias")] if bias else []
    for ours, theirs in names:
        together = torch.stack([parts[f"ff.experts.{expert}.{theirs}"] for expert in range(EXPERTS)])
        assert together.abs().max() > 1e-3
        torch.testing.assert_close(together, packed[f"ff.experts.{ours}"])
    assert not any("w_in" in name for name in parts)


def test_packing_gives_back_what_was_there() -> None:
    network = Holder()
    set_experts_backend(network, "grouped_mm")
    network.ff.experts.w_in.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in network.named_parameters()}
    unpack_experts(network)
    unpack_experts(network)  # nothing more to unpack
    state = torch.get_rng_state()
    pack_experts(network)
    pack_experts(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(network.ff.experts, Experts)
    assert network.ff.experts.backend == "grouped_mm"
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name


def test_unpacking_copies_no_weights_and_follows_a_move() -> None:
    network = Holder()
    place = network.ff.experts.w_in.data_ptr()
    unpack_experts(network)
    assert network.ff.experts[0].proj_in.weight.data_ptr() == place
    network.ff.experts.to(torch.bfloat16)
    pack_experts(network)
    assert {value.dtype for value in network.ff.experts.parameters()} == {torch.bfloat16}


def test_an_adapter_of_experts() -> None:
    """Attached to an expert's first layer, trained, refused while it is there, fused, packed."""
    network, hidden = Holder(), tokens(2, 8)
    before = network(hidden).detach()
    unpack_experts(network)
    adapted: Any = get_peft_model(network, LoraConfig(r=2, target_modules=r".*experts\.\d+\.proj_in"))  # type: ignore[arg-type]
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * EXPERTS
    assert all("lora" in name for name in trained)
    torch.testing.assert_close(adapted(hidden).detach(), before)
    optimiser = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], 1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        adapted(hidden).square().sum().backward()
        optimiser.step()
    after = adapted(hidden).detach()
    assert (after - before).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"expert 0 has a peft\.\S+\.Linear as proj_in, which cannot be packed"):
        pack_experts(network)
    assert isinstance(network.ff.experts, ExpertModules)
    network = adapted.merge_and_unload()
    torch.testing.assert_close(network(hidden).detach(), after, atol=1e-5, rtol=1e-5)
    pack_experts(network)
    assert isinstance(network.ff.experts, Experts)
    torch.testing.assert_close(network(hidden).detach(), after, atol=1e-5, rtol=1e-5)
