"""Dynamic width and tokens of every family: slices and gathered tokens are what masks are, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
from flowaccel import SiTTransformer2DModel
from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.fused import TokenSingleBlock
from flowaccel.methods.dynamic_width.networks import DYNAMIC, make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.train import MacsCosts
from tiers import Process

CLOSE, CLOSE_HALF = 1e-5, 2e-2
"""Of the largest value, in float32 and bfloat16."""
HEADS, HEAD = 4, 8
WIDTH = HEADS * HEAD


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(make: Callable[[int], Tensor], batch: int, seed: int) -> Tensor:
    """Row i depends on seed + i alone."""
    return torch.stack([make(seed + i) for i in range(batch)])


@dataclass(frozen=True)
class Family:
    """A tiny stock network, and arguments of a call."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    """`inputs(batch, seed)`: all arguments but the timestep."""
    scale: float
    """Of timesteps."""

    def network(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        network = self.make().eval()
        tiny.random_weights(network, seed, std=0.15)
        return network

    def dynamic(self, seed: int = 0, off: float = 0.5, **settings: Any) -> Any:
        """A dynamic network about `off` of whose gates are off, differently at every time."""
        network = make_dynamic(self.network(seed), DynamicSettings(**{"bias": 0.0, "token_bias": 0.0, **settings}))
        for gated in network.dynamic.gated_layers:
            torch.nn.init.normal_(gated.gate.router.weight, std=20.0)
        halfway = embedded(network, torch.tensor([0.5 * self.scale]))
        for gated, logits in zip(network.dynamic.gated_layers, network.dynamic.logits(halfway), strict=True):
            gated.gate.router.bias.data = torch.randn_like(logits[0]) + 1 - 2 * off - logits[0].detach()
        for site in network.dynamic.sites:
            torch.nn.init.normal_(site.router[2].weight, std=3.0)
        return network.eval()

    def arguments(self, batch: int = 2, seed: int = 3, times: tuple[float, ...] = (0.4,)) -> dict[str, Any]:
        spread = torch.tensor(times) if len(times) == batch else torch.tensor(times).expand(batch)
        return self.inputs(batch, seed) | {"timestep": spread * self.scale, "return_dict": False}


def sit_inputs(batch: int, seed: int) -> dict[str, Any]:
    states = rows(lambda one: noise(1, 8, 8, seed=one), batch, seed)
    return {"hidden_states": states, "class_labels": (torch.arange(batch) + seed) % 10}


def dit_inputs(batch: int, seed: int) -> dict[str, Any]:
    states = rows(lambda one: noise(4, 8, 8, seed=one), batch, seed)
    return {"hidden_states": states, "class_labels": (torch.arange(batch) + seed) % 10}


def sd3_inputs(batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": rows(lambda one: noise(4, 8, 8, seed=one), batch, seed),
        "encoder_hidden_states": rows(lambda one: noise(5, 16, seed=50 + one), batch, seed),
        "pooled_projections": rows(lambda one: noise(12, seed=90 + one), batch, seed),
    }


def flux_inputs(batch: int, seed: int) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": rows(lambda one: noise(16, 16, seed=one), batch, seed),
        "encoder_hidden_states": rows(lambda one: noise(5, 16, seed=50 + one), batch, seed),
        "pooled_projections": rows(lambda one: noise(12, seed=90 + one), batch, seed),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def latte_inputs(batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": rows(lambda one: noise(4, 3, 8, 8, seed=one), batch, seed),
        "encoder_hidden_states": rows(lambda one: noise(5, 16, seed=50 + one), batch, seed),
    }


BASIC = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
}


def sd3(**config: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **BASIC,
        out_channels=4,
        joint_attention_dim=16,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        **config,
    )


def latte(**config: Any) -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        **{
            **BASIC,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 16,
            "video_length": 3,
            **config,
        }
    )


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sit",
            lambda: SiTTransformer2DModel(**BASIC | {"in_channels": 1, "num_classes": 10, "learn_sigma": False}),
            sit_inputs,
            1.0,
        ),
        Family(
            "dit", lambda: DiTTransformer2DModel(**BASIC, out_channels=8, num_embeds_ada_norm=1000), dit_inputs, 1000.0
        ),
        Family("sd3", sd3, sd3_inputs, 1000.0),
        Family("sd35", lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)), sd3_inputs, 1000.0),
        Family(
            "flux",
            lambda: FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=HEAD,
                num_attention_heads=HEADS,
                joint_attention_dim=16,
                pooled_projection_dim=12,
                guidance_embeds=True,
                axes_dims_rope=(2, 2, 4),
            ),
            flux_inputs,
            1.0,
        ),
        Family("latte", latte, latte_inputs, 1000.0),
    )
}
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of the largest value."""
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


