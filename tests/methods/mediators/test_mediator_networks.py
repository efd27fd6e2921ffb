"""SiT with mediators: from a softmax network, several numbers in one, other sizes, saving, adapters, compiling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

import tiny
from flowaccel.errors import CheckpointError, UnsupportedModelError
from flowaccel.hooks import macs_by_module
from flowaccel.methods.mediators.attention import GridAttention, MediatorAttention, SoftmaxGridAttention
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel, mediator_layers, set_mediators
from flowaccel.methods.mediators.settings import MediatorSettings
from flowaccel.models.sit import SiTAttention, SiTAttnProcessor

BLOCKS = 3


def network(counts: Any = (4, 16), seed: int = 0, **settings: Any) -> Any:
    """Three blocks on 4 x 4 tokens; every weight is random, so that every table counts."""
    base = tiny.sit_network(seed)
    other = MediatorSiTTransformer2DModel.from_base(copy.deepcopy(base), {"counts": counts, **settings})
    tiny.random_weights(other, seed + 1, std=0.3)
    return other.eval()


def call(net: Any, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    size = net.config.sample_size
    x = torch.randn(rows, 1, size, size, generator=generator).to(net.dtype)
    output: Tensor = net(x, torch.linspace(0.2, 0.8, rows), torch.arange(rows), return_dict=False)[0]
    return output


def kinds(net: Any) -> list[type]:
    return [type(block.attn) for block in net.transformer_blocks]


# --- from a softmax network


@torch.no_grad()
def test_made_over_it_has_the_weights_and_no_biases_yet() -> None:
    base = tiny.sit_network()
    before, names = call(base), [(name, type(module)) for name, module in base.named_modules()]
    made = MediatorSiTTransformer2DModel.from_base(base, MediatorSettings(counts=(16,)))
    own = dict(made.named_parameters())
    for name, parameter in base.named_parameters():
        assert own.pop(name) is parameter
    assert own and all(not parameter.any() for parameter in own.values())
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    assert torch.equal(call(base), before)
    assert not torch.allclose(call(made), before, atol=1e-3)  # 16 mediators of 16 tokens are two softmaxes


@torch.no_grad()
def test_full_attention_with_biases_at_zero_is_the_softmax_network() -> None:
    base = tiny.sit_network()
    control = MediatorSiTTransformer2DModel.from_base(base, MediatorSettings(counts=None))
    assert kinds(control) == [SoftmaxGridAttention] * BLOCKS and not mediator_layers(control)
    torch.testing.assert_close(call(control), call(base), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("other", [network(), tiny.sd3_pipeline().transformer], ids=["with mediators", "SD3"])
def test_only_the_stock_network_can_be_made_over(other: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"put into a SiTTransformer2DModel, got a (MediatorSiT|SD3)"):
        MediatorSiTTransformer2DModel.from_base(other)


def test_without_settings_it_is_the_stock_network() -> None:
    base = tiny.sit_network()
    own = {name: value for name, value in base.config.items() if not name.startswith("_")}
    stock = MediatorSiTTransformer2DModel(**own).eval()
    stock.load_state_dict(base.state_dict())
    assert kinds(stock) == [SiTAttention] * BLOCKS and stock.config.mediator_config is None
    with torch.no_grad():
        assert torch.equal(call(stock), call(base))


def test_only_some_blocks() -> None:
    net = network(layers=(0, 2))
    assert kinds(net) == [MediatorAttention, SiTAttention, MediatorAttention]
    assert list(mediator_layers(net)) == ["transformer_blocks.0.attn", "transformer_blocks.2.attn"]


@pytest.mark.parametrize(("option", "missing"), [("use_bias", "mediator_biases"), ("use_dwc", "dwc")])
def test_parts_that_are_left_out(option: str, missing: str) -> None:
    whole, net = network(), network(**{option: False})
    assert any(missing in name for name in whole.state_dict())
    assert not any(missing in name for name in net.state_dict())
    assert not torch.allclose(call(net), call(whole), atol=1e-2)


# --- several numbers of mediators


@pytest.mark.parametrize("count", [4, 16])
@torch.no_grad()
def test_each_number_gives_what_a_network_with_that_one_gives(count: int) -> None:
    net = network()
    set_mediators(net, count)
    alone = network((count,), seed=7)
    alone.load_state_dict({name: net.state_dict()[name] for name in alone.state_dict()})
    assert torch.equal(call(alone), call(net))


@torch.no_grad()
def test_the_numbers_differ_and_going_back_gives_the_same() -> None:
    net = network()
    most = call(net)
    set_mediators(net, 4)
    assert not torch.allclose(call(net), most, atol=1e-2)
    set_mediators(net, 16)
    assert torch.equal(call(net), most)


def test_a_number_without_biases_changes_nothing() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"there are biases for \[4, 16\] mediators, got 9"):
        set_mediators(net, 9)
    net.transformer_blocks[2].attn.counts = (16,)
    with pytest.raises(ValueError, match=r"there are biases for \[16\] mediators, got 4"):
        set_mediators(net, 4)
    assert {layer.count for layer in mediator_layers(net).values()} == {16}


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch() -> None:
    net = network()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 2, 3])
    together = net(x, t, labels).sample
    for row in range(3):
        alone = net(x[row : row + 1], t[row : row + 1], labels[row : row + 1]).sample
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-4)


# --- a number for each layer


@pytest.mark.parametrize("use_bias", [True, False], ids=["biases", "none"])
@torch.no_grad()
def test_each_layer_computes_what_one_with_its_number_does(use_bias: bool) -> None:
    net = network((4, 16), layers=(0, 2), per_layer=True, use_bias=use_bias)
    assert kinds(net) == [MediatorAttention, SiTAttention, MediatorAttention]
    assert [layer.counts for layer in mediator_layers(net).values()] == [(4,), (16,)]
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    for index, count in ((0, 4), (2, 16)):
        own, alone = net.transformer_blocks[index].attn, network((count,), use_bias=use_bias).transformer_blocks[0].attn
        alone.load_state_dict(own.state_dict())
        found = own(x)
        assert torch.equal(found, alone(x)) and not torch.allclose(found, net.transformer_blocks[2 - index].attn(x))


@torch.no_grad()
def test_equal_numbers_for_each_layer_are_one_for_all() -> None:
    net, alike = network((4,)), network((4, 4, 4), per_layer=True, seed=7)
    alike.load_state_dict(net.state_dict())
    assert torch.equal(call(alike), call(net))


@torch.no_grad()
def test_numbers_for_each_layer_come_back_and_take_no_other() -> None:
    net = network((16, 4, 4), per_layer=True)
    own = call(net)
    said = (
        r"there are biases for \[4\] mediators, got 16; this network's layers have numbers of their own, \[16, 4, 4\]"
    )
    with pytest.raises(ValueError, match=said):
        set_mediators(net, 16)
    assert [layer.count for layer in mediator_layers(net).values()] == [16, 4, 4]
    free = network((16, 4, 4), per_layer=True, use_bias=False)
    before = call(free)
    set_mediators(free, 9)
    assert not torch.allclose(call(free), before, atol=1e-3)
    for other in (net, free):
        set_mediators(other, None)
        assert [layer.count for layer in mediator_layers(other).values()] == [16, 4, 4]
    assert torch.equal(call(net), own) and torch.equal(call(free), before)


# --- cost

REPORTED = {None: 6.06, 4: 5.49, 16: 5.55, 64: 5.78}
"""Thousands of millions of multiply-adds by the number of mediators, in the paper's table for SiT-S/2."""


