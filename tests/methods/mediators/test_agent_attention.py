"""AgentAttention: the formula, where and when it runs, what it leaves behind, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, FusedAttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor

import families
import tiny
from families import assert_close
from flowaccel import (
    AgentAttention,
    FeatureCache,
    Recipe,
    RecipeConflictError,
    UnsupportedModelError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.hooks import networks
from flowaccel.methods.mediators.agent_attention import self_attentions
from flowaccel.methods.mediators.agents import agent_attention, grid_of, pooled_queries
from flowaccel.recipe import preset

STEPS = 5
SMALL: dict[str, Any] = {"stride": 2, "min_tokens": 16}
"""What does something with 4 x 4 tokens."""


def dit_call(pipe: Any, batch: int = 1, seed: int = 3) -> Tensor:
    arguments = families.dit_arguments(batch, STEPS, seed)
    return torch.as_tensor(pipe(**arguments).images)


def unet_call(pipe: Any, batch: int = 1, seed: int = 3) -> Tensor:
    return torch.as_tensor(pipe(**tiny.unet_arguments(batch, STEPS, seed=seed)).images)


Made = tuple[Any, Callable[..., Tensor]]


@pytest.fixture(params=["dit", "unet"])
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    """A pipeline, and how to call it."""
    dit = request.param == "dit"
    yield (families.dit_pipeline(), dit_call) if dit else (tiny.unet_pipeline(), unet_call)


def layers(pipe: Any) -> dict[str, Any]:
    (network,) = networks(pipe).values()
    return dict(self_attentions(network))


# -- the formula


@torch.no_grad()
def test_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 24, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    agents = torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64)
    read = (agents @ key.transpose(2, 3) * 4**-0.5).softmax(-1) @ value
    expected = (query @ agents.transpose(2, 3) * 4**-0.15).softmax(-1) @ read + 0.075 * value
    torch.testing.assert_close(agent_attention(query, key, value, agents), expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_agents_are_projections_of_the_pooled_input() -> None:
    torch.manual_seed(0)
    x, projection = torch.randn(2, 35, 8, dtype=torch.float64), torch.nn.Linear(8, 6).double()
    image = x.reshape(2, 5, 7, 8)
    cells = [image[:, top : top + 2, left : left + 2].mean((1, 2)) for top in range(0, 5, 2) for left in range(0, 7, 2)]
    expected = projection(torch.stack(cells, 1))
    torch.testing.assert_close(pooled_queries(projection(x), (5, 7), 2), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 2])
def test_fused_attention_gets_agents_with_channels_side_by_side(rows: int) -> None:
    assert pooled_queries(torch.randn(rows, 35, 8), (5, 7), 2).is_contiguous()


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (64, (8, 8), (8, 8)),
        (16, (8, 8), (4, 4)),
        (6144, (64, 96), (64, 96)),
        (1536, (64, 96), (32, 48)),
        (20, (9, 7), (5, 4)),
        (1, (8, 8), (1, 1)),
        (15, (8, 8), None),
        (100, (8, 8), None),
    ],
)
def test_grid_of_a_layer(tokens: int, size: tuple[int, int], grid: Any) -> None:
    assert grid_of(tokens, size) == grid


@torch.no_grad()
def test_a_layer_computes_the_formula(made: Made) -> None:
    """The image of a pipeline whose processors were written by hand."""
    pipe, call = made
    with accelerated(pipe, AgentAttention(first=1, **SMALL)):
        found = call(pipe)

    def by_hand(attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, tokens, _ = hidden_states.shape
        side = round(tokens**0.5)
        image = hidden_states.transpose(1, 2).reshape(rows, -1, side, side)
        pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        query, key, value, agents = (
            attn.head_to_batch_dim(part)
            for part in (
                attn.to_q(hidden_states),
                attn.to_k(hidden_states),
                attn.to_v(hidden_states),
                attn.to_q(pooled),
            )
        )
        width = query.shape[-1]
        read = (width**-0.5 * agents @ key.transpose(1, 2)).softmax(-1) @ value
        output = (width**-0.15 * query @ agents.transpose(1, 2)).softmax(-1) @ read + 0.075 * value
        return attn.to_out[0](attn.batch_to_head_dim(output))

    for layer in layers(pipe).values():
        layer.processor = by_hand
    assert_close(found, call(pipe))


# -- where and when


def test_it_changes_the_image_and_leaves_nothing_behind(made: Made) -> None:
    pipe, call = made
    before = call(pipe)
    keys = {path: set(vars(module)) for path, module in next(iter(networks(pipe).values())).named_modules()}
    processors = {path: layer.processor for path, layer in layers(pipe).items()}
    assert processors
    accelerate(pipe, AgentAttention(**SMALL))
    changed = call(pipe)
    assert changed.isfinite().all() and (changed - before).abs().max() > 1e-4
    restore(pipe)
    assert all(layer.processor is processors[path] for path, layer in layers(pipe).items())
    assert {path: set(vars(module)) for path, module in next(iter(networks(pipe).values())).named_modules()} == keys
    assert torch.equal(call(pipe), before)


@pytest.mark.parametrize("options", [{"first": 0}, {"first": 0.09, "min_tokens": 16}])
def test_neutral_settings_give_the_same_image(made: Made, options: dict[str, Any]) -> None:
    """0.09 of 5 steps is less than half a step."""
    pipe, call = made
    before = call(pipe)
    with accelerated(pipe, AgentAttention(**options)):
        assert torch.equal(call(pipe), before)
        assert not report(pipe).stats("agent_attention")


def test_too_small_images_are_left_alone_with_a_warning(made: Made) -> None:
    pipe, call = made
    before = call(pipe)
    tokens = 16 if hasattr(pipe, "transformer") else 64
    with accelerated(pipe, AgentAttention()):
        said = f"does nothing here: the largest self-attention has {tokens} tokens, and min_tokens=4096"
        with pytest.warns(UserWarning, match=said):
            assert torch.equal(call(pipe), before)
        call(pipe)  # says it once


@pytest.mark.parametrize(("first", "steps"), [(0.4, 2), (0.5, 2), (1, 5)])
def test_steps(made: Made, first: float, steps: int) -> None:
    pipe, call = made
    accelerate(pipe, AgentAttention(first=first, **SMALL))
    call(pipe)
    found = report(pipe)
    assert ["agent_attention" in one.stats for one in found.calls] == [True] * steps + [False] * (STEPS - steps)
    assert {tuple(sorted(stats.layers)) for stats in found.stats("agent_attention")} == {tuple(sorted(layers(pipe)))}
    assert f"agents in {len(layers(pipe))} layers" in str(found)
    assert f"Agents in the place of full attention in {steps} of 5 calls" in str(found)
    assert found.unsaved == "the recipe saves steps or the work within a call, not calls"


def test_only_large_layers_of_a_unet() -> None:
    pipe = tiny.unet_pipeline()
    accelerate(pipe, AgentAttention(stride=2, min_tokens=64))
    unet_call(pipe)
    ran = set(report(pipe).calls[0].stats["agent_attention"].layers)
    assert ran and ran < set(layers(pipe))
    assert {path.split(".")[0] + "." + path.split(".")[1] for path in ran} == {"down_blocks.0", "up_blocks.1"}


def test_images_that_are_not_square() -> None:
    pipe = tiny.unet_pipeline()
    accelerate(pipe, AgentAttention(stride=2, min_tokens=24))
    pipe(**{**tiny.unet_arguments(1, STEPS), "height": 16, "width": 24})
    assert len(report(pipe).calls[0].stats["agent_attention"].layers) == len(layers(pipe))


def test_multiply_adds() -> None:
    """Of 3 layers with 16 tokens of width 16: 4 agents do 4 x 4 x 16 x 16 in the place of 2 x 16 x 16 x 16."""
    pipe = families.dit_pipeline()
    accelerate(pipe, AgentAttention(first=1, **SMALL))
    dit_call(pipe)
    found = report(pipe)
    rows = sum(call.rows for call in found.calls)
    assert found.macs_saved == rows * 3 * (2 * 16 * 16 * 16 - 4 * 4 * 16 * 16)
    assert found.macs is not None and found.macs > found.macs_saved


def test_an_image_does_not_depend_on_its_batch(made: Made) -> None:
    pipe, call = made
    accelerate(pipe, AgentAttention(**SMALL))
    together = call(pipe, batch=3)
    for place in range(3):
        assert_close(call(pipe, batch=1, seed=3 + place), together[place : place + 1])


def test_an_interrupted_call_leaves_agents_off(made: Made) -> None:
    pipe, call = made
    before = call(pipe)
    accelerate(pipe, AgentAttention(first=1, **SMALL))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    last = list(layers(pipe).values())[-1]
    handle = last.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        call(pipe)
    handle.remove()
    assert not any(layer.processor.switch.size for layer in layers(pipe).values())
    restore(pipe)
    assert torch.equal(call(pipe), before)


def test_with_a_cache() -> None:
    pipe = families.dit_pipeline()
    accelerate(pipe, [AgentAttention(first=1, **SMALL), FeatureCache(gate="interval", interval=2)])
    dit_call(pipe)
    calls = report(pipe).calls
    assert {call.what for call in calls} == {"computed", "reused"}
    assert all(("agent_attention" in call.stats) == (call.what == "computed") for call in calls)


# -- configuration


def test_preset_and_json(tmp_path: Any) -> None:
    made = AgentAttention(stride=8, first=0.5, min_tokens=1024)
    assert preset("agent_attention").accelerators == (AgentAttention(),)
    assert preset("agent_attention:stride=8,first=0.5,min_tokens=1024").accelerators == (made,)
    Recipe([made]).save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path).accelerators == (made,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stride": 1}, "stride must be a whole number of at least 2, got 1"),
        ({"stride": 2.0}, "stride must be a whole number of at least 2, got 2.0"),
        ({"min_tokens": 0}, "min_tokens must be a whole number of at least 1, got 0"),
        ({"first": 1.5}, "first must be a share of the steps, from 0 to 1, got 1.5"),
        ({"first": float("nan")}, "first must be a share of the steps, from 0 to 1, got nan"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AgentAttention(**options)


@pytest.mark.parametrize("make", [tiny.sit_pipeline, tiny.sd3_pipeline])
def test_networks_of_other_blocks_are_refused(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="such as UNet2DConditionModel and DiTTransformer2DModel; this "):
        accelerate(make(), AgentAttention())


@pytest.mark.parametrize("foreign", [IPAdapterAttnProcessor2_0(8, 8), FusedAttnProcessor2_0()])
def test_other_processors_are_refused_by_name(foreign: Any) -> None:
    pipe = tiny.unet_pipeline()
    path, layer = list(layers(pipe).items())[-1]
    layer.set_processor(foreign)
    with pytest.raises(RecipeConflictError, match=f"{path} has a {type(foreign).__name__}; take that out first"):
        accelerate(pipe, AgentAttention())
    assert layer.processor is foreign
    assert not any(type(one.processor).__name__ == "AgentAttnProcessor" for one in layers(pipe).values())


def test_a_processor_that_was_chosen_since_stays(made: Made) -> None:
    pipe, call = made
    accelerate(pipe, AgentAttention(**SMALL))
    first, *others = layers(pipe).values()
    first.set_processor(AttnProcessor())
    chosen = first.processor
    call(pipe)
    restore(pipe)
    assert first.processor is chosen
    assert all(type(layer.processor).__name__ == "AttnProcessor2_0" for layer in others)