@torch.no_grad()
def sliced(network: Any, **options: Any) -> Tensor:
    return network.eval()(**options)[0]


def masked(network: Any, **options: Any) -> Tensor:
    """With the gates of evaluation as masks on whole layers."""
    network.eval().dynamic.train()  # not the rest: DiT drops labels while training
    network.dynamic.hard = True
    with torch.enable_grad():
        output = network(**options)[0].detach()
    network.dynamic.hard = False
    network.eval()
    return output


def embedded(network: Any, timestep: Tensor) -> Tensor:
    """(B, D) what routers read."""
    rule = network.dynamic.rule
    with network.dynamic.deaf():
        projected = network.get_submodule(rule.time_proj)(timestep * rule.time_scale)
        return network.get_submodule(rule.time_embed)(projected)


def gates_at(network: Any, timestep: Tensor) -> list[Tensor]:
    """(B, units) of every gate."""
    return network.dynamic.evaluated(embedded(network, timestep))


def layer_state(network: Any) -> list[Any]:
    """What a call sets in the layers of a network, whether by our names or not."""
    found = []
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if key in ("part", "row_mask", "column_mask", "keep", "logits", "heads", "rows_differ"):
                found.append((name, key, value))
    return found


@EVERY
def test_everything_on_is_the_stock_network_bit_for_bit(family: Family) -> None:
    stock = family.network()
    network = make_dynamic(stock)
    arguments = family.arguments(batch=2, times=(0.2, 0.9))
    with torch.no_grad():
        expected = stock(**arguments)[0]
        assert torch.equal(sliced(network, **arguments), expected)
        assert torch.equal(masked(network, **arguments), expected)
        with network.dynamic.complete():
            assert torch.equal(sliced(network, **arguments), expected)
        assert torch.equal(stock(**arguments)[0], expected)
        kept = network.dynamic.kept_tokens(2)
    assert not kept  # a complete call does not choose
    assert type(stock) is not type(network)


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_sliced_and_gathered_is_what_was_masked(family: Family, seed: int) -> None:
    network = family.dynamic(seed)
    arguments = family.arguments(seed=seed, times=(0.1 + 0.3 * seed,))
    expected = masked(network, **arguments)
    assert distance(sliced(network, **arguments), expected) < CLOSE
    gates, kept = gates_at(network, arguments["timestep"]), network.dynamic.kept_tokens(2)
    assert 0.2 < torch.cat(gates, dim=1).float().mean() < 0.9
    assert 0.1 < torch.cat(list(kept.values())).mean() < 0.9
    with network.dynamic.complete():
        assert distance(sliced(network, **arguments), expected) > 0.01  # the gates matter


@EVERY
def test_rows_of_one_batch_at_different_times_are_what_each_is_alone(family: Family) -> None:
    network = family.dynamic(1)
    times = (0.05, 0.5, 0.95)
    together = sliced(network, **family.arguments(batch=3, seed=7, times=times))
    assert distance(masked(network, **family.arguments(batch=3, seed=7, times=times)), together) < CLOSE
    gates = torch.cat(gates_at(network, torch.tensor(times) * family.scale), dim=1)
    assert len(gates.unique(dim=0)) == len(times)
    for row, time in enumerate(times):
        alone = sliced(network, **family.arguments(batch=1, seed=7 + row, times=(time,)))
        assert distance(together[row : row + 1], alone) < CLOSE


