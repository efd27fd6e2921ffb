"""The SiT network: sizes, errors, and the tools of diffusers and PEFT on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from flowaccel import SiTTransformer2DModel
from flowaccel.methods.flowturbo.accelerator import new_refiner
from helpers import GOLDEN, assert_close
from tiny import latent_sit

COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())
REFINER_NAME = "refiner (1 block, hidden 1152, heads 16, 8 input channels)"
LABELS = torch.tensor([1, 10, 4])
LORA = {"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), LABELS


def sizes(network: SiTTransformer2DModel) -> dict[str, int]:
    parameters = list(network.parameters())
    return {
        "total_with_pos_embed": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "num_state_dict_entries": len(network.to_official()),
    }


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


# --- sizes


@pytest.mark.parametrize("key", COUNTS["SiT"]["counts"])
def test_published_sizes(key: str) -> None:
    """Without memory: the networks are made on the meta device."""
    name, *options = key.split()
    given = dict(option.split("=") for option in options)
    with torch.device("meta"):
        network = SiTTransformer2DModel.from_preset(
            name, learn_sigma=given["learn_sigma"] == "True", sample_size=int(given.get("input_size", 32))
        )
    assert sizes(network) == COUNTS["SiT"]["counts"][key]


def test_refiner_size() -> None:
    with torch.device("meta"):
        base = SiTTransformer2DModel.from_preset("SiT-XL/2")
        refiner = new_refiner(base)
    assert sizes(refiner) == COUNTS["FlowTurbo"]["counts"][REFINER_NAME]
    assert sizes(refiner)["trainable"] == 29_414_048
    assert sizes(base) == COUNTS["FlowTurbo"]["counts"]["teacher (28 blocks)"]


@pytest.mark.parametrize("name", ["SiT-B/4", "B/4"])
def test_preset_names(name: str) -> None:
    with torch.device("meta"):
        network = SiTTransformer2DModel.from_preset(name, num_classes=7)
    config = network.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (12, 12, 64)
    assert (config.patch_size, config.num_classes) == (4, 7)


@pytest.mark.parametrize("name", ["SiT-XXL/2", "SiT-S/3", "SiT-S", "", "DiT-S/2", "SiT-S/2 ", "sit-s/2"])
def test_unknown_presets(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown SiT size .* SiT-\{S,B,L,XL\}/\{2,4,8\}"):
        SiTTransformer2DModel.from_preset(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 9}, "sample_size must be a multiple of patch_size, got 9 and 2"),
        ({"num_attention_heads": 3, "attention_head_dim": 3}, r"must be a multiple of 4, got 9"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_sit(**options)


@pytest.mark.parametrize(("width", "hidden"), [(44, 120), (48, 192), (196, 256)])
def test_hidden_width_is_exact(width: int, hidden: int) -> None:
    """44 * (120 / 44) is 119.99...: the ratio of a checkpoint must give its own hidden width."""
    network = latent_sit(num_layers=1, num_attention_heads=1, attention_head_dim=width, mlp_ratio=hidden / width)
    assert network.transformer_blocks[0].ff.net[2].weight.shape == (width, hidden)


# --- forward


def test_fresh_network_returns_zero(inputs: Any) -> None:
    network = SiTTransformer2DModel(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    assert not network(*inputs).sample.any()


@pytest.mark.parametrize("shape", [(3, 4, 8, 4), (3, 3, 8, 8), (3, 4, 16, 16), (4, 8, 8)])
def test_wrong_input_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, 4, 8, 8\), got"):
        latent_sit()(torch.zeros(shape), 0.5, LABELS)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_channels(inputs: Any, learn_sigma: bool) -> None:
    sample = latent_sit(out_channels=3, learn_sigma=learn_sigma)(*inputs).sample
    assert sample.shape == (3, 3, 8, 8)


def test_return_dict(inputs: Any) -> None:
    network = latent_sit()
    (sample,) = network(*inputs, return_dict=False)
    assert torch.equal(sample, network(*inputs).sample)


@pytest.mark.parametrize("time", [0.3, torch.tensor(0.3), torch.tensor([0.3])])
def test_one_time_for_all_rows(inputs: Any, time: Any) -> None:
    hidden_states, _, labels = inputs
    network = latent_sit()
    expected = network(hidden_states, torch.full((3,), 0.3), labels).sample
    assert torch.equal(network(hidden_states, time, labels).sample, expected)


def test_rows_do_not_see_each_other(inputs: Any) -> None:
    network = latent_sit()
    together = network(*inputs).sample
    singly = torch.cat([network(*(value[i : i + 1] for value in inputs)).sample for i in range(3)])
    assert_close(together, singly, 1e-5)


def test_without_null_class(inputs: Any) -> None:
    hidden_states, time, _ = inputs
    network = latent_sit(null_class=False)
    assert network.label_embed.weight.shape[0] == 10
    assert network(hidden_states, time, torch.tensor([0, 9, 4])).sample.isfinite().all()
    with pytest.raises(IndexError):
        network(hidden_states, time, LABELS)
    same = SiTTransformer2DModel.from_official(network.to_official(), num_attention_heads=4, null_class=False)
    assert same.config.num_classes == 10


def test_position_table_is_frozen() -> None:
    network = latent_sit()
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["pos_embed"]


# --- the tools of diffusers and PEFT


@pytest.mark.parametrize(
    "config", [{}, {"learn_sigma": False, "null_class": False, "patch_size": 4, "out_channels": 2}]
)
def test_save_and_load(inputs: Any, config: dict[str, Any], tmp_path: Path) -> None:
    network = latent_sit(**config)
    network.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training and not loaded.pos_embed.requires_grad
    hidden_states, time, _ = inputs
    labels = torch.tensor([0, 9, 4])
    assert torch.equal(loaded(hidden_states, time, labels).sample, network(hidden_states, time, labels).sample)
    assert public(loaded.config) == public(network.config)


def test_gradient_checkpointing_changes_nothing(inputs: Any) -> None:
    network = latent_sit().train()

    def gradients() -> list[Tensor]:
        network.zero_grad()
        network(*inputs).sample.square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.requires_grad]

    plain = gradients()
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    for recomputed, expected in zip(gradients(), plain, strict=True):
        assert_close(recomputed, expected, 1e-6)


@torch.no_grad()
def test_fused_projections(inputs: Any) -> None:
    network = latent_sit()
    plain, official = network(*inputs).sample, network.to_official()
    network.fuse_qkv_projections()
    assert network.transformer_blocks[0].attn.fused_projections
    assert_close(network(*inputs).sample, plain, 1e-6)
    assert network.to_official().keys() == official.keys()
    network.unfuse_qkv_projections()
    assert torch.equal(network(*inputs).sample, plain)


@torch.no_grad()
def test_lora_adapter(inputs: Any) -> None:
    network = latent_sit()
    plain, keys = network(*inputs).sample, set(network.state_dict())
    network.add_adapter(LoraConfig(**LORA))
    adapted = network(*inputs).sample
    assert (adapted - plain).abs().max() > 1e-3
    network.disable_adapters()
    assert torch.equal(network(*inputs).sample, plain)
    network.enable_adapters()
    assert torch.equal(network(*inputs).sample, adapted)
    network.unload_lora()
    assert torch.equal(network(*inputs).sample, plain)
    assert set(network.state_dict()) == keys


@torch.no_grad()
def test_lora_adapter_is_saved_and_loaded(inputs: Any, tmp_path: Path) -> None:
    network = latent_sit()
    network.add_adapter(LoraConfig(**LORA), adapter_name="style")
    network.save_lora_adapter(tmp_path, adapter_name="style")
    other = latent_sit()
    other.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
    assert torch.equal(other(*inputs).sample, network(*inputs).sample)


@torch.no_grad()
def test_layerwise_casting(inputs: Any) -> None:
    network = latent_sit()
    plain = network(*inputs).sample
    network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert network.transformer_blocks[0].ff.net[2].weight.dtype == torch.bfloat16
    assert network.pos_embed.dtype == network.dtype == torch.float32
    cast = network(*inputs).sample
    assert cast.dtype == torch.float32
    assert 0 < (cast - plain).abs().max() < 0.02 * plain.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(inputs: Any, options: dict[str, Any]) -> None:
    """On one device, where nothing moves; that every weight is found is what this shows."""
    network = latent_sit()
    plain = network(*inputs).sample
    if options["offload_type"] == "block_level":
        options = {**options, "num_blocks_per_group": 1}
    cpu = torch.device("cpu")
    network.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    assert torch.equal(network(*inputs).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(inputs: Any, dtype: torch.dtype) -> None:
    hidden_states, time, labels = inputs
    network = latent_sit()
    plain = network(*inputs).sample
    half = network.to(dtype)(hidden_states.to(dtype), time, labels).sample
    assert half.dtype == dtype
    assert (half.float() - plain).abs().max() < 0.03 * plain.abs().max()


@torch.no_grad()
def test_compiles_into_one_graph(inputs: Any) -> None:
    """`fullgraph` raises at the first graph break; other times and labels must not compile again."""
    hidden_states, time, labels = inputs
    network = latent_sit()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_close(compiled(*inputs).sample, network(*inputs).sample, 1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = compiled(hidden_states, time * 0.9, labels.flip(0)).sample
    assert_close(again, network(hidden_states, time * 0.9, labels.flip(0)).sample, 1e-6)