def counted_macs(config: dict[str, Any] | None) -> int:
    """Of the smallest size of the paper at 256 pixels, 256 tokens of width 384, for an image."""
    with torch.device("meta"):
        net = MediatorSiTTransformer2DModel.from_preset("SiT-S/2", sample_size=32, mediator_config=config).eval()
        shapes = {
            "hidden_states": torch.empty(1, 4, 32, 32),
            "timestep": torch.empty(1),
            "class_labels": torch.zeros(1, dtype=torch.long),
        }
    counted = macs_by_module(net, shapes)
    assert counted is not None
    return counted[""]


@pytest.mark.slow
@pytest.mark.parametrize("count", REPORTED)
def test_multiply_adds_of_the_papers_table(count: int | None) -> None:
    found = counted_macs(None if count is None else {"counts": (count,)})
    assert found / 1e9 == pytest.approx(REPORTED[count], rel=0.01)


def test_multiply_adds_with_a_number_for_each_layer() -> None:
    """Each layer spares N D (2N - 4n - 9), by its own n."""
    own = dict(zip((0, 3, 4, 11), (4, 16, 256, 64), strict=True))
    config = {"counts": tuple(own.values()), "layers": tuple(own), "per_layer": True}
    spared = sum(256 * 384 * (2 * 256 - 4 * count - 9) for count in own.values())
    full, found = counted_macs(None), counted_macs(config)
    assert full - found == pytest.approx(spared, rel=0.01)
    assert found == pytest.approx(full - spared, rel=1e-4)