@EVERY
def test_nothing_is_left_after_a_call(family: Family) -> None:
    network = family.dynamic(2)
    sliced(network, **family.arguments())
    before = layer_state(network)
    for times in ((0.1, 0.9), (0.3,)):
        sliced(network, **family.arguments(times=times))
        assert layer_state(network) == before
        network.train()
        network(**family.arguments(times=times))
        network.eval()
        assert layer_state(network) == before
    for gated in network.dynamic.gated_layers:
        assert gated.attention is None or gated.attention.heads == HEADS
    assert all(value in (None, False, HEADS) for _, _, value in before)


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_after_an_exception(family: Family, training: bool) -> None:
    network = family.dynamic(2)
    arguments = family.arguments(times=(0.1, 0.9))
    expected = sliced(network, **arguments)
    before = layer_state(network)
    last = network.dynamic.gated_layers[-1].columns[0][0]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = last.register_forward_hook(fail)
    network.train(training)
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="in the middle"):
        network(**arguments)
    handle.remove()
    network.eval()
    assert layer_state(network) == before
    assert torch.equal(sliced(network, **arguments), expected)


@EVERY
def test_gradients_of_slices_are_those_of_masks(family: Family) -> None:
    network = family.dynamic(1)
    gradients = []
    for training in (True, False):
        arguments = family.arguments(times=(0.4,))
        arguments["hidden_states"].requires_grad_()
        network.dynamic.train(training)
        network.dynamic.hard = True
        network(**arguments)[0].square().sum().backward()
        gradients.append(arguments["hidden_states"].grad)
    assert distance(gradients[1], gradients[0]) < CLOSE


@EVERY
def test_training_reaches_routers_and_weights(family: Family) -> None:
    network = family.dynamic(1, token_bias=4.0, tau=200.0).train()  # a small tau saturates
    network.dynamic.generator = torch.Generator().manual_seed(0)
    output = network(**family.arguments())[0]
    masks, kept = network.dynamic.masks, network.dynamic.kept_tokens(2)
    assert len(masks) == len(network.dynamic.gated_layers) and len(kept) == len(network.dynamic.sites)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks)
    output.square().mean().backward()
    for gated in network.dynamic.gated_layers:
        assert gated.gate.router.weight.grad.abs().sum() > 0, gated.path
        assert gated.rows[0].weight.grad.abs().sum() > 0, gated.path
    for site in network.dynamic.sites:
        assert site.router[0].weight.grad.abs().sum() > 0, site.path


@EVERY
def test_half_precision(family: Family) -> None:
    network = family.dynamic(1)
    network.to(torch.bfloat16)
    network.dynamic.float()
    arguments = {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in family.arguments().items()
    }
    assert distance(sliced(network, **arguments), masked(network, **arguments)) < CLOSE_HALF


