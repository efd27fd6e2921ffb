"""TD-LoRA: LoRA whose experts are mixed by time, below dynamic width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamic_networks import (
    FAMILIES,
    dynamic,
    masked,
    random_experts,
    relative,
    sd3,
    sd3_call,
    sit,
    sit_call,
    sliced,
)
from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.adapter import add_timed_lora, bucket_loras, fix_time, plain_lora
from flowaccel.methods.dynamic_width.networks import DYNAMIC
from flowaccel.methods.dynamic_width.td_lora import ADAPTER, ExpertLinear, TimedLoraSettings, timed_layers
from flowaccel.methods.dynamic_width.train import freeze_backbone

ONE, OTHERS = torch.tensor([0.3, 0.3]), torch.tensor([0.2, 0.8])


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Callable[[nn.Module, Tensor], Tensor]]:
    return FAMILIES[request.param]


def adapted(base: nn.Module, **settings: Any) -> Any:
    network = dynamic(base, **settings)
    add_timed_lora(network)
    random_experts(network)
    return network


def test_at_first_it_adds_nothing() -> None:
    network = dynamic(sit())
    before = sliced(sit_call, network, OTHERS)
    add_timed_lora(network)
    assert torch.equal(sliced(sit_call, network, OTHERS), before)
    random_experts(network)
    assert relative(sliced(sit_call, network, OTHERS), before) > 1e-2


def test_it_lies_on_every_gated_layer(family: Any) -> None:
    make, _ = family
    network = dynamic(make())
    gated = {
        id(linear) for gated in network.dynamic.gated_layers for linear in (*gated.rows, *[c for c, _ in gated.columns])
    }
    add_timed_lora(network)
    assert {id(layer.get_base_layer()) for layer in timed_layers(network).values()} == gated


def test_it_is_one_lora_of_stacked_rank_whose_channels_are_gated() -> None:
    torch.manual_seed(0)
    rank, experts, rows, columns, width = 3, 4, 10, 7, 6
    first, second = torch.randn(rank, columns), ExpertLinear(rank, rows, experts, width)
    nn.init.normal_(second.weight)
    nn.init.normal_(second.router.weight)
    second.time = torch.randn(2, width)
    values = torch.randn(2, 5, columns)
    shares = torch.softmax(second.time @ second.router.weight.T, -1)  # (2, E)
    stacked = torch.cat([first] * experts)  # (E r, columns)
    gates = shares.repeat_interleave(rank, dim=1)[:, None]  # (2, 1, E r)
    wanted = (values @ stacked.T * gates) @ second.weight.T
    torch.testing.assert_close(second(values @ first.T), wanted)
    by_expert = second.weight.unflatten(1, (experts, rank))  # (rows, E, r)
    written_out = torch.einsum("be,oer,rc,bnc->bno", shares, by_expert, first, values)
    torch.testing.assert_close(wanted, written_out)


def test_rows_that_share_a_time_share_the_mixed_factor() -> None:
    torch.manual_seed(1)
    layer = ExpertLinear(2, 6, 3, 5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.router.weight)
    time, values = torch.randn(1, 5), torch.randn(4, 3, 2)
    layer.time = time.expand(4, -1)
    wanted = layer(values)
    layer.time = time
    torch.testing.assert_close(layer(values), wanted)


@pytest.mark.parametrize("times", [ONE, OTHERS], ids=["one time", "two times"])
def test_sliced_equals_masked(family: Any, times: Tensor) -> None:
    make, call = family
    network = adapted(make())
    plain = dynamic(make())
    found = sliced(call, network, times)
    assert network.dynamic.cache.held > 0
    assert relative(found, masked(call, network, times)) < 1e-5
    assert relative(found, sliced(call, plain, times)) > 1e-2


def test_the_time_is_that_of_each_row() -> None:
    network = adapted(sit())
    together = sliced(sit_call, network, OTHERS)
    shared = [sliced(sit_call, network, time.expand(2)) for time in OTHERS]
    torch.testing.assert_close(together[0], shared[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], shared[1][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make, call", [FAMILIES["sit"], FAMILIES["sd3"]], ids=["sit", "sd3"])
def test_checkpointing_gives_the_same_gradients(make: Any, call: Any) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        network = adapted(make(), tokens=False)
        freeze_backbone(network)
        network.dynamic.noise = lambda path, shape: torch.zeros(shape)
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        call(network, OTHERS).square().mean().backward()
        return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}

    found, wanted = gradients(True), gradients(False)
    assert found.keys() == wanted.keys()
    mixers = [name for name in wanted if f"{ADAPTER}.router" in name]
    assert mixers
    for name in mixers:  # the queries of the text in SD3's last block lead nowhere
        assert bool(wanted[name].any()) or "add_q_proj" in name, name
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_it_is_not_merged_unless_the_time_is_fixed() -> None:
    network = adapted(sd3())
    with pytest.raises(ValueError, match="depends on the timestep"):
        network.fuse_lora()
    layer = next(iter(timed_layers(network).values()))
    assert not layer.merged
    with pytest.raises(ValueError, match="depends on the timestep"):
        layer.get_delta_weight(ADAPTER)

    wanted = sliced(sd3_call, network, ONE)
    weight = layer.get_base_layer().weight.detach().clone()
    fix_time(network, 1000 * 0.3)
    assert relative(sliced(sd3_call, network, ONE), wanted) < 1e-5
    network.fuse_lora()
    assert relative(sliced(sd3_call, network, ONE), wanted) < 1e-5
    with pytest.raises(ValueError, match="unmerge it"):
        fix_time(network, None)
    network.unfuse_lora()
    torch.testing.assert_close(layer.get_base_layer().weight, weight)
    fix_time(network, None)
    assert relative(sliced(sd3_call, network, ONE), wanted) < 1e-5


def stock_with(state: dict[str, Tensor], folder: Path) -> Any:
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    network = sd3()
    network.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    return network


def test_a_plain_lora_loads_into_the_stock_network(tmp_path: Path) -> None:
    network = adapted(sd3())
    with network.dynamic.complete():
        wanted = sliced(sd3_call, network, ONE)
    stock = stock_with(plain_lora(network, torch.tensor([1000 * 0.3])), tmp_path)
    assert relative(sliced(sd3_call, stock, ONE), wanted) < 1e-5
    assert relative(sliced(sd3_call, sd3(), ONE), wanted) > 1e-2

    for layer in timed_layers(network).values():
        nn.init.zeros_(layer.experts.router.weight)
    with network.dynamic.complete():
        alike = sliced(sd3_call, network, ONE)
    assert relative(alike, wanted) > 1e-3
    assert relative(sliced(sd3_call, stock_with(plain_lora(network), tmp_path), ONE), alike) < 1e-5


def test_a_bucket_for_each_time_is_exact(tmp_path: Path) -> None:
    network = adapted(sd3())
    times = torch.tensor([900.0, 500.0, 100.0])
    states = bucket_loras(network, times, 3)
    for time, state in zip(times, states, strict=True):
        with network.dynamic.complete():
            wanted = sliced(sd3_call, network, time.expand(2) / 1000)
        assert relative(sliced(sd3_call, stock_with(state, tmp_path), time.expand(2) / 1000), wanted) < 1e-5
    assert len(bucket_loras(network, times, 2)) == 2
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of times, 3, got {wrong}"):
            bucket_loras(network, times, wrong)


def test_the_published_share_of_parameters_is_trained() -> None:
    sizes = {"sample_size": 32, "patch_size": 2, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
    with torch.device("meta"):
        network: Any = DYNAMIC["SiTTransformer2DModel"](**sizes, dynamic_config={})
        add_timed_lora(network)
    freeze_backbone(network)
    trained = sum(value.numel() for value in network.parameters() if value.requires_grad)
    total = sum(value.numel() for value in network.parameters())
    assert 670e6 < total - trained < 680e6
    assert 0.012 < trained / total <= 0.015


def test_a_plain_lora_beside_it_works_and_leaves_it_active() -> None:
    network = adapted(sd3())
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "proj", "linear"]), "style")
    layers = timed_layers(network)
    without = sliced(sd3_call, network, ONE)  # its second factor is 0
    for layer in layers.values():
        if "style" in layer.lora_B:
            nn.init.normal_(layer.lora_B["style"].weight, std=0.3)
    network.set_adapters(["style"])
    assert all(ADAPTER in layer.active_adapters for layer in layers.values())
    found = sliced(sd3_call, network, ONE)
    assert relative(found, without) > 1e-2
    assert relative(found, masked(sd3_call, network, ONE)) < 1e-5
    adapted_layers = [name for name, layer in network.named_modules() if hasattr(layer, "merged_adapters")]
    with pytest.raises(ValueError, match="depends on the timestep"):
        network.fuse_lora()
    assert not any(network.get_submodule(name).merged for name in adapted_layers)
    network.fuse_lora(adapter_names=["style"])
    assert (
        relative(sliced(sd3_call, network, OTHERS[:1].expand(2)), masked(sd3_call, network, OTHERS[:1].expand(2)))
        < 1e-5
    )
    assert relative(sliced(sd3_call, network, ONE), found) < 1e-5
    network.unfuse_lora()
    assert relative(sliced(sd3_call, network, ONE), found) < 1e-5
    network.delete_adapters("style")
    assert relative(sliced(sd3_call, network, ONE), without) < 1e-6


@pytest.mark.parametrize("remove", [lambda net: net.unload_lora(), lambda net: net.delete_adapters(ADAPTER)])
def test_without_it_the_network_does_not_run(remove: Callable[[Any], None]) -> None:
    network = adapted(sd3())
    remove(network)
    with pytest.raises(ValueError, match="the TD-LoRA that the gates were trained with is gone"):
        sliced(sd3_call, network, ONE)


def test_it_joins_a_plain_lora_that_was_there() -> None:
    network = dynamic(sd3())
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    before = sliced(sd3_call, network, ONE)
    add_timed_lora(network)
    assert relative(sliced(sd3_call, network, ONE), before) < 1e-6
    random_experts(network)
    found = sliced(sd3_call, network, OTHERS)
    assert relative(found, masked(sd3_call, network, OTHERS)) < 1e-5


def test_wrong_use() -> None:
    network = adapted(sit())
    with pytest.raises(ValueError, match="has a TD-LoRA already"):
        add_timed_lora(network)
    with pytest.raises(ValueError, match="no TD-LoRA; add_timed_lora"):
        plain_lora(dynamic(sit()))
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        TimedLoraSettings(rank=0)
    with pytest.raises(ValueError, match=r"experts must be an integer of at least 1, got 1\.5"):
        TimedLoraSettings(experts=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha must be positive"):
        TimedLoraSettings(alpha=0)
    dora = dynamic(sit())
    with pytest.raises(UnsupportedModelError, match=r"adapters of other forms: \{'style': 'DoraLinearVariant'\}"):
        dora.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "style")
        sliced(sit_call, dora, ONE)


def test_what_it_shares_with_others_is_left_alone() -> None:
    base = sit()
    base.requires_grad_(True)
    base.pos_embed.requires_grad_(False)
    wanted = [value.requires_grad for value in base.parameters()]
    names = [name for name, _ in base.named_modules()]
    before = sliced(sit_call, base, OTHERS)
    adapted(base)
    assert [value.requires_grad for value in base.parameters()] == wanted
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(sliced(sit_call, base, OTHERS), before)
