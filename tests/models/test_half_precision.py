"""Every network of ours in half precision, however it comes to it, and with weights stored in eight bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import dynamic_networks
import moe_parts
from flowaccel.methods.dynamic_width.network import Dynamics
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.policy.heads import DecisionHead
from flowaccel.methods.policy.network import AccelerationPolicy
from policies import policy_for

TIMES = torch.tensor([0.3, 0.7])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def mediators() -> Any:
    return MediatorSiTTransformer2DModel.from_base(dynamic_networks.sit(), {"counts": (4,)}).eval()


def experts(family: str) -> Any:
    make, call = dynamic_networks.FAMILIES[family]
    network = moe_parts.with_experts(make())
    return moe_parts.fit_layers(network, lambda: call(network, TIMES))


NETWORKS = {
    "sit": dynamic_networks.sit,
    "sit mediators": mediators,
    **{f"{name} dynamic": lambda make=make: dynamic_networks.dynamic(make()) for name, (make, _) in
       dynamic_networks.FAMILIES.items()},
    **{f"{name} experts": lambda name=name: experts(name) for name in ("sit", "sd3", "flux", "dit")},
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", NETWORKS)


@torch.no_grad()
def called(name: str, network: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    noise = dynamic_networks._noise
    with monkeypatch.context() as patch:
        patch.setattr(dynamic_networks, "_noise", lambda *shape: noise(*shape).to(dtype))
        return dynamic_networks.FAMILIES[name.split()[0]][1](network.eval(), TIMES.to(dtype))


def decides(network: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors that decide what is computed."""
    found = {}
    for path, module in network.named_modules():
        parts = (*module.named_parameters(path), *module.named_buffers(path))
        if isinstance(module, (Dynamics, DecisionHead)):
            found |= dict(parts)
        if isinstance(module, MoEFeedForward):
            found |= {key: value for key, value in parts if not key.startswith((f"{path}.experts", f"{path}.shared"))}
    return {key: value for key, value in found.items() if value.is_floating_point()}


@EVERY
@HALVES
def test_networks_in_half_precision(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded or cast, all weights are of the type but for what decides, which is as it was; the result is near."""
    network = NETWORKS[name]()
    network.save_pretrained(tmp_path)
    expected = called(name, network, torch.float32, monkeypatch)
    halves = [type(network).from_pretrained(tmp_path, torch_dtype=dtype), copy.deepcopy(network).to(dtype)]
    if dtype == torch.float16:
        halves.append(copy.deepcopy(network).half())
    for half in halves:
        routing, given = decides(half), decides(network)
        assert all(torch.equal(routing[key], given[key]) and routing[key].dtype == torch.float32 for key in given)
        assert {value.dtype for key, value in half.named_parameters() if key not in routing} == {dtype}
        found = called(name, half, dtype, monkeypatch)
        assert half.dtype == found.dtype == dtype
        assert (found - expected).norm() < 0.3 * expected.norm()


@HALVES
@pytest.mark.parametrize("name", ["sit", "sit mediators"])
def test_loading_all_weights_at_once_gives_the_type_too(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`low_cpu_mem_usage=False`, the only way without accelerate, makes the network in that type and copies into it."""
    network = NETWORKS[name]()
    network.save_pretrained(tmp_path)
    half = type(network).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=False)
    assert {value.dtype for value in half.parameters()} == {half.dtype} == {dtype}
    assert torch.equal(called(name, half, dtype, monkeypatch), called(name, network.to(dtype), dtype, monkeypatch))


@HALVES
@torch.no_grad()
def test_a_policy_decides_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = policy_for(dynamic_networks.tiny.sit_pipeline())
    policy.save_pretrained(tmp_path)
    features, condition = torch.randn(2, 1, 8, 8).to(dtype), torch.randn(2, policy.config.condition_dim).to(dtype)
    expected = policy("step", features, condition)
    for half in (AccelerationPolicy.from_pretrained(tmp_path, torch_dtype=dtype), copy.deepcopy(policy).to(dtype)):
        assert torch.equal(half.eval()("step", features, condition), expected)


# --- weights stored in eight bits


def rounded(network: Any, stored: Any) -> Any:
    """`network` with the weights that `stored` has in eight bits rounded to these."""
    for key, value in stored.named_parameters():
        if value.dtype == torch.float8_e4m3fn:
            parameter = network.get_parameter(key)
            parameter.data = parameter.data.to(value.dtype).to(parameter.dtype)
    return network


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "with a LoRA"])
@pytest.mark.parametrize("name", ["sit dynamic", "sd3 dynamic", "flux dynamic", "sit experts", "sit mediators"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layerwise_casting(name: str, lora: bool, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network computes with its stored weights in the type of computation, also where it takes parts of them."""
    network = NETWORKS[name]().to(compute)
    if lora:
        modules = ["to_q", "to_k", "to_out.0", "net.0.proj", "net.2"]
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False))
    plain = copy.deepcopy(network)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    plain = rounded(plain, network)
    assert any(value.dtype == torch.float8_e4m3fn for value in network.parameters())
    for _ in range(2):
        found = called(name, network, compute, monkeypatch)
        assert torch.equal(found, called(name, plain, compute, monkeypatch))
