"""Plain LoRAs of users on networks with dynamic width, and what is cut when weights change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dynamic_networks import FAMILIES, WITH_LOADER, dynamic, masked, relative, sd3, sd3_call, sit, sit_call, sliced
from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.networks import make_dynamic

ONE, OTHERS = torch.tensor([0.4, 0.4]), torch.tensor([0.15, 0.9])
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "ff.net.0.proj", "ff.net.2"]
TARGETS += ["proj_mlp", "proj_out", "linear"]
"""Gated layers and others."""


@pytest.fixture(params=WITH_LOADER)
def family(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Callable[[nn.Module, Tensor], Tensor]]:
    return FAMILIES[request.param]


def add_lora(network: Any, name: str, seed: int, targets: list[str] | None = None, rank: int = 3) -> None:
    """A random LoRA."""
    torch.manual_seed(seed)
    ends = tuple(f".{target}" for target in targets or TARGETS)
    paths = [path for path, _ in network.named_modules() if path.endswith(ends) and not path.startswith("dynamic.")]
    network.add_adapter(LoraConfig(r=rank, target_modules=paths, init_lora_weights=False), name)


@pytest.mark.parametrize("times", [ONE, OTHERS], ids=["one time", "two times"])
@pytest.mark.parametrize("first", [True, False], ids=["lora first", "lora afterwards"])
def test_sliced_equals_masked(family: Any, times: Tensor, first: bool) -> None:
    make, call = family
    base = make()
    if first:
        add_lora(base, "style", 1)
    network = dynamic(base)
    if not first:
        without = sliced(call, network, times)
        add_lora(network, "style", 1)
        assert relative(sliced(call, network, times), without) > 1e-2
    found = sliced(call, network, times)
    assert network.dynamic.cache.held > 0
    assert relative(found, masked(call, network, times)) < 1e-5


def test_with_everything_on_it_is_the_stock_network_with_that_lora(family: Any) -> None:
    make, call = family
    stock = make()
    add_lora(stock, "style", 2)
    wanted = sliced(call, stock, OTHERS)
    everything = {"normalise": True}  # published routers, random, may switch off a token of these large activations
    assert torch.equal(sliced(call, make_dynamic(stock, everything), OTHERS), wanted)
    afterwards = make_dynamic(make(), everything)
    add_lora(afterwards, "style", 2)
    assert torch.equal(sliced(call, afterwards, OTHERS), wanted)
    assert torch.equal(sliced(call, stock, OTHERS), wanted)


def test_a_file_loads_as_into_the_stock_network(family: Any, tmp_path: Path) -> None:
    make, call = family
    stock = make()
    stock.add_adapter(LoraConfig(r=2, target_modules=["to_k", "proj_mlp", "proj"], init_lora_weights=False), "style")
    stock.save_lora_adapter(tmp_path, "style")
    network = make_dynamic(make())
    file = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
    network.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", **file)
    assert torch.equal(sliced(call, network, OTHERS), sliced(call, stock, OTHERS))


def test_several_adapters() -> None:
    network = dynamic(sd3())
    sliced(sd3_call, network, ONE)
    add_lora(network, "style", 3)
    style = sliced(sd3_call, network, ONE)
    add_lora(network, "subject", 4, ["to_q", "ff.net.2"], rank=2)
    network.set_adapters(["style", "subject"], [1.0, 0.5])
    both = sliced(sd3_call, network, ONE)
    assert relative(both, style) > 1e-2
    assert relative(both, masked(sd3_call, network, ONE)) < 1e-5
    network.set_adapters(["style"])
    assert relative(sliced(sd3_call, network, ONE), style) < 1e-6
    network.delete_adapters("subject")
    assert relative(sliced(sd3_call, network, ONE), style) < 1e-6


def test_a_fused_lora_counts_at_once() -> None:
    network = dynamic(sd3())
    without = sliced(sd3_call, network, ONE)
    add_lora(network, "style", 5)
    wanted = sliced(sd3_call, network, ONE)
    network.fuse_lora()
    assert relative(sliced(sd3_call, network, ONE), wanted) < 1e-5
    network.unfuse_lora()
    assert relative(sliced(sd3_call, network, ONE), wanted) < 1e-5
    network.fuse_lora()
    sliced(sd3_call, network, ONE)
    network.disable_lora()
    assert relative(sliced(sd3_call, network, ONE), without) < 1e-5
    network.enable_lora()
    assert relative(sliced(sd3_call, network, ONE), wanted) < 1e-5
    network.fuse_lora(lora_scale=0.5)
    half = sliced(sd3_call, network, ONE)
    assert relative(half, wanted) > 1e-3 and relative(half, without) > 1e-3
    assert relative(half, masked(sd3_call, network, ONE)) < 1e-5
    network.unload_lora()  # keeps what was fused
    assert relative(sliced(sd3_call, network, ONE), half) < 1e-6


def test_an_unloaded_lora_leaves_nothing() -> None:
    network = dynamic(sd3())
    wanted = sliced(sd3_call, network, ONE)
    for seed in (6, 7):
        add_lora(network, "style", seed)
        found = sliced(sd3_call, network, ONE)
        assert relative(found, masked(sd3_call, network, ONE)) < 1e-5
        network.unload_lora()
    assert torch.equal(sliced(sd3_call, network, ONE), wanted)


def test_another_lora_between_two_calls_is_seen() -> None:
    network = dynamic(sd3())
    outputs = []
    for seed in (8, 9):
        add_lora(network, "style", seed)
        outputs.append(sliced(sd3_call, network, ONE))
        network.unload_lora()  # no call before the next one is loaded
    assert relative(outputs[0], outputs[1]) > 1e-2
    fresh = dynamic(sd3())
    add_lora(fresh, "style", 9)
    assert relative(outputs[1], sliced(sd3_call, fresh, ONE)) < 1e-6


def test_other_adapters_are_refused() -> None:
    base = sit()
    base.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "dora")
    with pytest.raises(UnsupportedModelError, match="plain LoRA, but there are adapters of other forms"):
        make_dynamic(base)


def test_weights_that_changed_are_cut_again() -> None:
    network = dynamic(sit())
    sliced(sit_call, network, ONE)
    with torch.no_grad():
        for linear in network.dynamic.gated_layers[0].rows:
            linear.weight.mul_(1.5)
    assert relative(sliced(sit_call, network, ONE), masked(sit_call, network, ONE)) < 1e-5
    sliced(sit_call, network, ONE)
    masked(sit_call, network, ONE)  # a step of training, after which averaged weights are written unseen
    for linear in network.dynamic.gated_layers[0].rows:
        linear.weight.data.mul_(0.5)
    assert relative(sliced(sit_call, network, ONE), masked(sit_call, network, ONE)) < 1e-5