# --- other sizes


@torch.no_grad()
def test_resized_for_all_its_numbers() -> None:
    net = network()
    other = net.resized(12)
    fresh = tiny.sit_network(sample_size=12)
    assert torch.equal(other.pos_embed, fresh.pos_embed)
    assert not other.training and other.config.mediator_config == net.config.mediator_config
    given, found = net.state_dict(), other.state_dict()
    changed = {name for name in given if given[name].shape != found[name].shape}
    assert {name.rpartition(".")[2] for name in changed} == {"pos_embed", "rows", "columns"}
    assert len(changed) == 1 + BLOCKS * 2 * 2 * 2
    for name in changed - {"pos_embed"}:
        assert torch.equal(found[name][..., [0, -1]], given[name][..., [0, -1]])
    assert all(torch.equal(found[name], given[name]) for name in given.keys() - changed)
    for count in (4, 16):
        set_mediators(other, count)
        assert call(other).isfinite().all()
    assert torch.equal(call(net.resized(8)), call(net))


@torch.no_grad()
def test_resized_with_a_number_for_each_layer() -> None:
    net = network((16, 4, 9), per_layer=True)
    other = net.resized(12)
    assert [layer.count for layer in mediator_layers(other).values()] == [16, 4, 9]
    rows = [each.transformer_blocks[2].attn.mediator_biases["9"].reading.rows for each in (net, other)]
    assert torch.equal(rows[0][..., [0, -1]], rows[1][..., [0, -1]]) and rows[1].shape[-1] == 6
    assert call(other).isfinite().all() and torch.equal(call(net.resized(8)), call(net))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="16 mediators need a grid of at least 4 x 4 tokens, got 2 x 2"):
        network().resized(4)
    with pytest.raises(ValueError, match="sample_size must be a multiple of patch_size"):
        network().resized(9)
    with pytest.raises(ValueError, match="counts=None has a bias for every token"):
        network(None).resized(12)


# --- configuration and saving


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"counts": None},
        {"layers": (1,)},
        {"use_bias": False},
        {"use_dwc": False, "counts": (9,)},
        {"counts": (16, 4), "layers": (1, 2), "per_layer": True},
        {"counts": (4, 16, 4), "per_layer": True, "use_bias": False},
    ],
)
@torch.no_grad()
def test_saved_and_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    net = network(**settings)
    net.save_pretrained(tmp_path)
    again = MediatorSiTTransformer2DModel.from_pretrained(tmp_path)
    assert MediatorSettings.of(again.config.mediator_config) == MediatorSettings.of(net.config.mediator_config)
    numbers = [[layer.count for layer in mediator_layers(each).values()] for each in (again, net)]
    assert numbers[0] == numbers[1]
    assert torch.equal(call(again), call(net))


@torch.no_grad()
def test_half_precision(tmp_path: Path) -> None:
    net = network()
    net.save_pretrained(tmp_path)
    half = MediatorSiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    expected, found = call(net), call(half)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"counts": (5,)}, "must be a square, such as 4, 16 or 64, got 5"),
        ({"counts": (25,)}, "25 mediators need a grid of at least 5 x 5 tokens, got 4 x 4; take fewer"),
        ({"counts": ()}, r"counts must be a sequence of whole numbers, got \(\)"),
        ({"counts": 4}, "counts must be a sequence of whole numbers, got 4"),
        ({"counts": (4, True)}, r"counts must hold whole numbers of at least 1, got \[4, True\]"),
        ({"layers": (0, 3)}, r"layers must be below the number of blocks, 3, got \[0, 3\]"),
        ({"layers": (-1,)}, r"layers must hold whole numbers of at least 0, got \[-1\]"),
        ({"counts": (4, 16), "per_layer": True}, r"one number for each of 3 layers, as per_layer says, got \[4, 16\]"),
        ({"counts": (4, 5, 4), "per_layer": True}, "must be a square, such as 4, 16 or 64, got 5"),
        ({"counts": None, "per_layer": True}, "per_layer is for numbers of mediators, got counts=None; leave it out"),
        (
            {"counts": (4, 16), "layers": (2, 0), "per_layer": True},
            r"layers must rise where per_layer gives each its number, got \[2, 0\]",
        ),
        ({"mediators": 4}, r"mediator_config: unknown \['mediators'\]; allowed are \['counts', 'layers', 'per_layer'"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], said: str) -> None:
    base = tiny.sit_network()
    own = {name: value for name, value in base.config.items() if not name.startswith("_")}
    with pytest.raises(ValueError, match=said):
        MediatorSiTTransformer2DModel(**own, mediator_config=config)
    with pytest.raises(ValueError, match=said):
        MediatorSiTTransformer2DModel.from_base(base, config)
    assert kinds(base) == [SiTAttention] * BLOCKS