@torch.no_grad()
def counted(network: Any, arguments: dict[str, Any]) -> int:
    """Multiply-adds of a real call."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(**arguments)
    return counter.get_total_flops() // 2


@EVERY
@pytest.mark.parametrize("seed", range(2))
def test_the_ratio_is_that_of_counted_multiply_adds(family: Family, seed: int) -> None:
    network = family.dynamic(seed)
    arguments = family.arguments(batch=1, seed=seed, times=(0.2 + 0.5 * seed,))
    costs = MacsCosts.of(network, arguments, 1)
    switchable = sum(costs.gates)
    with network.dynamic.complete():
        rest = counted(network, arguments) - switchable  # embedders and modulation
    computed = counted(network, arguments)
    routing = sum(_router_macs(site) for site in network.dynamic.sites)
    real = computed - rest - routing - sum(gated.gate.router.weight.numel() for gated in network.dynamic.gated_layers)
    gates = gates_at(network, arguments["timestep"])
    ratio = costs.ratio(network.dynamic, gates, network.dynamic.kept_tokens(1))
    assert 0.1 < float(ratio) < 0.8
    assert abs(real / switchable - float(ratio)) < 0.005 * float(ratio)


def _router_macs(site: Any) -> int:
    return site.gates.shape[0] * site.gates.shape[1] * sum(site.router[i].weight.numel() for i in (0, 2))


def test_the_costs_of_a_block_are_those_of_the_paper() -> None:
    family = FAMILIES["sit"]
    network = family.dynamic()
    tokens = 16
    attention, feed_forward = 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH, 8 * tokens * WIDTH**2
    costs = MacsCosts.of(network, family.arguments(batch=2), 2)
    assert costs.gates == (attention, feed_forward) * 3
    assert not any(costs.everywhere)


def test_a_fused_block_is_charged_with_keys_and_values_of_all_tokens() -> None:
    family = FAMILIES["flux"]
    network = family.dynamic()
    text, image = 5, 16
    tokens = text + image
    costs = MacsCosts.of(network, family.arguments(batch=2), 2)
    attention = 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
    assert costs.gates[-2:] == (attention, 8 * tokens * WIDTH**2)
    keys = 2 * tokens * WIDTH**2
    assert costs.everywhere[-2:] == (
        pytest.approx(keys + (attention - keys) * text / tokens, abs=1),
        pytest.approx(8 * WIDTH**2 * text, abs=1),
    )
    assert not any(costs.everywhere[:-6])
    assert [type(block) for block in network.single_transformer_blocks] == [TokenSingleBlock] * 3


def test_a_network_without_rules_is_refused() -> None:
    pixart = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16
    )
    with pytest.raises(UnsupportedModelError) as refused:
        make_dynamic(pixart)
    assert "PixArtTransformer2DModel" in str(refused.value)
    assert all(name in str(refused.value) for name in DYNAMIC)


@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_a_gated_activation_is_refused(activation: str) -> None:
    network = latte(activation_fn=activation) if activation == "geglu" else swiglu()
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.0\.ff: .*gated activation"):
        make_dynamic(network)


def swiglu() -> nn.Module:
    network = latte()
    from diffusers.models.attention import FeedForward

    network.transformer_blocks[0].ff = FeedForward(WIDTH, activation_fn="swiglu")
    return network


def test_fused_projections_are_refused() -> None:
    stock = FAMILIES["flux"].network()
    network = make_dynamic(stock)
    with pytest.raises(UnsupportedModelError, match="DynamicFluxTransformer2DModel cannot be fused"):
        network.fuse_qkv_projections()
    stock.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        make_dynamic(stock)


@EVERY
def test_a_saved_network_returns_the_same(family: Family, tmp_path: Path) -> None:
    network = family.dynamic(1, groups=8, tau=2.0)
    arguments = family.arguments()
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert again.dynamic.settings == network.dynamic.settings
    assert torch.equal(sliced(again, **arguments), sliced(network, **arguments))
    half = type(network).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.dynamic.parameters()} == {torch.float32}


def test_a_saved_network_returns_the_same_in_a_fresh_process(tmp_path: Path, process: Process) -> None:
    family = FAMILIES["sd35"]
    network = family.dynamic(1)
    network.save_pretrained(tmp_path)
    arguments = family.arguments()
    del arguments["return_dict"]
    save_file(arguments, tmp_path / "inputs.safetensors")
    program = """if True:
        import sys, torch
        from safetensors.torch import load_file, save_file
        from flowaccel.methods.dynamic_width.networks import DynamicSD3Transformer2DModel
        folder = sys.argv[1]
        network = DynamicSD3Transformer2DModel.from_pretrained(folder).eval()
        with torch.no_grad():
            output = network(**load_file(folder + "/inputs.safetensors"), return_dict=False)[0]
        save_file({"output": output}, folder + "/output.safetensors")
    """
    process("-c", program, tmp_path)
    expected = sliced(network, **family.arguments())
    torch.testing.assert_close(load_file(tmp_path / "output.safetensors")["output"], expected, atol=1e-6, rtol=1e-6)


# --- gradient checkpointing


def step(network: Any, arguments: dict[str, Any], others: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """A dynamic pass, a complete one and one without gradients, and one backward pass through the first two."""
    torch.manual_seed(0)
    network.train()
    network.zero_grad()
    network.dynamic.generator = torch.Generator().manual_seed(5)
    loss = network(**arguments)[0].square().mean()
    loss = loss + sum(mask.mean() for mask in network.dynamic.masks)
    loss = loss + sum(share.mean() for share in network.dynamic.kept_tokens(2).values())
    with network.dynamic.complete():
        loss = loss + network(**others)[0].square().mean()
    with torch.no_grad():
        network(**others)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@EVERY
@pytest.mark.parametrize("hard", [False, True])
def test_gradient_checkpointing_changes_nothing(family: Family, hard: bool) -> None:
    network = family.dynamic(1, tau=2.0)
    network.dynamic.hard = hard
    arguments, others = family.arguments(times=(0.1, 0.9)), family.arguments(seed=30, times=(0.5,))
    loss, gradients = step(network, arguments, others)
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    calls = []
    handle = network.dynamic.gated_layers[-1].rows[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss_again, gradients_again = step(network, arguments, others)
    handle.remove()
    assert len(calls) == 5  # three passes, and twice again
    assert loss_again == loss
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-7, rtol=1e-5, msg=name)
    assert all(value in (None, False, HEADS) for _, _, value in layer_state(network))


def test_gradient_checkpointing_of_the_stock_network_is_taken_over() -> None:
    family = FAMILIES["sit"]
    stock = family.network()
    stock.enable_gradient_checkpointing()
    network = make_dynamic(stock, DynamicSettings(bias=0.0, token_bias=0.0))
    arguments = family.arguments()
    checkpointed = step(network, arguments, arguments)
    network.disable_gradient_checkpointing()
    plain = step(network, arguments, arguments)
    assert checkpointed[0] == plain[0]
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_a_copy_checkpoints_by_its_own_gates() -> None:
    family = FAMILIES["sit"]
    network = family.dynamic(1)
    network.enable_gradient_checkpointing()
    copied = copy.deepcopy(network)
    arguments = family.arguments()
    for one in (network, copied):
        loss, gradients = step(one, arguments, arguments)
        one.disable_gradient_checkpointing()
        loss_plain, gradients_plain = step(one, arguments, arguments)
        assert loss == loss_plain
        for name, gradient in gradients_plain.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-7, rtol=1e-5)


def test_a_network_can_be_copied_after_training() -> None:
    family = FAMILIES["flux"]
    network = family.dynamic(1).train()
    network.dynamic.generator = torch.Generator().manual_seed(0)
    network(**family.arguments())[0].sum().backward()
    copied = copy.deepcopy(network)
    assert not copied.dynamic.masks and not copied.dynamic.kept_tokens(2)
    assert network.dynamic.masks and network.dynamic.kept_tokens(2)
    with torch.no_grad():
        network.dynamic.blocks[0]["attn_gate"].router.bias.fill_(-1e6)  # of the original alone
    assert distance(sliced(copied, **family.arguments()), sliced(family.dynamic(1), **family.arguments())) < CLOSE


# --- compiled blocks


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("sit", "aot_eager"), ("flux", "eager")])
def test_compiled_blocks_return_the_same(name: str, backend: str) -> None:
    family = FAMILIES[name]
    network = family.dynamic(1)
    times = (0.1, 0.5, 0.9)
    expected = [sliced(network, **family.arguments(times=(time,))) for time in times]
    torch._dynamo.reset()
    network.compile_repeated_blocks(backend=backend)
    for time, output in zip(times, expected, strict=True):
        assert distance(sliced(network, **family.arguments(times=(time,))), output) < CLOSE
    assert all(block._compiled_call_impl is not None for block in _blocks(network))


def _blocks(network: Any) -> list[nn.Module]:
    paths = [rule.path for rule in network.dynamic.rule.blocks]
    return [block for path in paths for block in network.get_submodule(path)]
