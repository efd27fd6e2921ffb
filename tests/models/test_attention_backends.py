"""The attention backend chosen for a pipeline's network, in the networks that accelerators put in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import attention_backend
from torch import Tensor, nn

import fake_xformers
import moe_parts
import tiny
from families import CASES, Case
from flowaccel import DynamicWidth, Mediators, MixtureOfExperts, accelerate, accelerated, restore
from flowaccel.evaluation import set_attention
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel, mediator_layers

SIT, SD3 = CASES["sit"], CASES["sd3"]
STEPS, HEADS, TOKENS = 2, 2, 16
COUNTS = (1, 4, 9)
"""Numbers of mediators whose masks would lie askew in memory."""


@pytest.fixture(autouse=True)
def global_backend() -> Iterator[None]:
    """diffusers also switches what every network without a choice of its own uses: put back here."""
    with attention_backend("native"):
        yield


def images(case: Case, pipe: Any) -> Tensor:
    return case(pipe, batch=2, steps=STEPS)


def mediated(pipe: Any, **settings: Any) -> Any:
    """A network with mediators and weights and processors of its own."""
    made = MediatorSiTTransformer2DModel.from_base(pipe.transformer, {"counts": COUNTS, **settings})
    network = MediatorSiTTransformer2DModel.from_config(made.config).eval()
    network.load_state_dict(made.state_dict())
    tiny.random_weights(network, 4, 0.3)
    return network


def dynamic(pipe: Any) -> Any:
    return make_dynamic(pipe.transformer)


def experts(pipe: Any) -> Any:
    return moe_parts.with_experts(pipe.transformer, router="token_choice")


def own_processors(network: nn.Module) -> nn.Module:
    """Processors that no other network uses."""
    for module in network.modules():
        if hasattr(module, "processor"):
            module.processor = type(module.processor)()
    return network


def processors(network: nn.Module) -> list[tuple[int, Any]]:
    found = [module.processor for module in network.modules() if hasattr(module, "processor")]
    return [(id(processor), getattr(processor, "_attention_backend", None)) for processor in found]


VARIANTS = {
    "mediators": (SIT, mediated, Mediators),
    "width": (SIT, dynamic, DynamicWidth),
    "width-sd3": (SD3, dynamic, DynamicWidth),
    "experts": (SIT, experts, MixtureOfExperts),
}


@pytest.mark.parametrize(("case", "make", "accelerator"), VARIANTS.values(), ids=VARIANTS)
def test_variants_run_what_was_chosen_for_the_pipeline(
    case: Case, make: Any, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = fake_xformers.Op()
    fake_xformers.put_in_place(monkeypatch, op)
    pipe = case.make()
    network = own_processors(make(pipe))
    with accelerated(pipe, accelerator(network)):
        expected = images(case, pipe)
    before = processors(network)
    set_attention(pipe, "xformers")
    with attention_backend("native"):  # not by diffusers' default
        accelerate(pipe, accelerator(network))
        op.seen.clear()
        calls = []
        handle = network.register_forward_hook(lambda *_: calls.append(1))
        found = images(case, pipe)
        handle.remove()
    assert pipe.transformer is network
    each = 2 if accelerator is Mediators else 1
    assert len(op.seen) == each * len(before) * len(calls) > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    restore(pipe)
    assert processors(network) == before


def test_mediators_hand_their_biases_to_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    op = fake_xformers.Op()
    fake_xformers.put_in_place(monkeypatch, op)
    pipe = SIT.make()
    network = mediated(pipe)
    set_attention(pipe, "xformers")
    for count in COUNTS:
        with accelerated(pipe, Mediators(network, count=count)):
            op.seen.clear()
            SIT(pipe, batch=1, steps=1, guided=False)
        rows = op.seen[0][0] if op.seen[0] else 0
        assert set(op.seen) == {(rows, HEADS, count, TOKENS), (rows, HEADS, TOKENS, count)} and rows > 0


def test_what_cannot_add_biases_is_refused_before_anything_is_changed() -> None:
    pipe = SIT.make()
    base, network = pipe.transformer, mediated(pipe)
    pipe.transformer.set_attention_backend("_native_flash")
    before = processors(base), processors(network), [layer.count for layer in mediator_layers(network).values()]
    with pytest.raises(ValueError, match="attention backend '_native_flash' cannot add the position biases; take one"):
        accelerate(pipe, Mediators(network, count=4))
    after = processors(base), processors(network), [layer.count for layer in mediator_layers(network).values()]
    assert after == before and pipe.transformer is base
    free = mediated(pipe, use_bias=False)
    accelerate(pipe, Mediators(free))
    assert {backend.value for _, backend in processors(free)} == {"_native_flash"}
    assert torch.isfinite(images(SIT, pipe)).all()


def test_a_kernel_that_takes_no_masks_is_found_out_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers.put_in_place(monkeypatch, fake_xformers.Op(masks=False))
    pipe = SIT.make()
    base, network = pipe.transformer, mediated(pipe)
    before = processors(network)
    set_attention(pipe, "xformers")
    with pytest.raises(
        ValueError,
        match=r"'xformers' cannot add the position biases on cpu with torch\.float32 \(No operator found .*\); take",
    ):
        accelerate(pipe, Mediators(network))
    assert pipe.transformer is base and processors(network) == before
    with accelerated(pipe, Mediators(mediated(pipe, use_bias=False))):
        images(SIT, pipe)


def test_a_choice_for_the_variant_alone_stays() -> None:
    pipe = SIT.make()
    network = mediated(pipe)
    network.set_attention_backend("_native_math")
    accelerate(pipe, Mediators(network))
    assert {backend.value for _, backend in processors(network)} == {"_native_math"}
    restore(pipe)
    assert {backend.value for _, backend in processors(network)} == {"_native_math"}