# --- the official layout


@torch.no_grad()
def test_official_layout_of_some_blocks(tmp_path: Path) -> None:
    net = network((4,), layers=(0, 1))
    save_file({name: value.contiguous() for name, value in net.to_official().items()}, tmp_path / "a.safetensors")
    again = MediatorSiTTransformer2DModel.from_official(tmp_path / "a.safetensors", num_attention_heads=2)
    assert MediatorSettings.of(again.config.mediator_config) == MediatorSettings(counts=(4,), layers=(0, 1))
    assert torch.equal(call(again), call(net))


@torch.no_grad()
def test_official_layout_of_equal_numbers_for_each_layer() -> None:
    net = network((4, 4), layers=(0, 1), per_layer=True)
    again = MediatorSiTTransformer2DModel.from_official(net.to_official(), num_attention_heads=2)
    assert MediatorSettings.of(again.config.mediator_config) == MediatorSettings(counts=(4,), layers=(0, 1))
    assert torch.equal(call(again), call(net))


@pytest.mark.parametrize(
    "settings",
    [
        {"counts": (4, 16)},
        {"counts": None},
        {"counts": (4, 16, 4), "per_layer": True},
        {"use_bias": False},
        {"use_dwc": False},
    ],
)
def test_what_the_official_layout_cannot_hold(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the official layout holds one number of mediators, biases and the conv"):
        network(**{"counts": (4,), **settings}).to_official()


def test_official_weights_of_something_else() -> None:
    with pytest.raises(CheckpointError, match=r"no mediators.*load it with SiTTransformer2DModel\.from_official"):
        MediatorSiTTransformer2DModel.from_official(tiny.sit_network().to_official(), num_attention_heads=2)
    mixed, other = network((4,)).to_official(), network((9,)).to_official()
    mixed |= {name: value for name, value in other.items() if name.startswith("blocks.1.attn.")}
    with pytest.raises(CheckpointError, match=r"different numbers of mediators, \[4, 9\]"):
        MediatorSiTTransformer2DModel.from_official(mixed, num_attention_heads=2)
    cut = network((4,)).to_official()
    del cut["blocks.2.attn.na_bias"]
    with pytest.raises(CheckpointError):
        MediatorSiTTransformer2DModel.from_official(cut, num_attention_heads=2)


# --- what others do with networks


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(net: Any) -> dict[str, Tensor]:
        call(net.train()).square().mean().backward()
        return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}

    expected = gradients(network())
    net = network()
    net.enable_gradient_checkpointing()
    found = gradients(net)
    assert found.keys() == expected.keys() and any("reading.rows" in name for name in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@torch.no_grad()
def test_a_lora_of_the_queries_moves_the_mediators() -> None:
    net = network()
    before = call(net)
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    attn = net.transformer_blocks[0].attn
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = attn.pooled(attn.to_q.base_layer(x))
    assert not torch.allclose(attn.pooled(attn.to_q(x)), plain, atol=1e-3)
    assert not torch.allclose(call(net), before, atol=1e-3)
    net.disable_adapters()
    torch.testing.assert_close(call(net), before)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"counts": (16, 4, 4), "per_layer": True}], ids=["one", "per layer"])
@torch.no_grad()
def test_it_compiles_in_one_graph(settings: dict[str, Any]) -> None:
    net = network(**settings)
    expected = call(net)
    compiled: Any = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    found = compiled(x, torch.linspace(0.2, 0.8, 2), torch.arange(2), return_dict=False)[0]
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fusing_projections_leaves_mediators_as_they_are() -> None:
    net = network(layers=(0, 2))
    before, names = call(net), [name for name in net.state_dict() if "blocks.1" not in name]
    net.fuse_qkv_projections()
    assert [name for name in net.state_dict() if "blocks.1" not in name] == names
    torch.testing.assert_close(call(net), before)


def test_attention_processors_of_the_network() -> None:
    net = network()
    assert len(net.attn_processors) == BLOCKS
    with pytest.raises(TypeError, match="must be a GridAttnProcessor"):
        net.set_attn_processor(SiTAttnProcessor())
    net.set_attn_processor(net.attn_processors)
    assert all(isinstance(module, GridAttention) for module in mediator_layers(net).values())
