"""Choosing an attention backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import attention_backend
from diffusers.models.attention_processor import AttnProcessor, XFormersJointAttnProcessor
from torch import Tensor, nn

import fake_xformers
import tiny
from families import CASES, Case
from flowaccel import MissingExtraError, accelerated
from flowaccel.evaluation import set_attention
from flowaccel.evaluation.timing import attention
from flowaccel.evaluation.timing.attention import chosen_attention
from flowaccel.hooks import networks

STEPS = 2


@pytest.fixture(autouse=True)
def global_backend() -> Iterator[None]:
    """diffusers also switches what every network without a choice of its own uses: put back here."""
    with attention_backend("native"):
        yield


def backends(network: nn.Module) -> set[Any]:
    found = {
        getattr(module.processor, "_attention_backend", None)
        for module in network.modules()
        if hasattr(module, "processor")
    }
    return {getattr(backend, "value", backend) for backend in found}


def image(pipe: Any) -> torch.Tensor:
    return pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_sdpa() -> None:
    pipe = tiny.sit_pipeline()
    before = image(pipe)
    set_attention(pipe, "sdpa")
    assert backends(pipe.transformer) == {"native"}
    assert torch.equal(image(pipe), before)


def test_flash_is_torchs_own_kernel_where_it_runs() -> None:
    pipe = tiny.sit_pipeline()
    before = image(pipe)
    try:
        set_attention(pipe, "flash")
    except ValueError as error:
        assert "attention 'flash' does not work on cpu" in str(error)
        assert backends(pipe.transformer) == {None}
    else:
        assert backends(pipe.transformer) == {"_native_flash"}
        torch.testing.assert_close(image(pipe), before, rtol=0, atol=1e-4)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"attention must be one of \['flash', 'sdpa', 'xformers'\], got 'sage'"):
        set_attention(tiny.sit_pipeline(), "sage")


def test_missing_xformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    pipe = tiny.sit_pipeline()
    with pytest.raises(MissingExtraError, match=r"pip install 'flowaccel\[xformers\]'"):
        set_attention(pipe, "xformers")
    assert backends(pipe.transformer) == {None}


def test_xformers_without_kernels_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: Any) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs: ...")

    fake_xformers.put_in_place(monkeypatch, kernel)
    pipe = tiny.sit_pipeline()
    with pytest.raises(
        ValueError, match=r"does not work on cpu with torch\.float32 \(No operator found .*\); use sdpa$"
    ):
        set_attention(pipe, "xformers")
    assert backends(pipe.transformer) == {None}


def test_a_backend_that_diffusers_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.BACKENDS, "sdpa", "no such backend")
    with pytest.raises(ValueError, match="diffusers refuses attention 'sdpa' for SiTTransformer2DModel"):
        set_attention(tiny.sit_pipeline(), "sdpa")


def test_pipelines_with_a_unet() -> None:
    class WithUnet:
        unet = tiny.sit_network()
        device = torch.device("cpu")

    set_attention(WithUnet(), "sdpa")
    assert backends(WithUnet.unet) == {"native"}


# --- whether it is really called


UNET = Case("unet", "unet", tiny.unet_pipeline, lambda **_: tiny.unet_arguments(steps=STEPS), (("uncond", "cond"),))
SWITCHED = {name: CASES[name] for name in ("sit", "dit", "sd3", "flux", "wan21", "wan22")} | {"unet": UNET}
ALIGNED = 8
"""Text tokens, as xformers takes masks."""


def pixart_arguments(tokens: int) -> dict[str, Any]:
    given = CASES["pixart"].arguments(steps=STEPS)
    lengthened = {
        name: nn.functional.pad(value, (0, 0, 0, tokens - 5) if value.ndim == 3 else (0, tokens - 5))
        for name, value in given.items()
        if name.endswith(("embeds", "mask"))
    }
    return {**given, **lengthened}


SWITCHED["pixart"] = replace(CASES["pixart"], arguments=lambda **_: pixart_arguments(ALIGNED))


def calls_and_layers(case: Case, pipe: Any) -> tuple[Tensor, int]:
    """The images of a call, and how often a layer of attention of the networks that it calls was due."""
    due = []
    with ExitStack() as undo:
        for network in [pipe.unet] if case.name == "unet" else networks(pipe).values():
            layers = sum(hasattr(module, "processor") for module in network.modules())
            handle = network.register_forward_hook(lambda *_, layers=layers: due.append(layers))
            undo.callback(handle.remove)
        made = case(pipe, steps=STEPS)
    return made, sum(due)


@pytest.mark.parametrize("case", SWITCHED.values(), ids=SWITCHED)
def test_every_attention_is_computed_by_xformers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    op = fake_xformers.Op()
    fake_xformers.put_in_place(monkeypatch, op)
    pipe = case.make()
    before = case(pipe, steps=STEPS)
    assert op.seen == []
    set_attention(pipe, "xformers")
    op.seen.clear()  # of the trial
    found, due = calls_and_layers(case, pipe)
    assert len(op.seen) == due > 0
    torch.testing.assert_close(found, before, atol=1e-4, rtol=1e-4)
    assert chosen_attention(pipe) == "xformers"
    op.seen.clear()
    set_attention(pipe, "sdpa")
    torch.testing.assert_close(case(pipe, steps=STEPS), before, atol=0, rtol=0)
    assert op.seen == [] and chosen_attention(pipe) == "sdpa"


def test_a_mask_that_xformers_refuses_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers.put_in_place(monkeypatch, fake_xformers.Op())
    pipe = CASES["pixart"].make()
    set_attention(pipe, "xformers")
    with pytest.raises(NotImplementedError, match=r"attn_bias\.stride"):
        pipe(**pixart_arguments(tokens=7))


@pytest.mark.parametrize(
    ("name", "backend", "layer"),
    [
        ("cogview4", "xformers", "a CogView4AttnProcessor"),
        ("auraflow", "xformers", "a AuraFlowAttnProcessor2_0"),
        ("cogview4", "flash", "a CogView4AttnProcessor"),
        ("dit", "flash", "a AttnProcessor2_0"),
        ("sd3", "flash", "a JointAttnProcessor2_0"),
    ],
)
def test_attention_that_cannot_be_switched(
    name: str, backend: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_xformers.put_in_place(monkeypatch, fake_xformers.Op())
    pipe = CASES[name].make()
    before = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    with pytest.raises(ValueError, match=rf"attention '{backend}' cannot be set: .* has {layer}, which does not go"):
        set_attention(pipe, backend)
    after = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert chosen_attention(pipe) is None
    set_attention(pipe, "sdpa")  # what it does anyway


def test_norms_that_diffusers_form_for_xformers_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers.put_in_place(monkeypatch, fake_xformers.Op())
    pipe = CASES["dit"].make()
    pipe.transformer.transformer_blocks[1].attn1.norm_q = nn.Identity()
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.1\.attn1 of DiTTransformer2DModel has a AttnProcessor2_0"
    ):
        set_attention(pipe, "xformers")


def test_attention_that_is_not_torchs_is_not_said_to_be() -> None:
    pipe = CASES["dit"].make()
    pipe.transformer.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"attention 'sdpa' cannot be set: .* has a AttnProcessor, which"):
        set_attention(pipe, "sdpa")


def test_a_network_without_attention() -> None:
    pipe = SimpleNamespace(transformer=nn.Linear(2, 2), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="Linear has no attention that diffusers can switch"):
        set_attention(pipe, "sdpa")


def test_a_refiner_computes_as_its_network_does(monkeypatch: pytest.MonkeyPatch) -> None:
    op = fake_xformers.Op()
    fake_xformers.put_in_place(monkeypatch, op)
    pipe = tiny.sd3_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    recipe = tiny.flowturbo(refiner)
    before = type(refiner.transformer_blocks[0].attn.processor)
    set_attention(pipe, "xformers")
    with accelerated(pipe, recipe):
        assert isinstance(refiner.transformer_blocks[0].attn.processor, XFormersJointAttnProcessor)
    assert type(refiner.transformer_blocks[0].attn.processor) is before
