"""UNets: the deep blocks are reused as DeepCache does (arXiv 2312.00858), with fresh skip connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor

import tiny
from families import CASES, Case
from flowaccel import FeatureCache, UnsupportedModelError, accelerate, accelerated, report
from flowaccel.caching.feature_cache import cache_preset
from flowaccel.caching.gates import FirstBlock, Interval, Mask
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Hold
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.caching.scopes import Module, Range, Stack
from flowaccel.hooks import session_of

UNETS = [case for case in CASES.values() if case.family == "unet"]
ALL = pytest.mark.parametrize("case", UNETS, ids=lambda case: case.name)
STEPS = 8
REFUSED = {"teacache"}
"""What reads the input of the first block's attention, which a UNet's blocks do not have among their own modules."""


def images(case: Case, pipe: Any, batch: int = 2, steps: int = STEPS, **options: Any) -> Tensor:
    return case(pipe, batch=batch, steps=steps, **options)


def by_hand(unet: Any, outer: int, computes: Callable[[int], bool]) -> Callable[..., Any]:
    """The forward of a UNet that keeps the output of its deep up blocks, written out for what the tests pass."""
    kept: dict[str, Any] = {"step": 0}

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
        step, kept["step"] = kept["step"], kept["step"] + 1
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        added = unet.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=options.get("added_cond_kwargs"),
        )
        embedding = embedding if added is None else embedding + added
        sample = unet.conv_in(sample)
        skips = (sample,)
        down = list(unet.down_blocks)
        text = {"encoder_hidden_states": encoder_hidden_states}

        def run(block: Any, **inputs: Any) -> Any:
            attends = getattr(block, "has_cross_attention", False)
            return block(temb=embedding, **inputs, **(text if attends else {}))

        def up(blocks: list[Any], sample: Tensor, skips: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            for block in blocks:
                own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
                sample = run(block, hidden_states=sample, res_hidden_states_tuple=own)
            return sample, skips

        for block in down[:outer]:
            sample, more = run(block, hidden_states=sample)
            skips += more
        deep = list(unet.up_blocks)[: len(down) - outer]
        if computes(step):
            inner, inner_skips = sample, skips
            for block in down[outer:]:
                inner, more = run(block, hidden_states=inner)
                inner_skips += more
            inner = run(unet.mid_block, hidden_states=inner)
            kept["deep"], skips = up(deep, inner, inner_skips)
        else:
            # The residual of the last outer down block's downsampler belongs to a deep up block.
            left = sum(len(block.resnets) for block in list(unet.up_blocks)[len(down) - outer :])
            skips = skips[:left]
        sample, _ = up(list(unet.up_blocks)[len(down) - outer :], kept["deep"], skips)
        return (unet.conv_out(unet.conv_act(unet.conv_norm_out(sample))),)

    return forward


@ALL
@pytest.mark.parametrize("front", [1, 2])
def test_it_is_deepcache(case: Case, front: int) -> None:
    """Outer blocks with fresh skips, and the deep feature of the last computed step."""
    pipe = case.make()
    outer = min(front, len(pipe.unet.down_blocks))
    cache = FeatureCache(Interval(3), Range(front=front, back=front), Hold(), Guard(warmup=1, last=0))
    with accelerated(pipe, cache):
        found = images(case, pipe)
        pattern = [all(call.computed) for call in report(pipe).calls]
    assert pattern.count(False) >= STEPS // 2
    pipe.unet.forward = by_hand(pipe.unet, outer, pattern.__getitem__)
    torch.testing.assert_close(found, images(case, pipe), atol=1e-5, rtol=1e-4)


@ALL
def test_never_to_skip_changes_no_bit(case: Case) -> None:
    pipe = case.make()
    expected = images(case, pipe)
    for scope in (Stack(), Range(), Range(front=2, back=2)):
        with accelerated(pipe, FeatureCache(Interval(1), scope)):
            assert torch.equal(images(case, pipe), expected)
    assert torch.equal(images(case, pipe), expected)


@ALL
@pytest.mark.parametrize("name", [name for name in CACHE_PRESETS if name not in REFUSED])
def test_every_image_decides_for_itself_and_is_as_alone(case: Case, name: str) -> None:
    options = {"ratios": (1.0, 0.9)} if name == "magcache" else {}
    pipe = case.make()
    with accelerated(pipe, cache_preset(name, **options)):
        together = images(case, pipe)
        computed = [call.computed for call in report(pipe).calls]
        for image in range(2):
            alone = images(case, pipe, batch=1, seed=3 + image)
            assert [call.computed[0] for call in report(pipe).calls] == [flags[image] for flags in computed]
            torch.testing.assert_close(alone[0], together[image], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "threshold"), [("sd15", 0.81), ("sdxl", 1.01)])
def test_images_that_differ_in_their_decision(name: str, threshold: float) -> None:
    """The deep blocks run for some of the rows alone, and that is counted."""
    case = CASES[name]
    pipe = case.make()
    with accelerated(pipe, FeatureCache(FirstBlock(threshold), Range())):
        together = images(case, pipe, steps=12)
        mixed = [call for call in report(pipe).calls if len(set(call.computed)) == 2]
        assert mixed and all(call.not_run["mid_block"] == 2 for call in mixed)
        for image in range(2):
            torch.testing.assert_close(
                images(case, pipe, batch=1, seed=3 + image, steps=12)[0], together[image], atol=1e-4, rtol=1e-3
            )


def test_a_second_call_of_another_size_starts_afresh() -> None:
    case = CASES["sdxl"]
    pipe = case.make()
    accelerate(pipe, FeatureCache(Interval(2), Range()))
    images(case, pipe)
    found, fresh = [], case.make()
    accelerate(fresh, FeatureCache(Interval(2), Range()))
    for one in (pipe, fresh):
        found.append(one(**case.arguments(batch=1, steps=STEPS) | {"height": 32, "width": 24}).images)
    assert torch.equal(*found)


def test_what_a_controlnet_adds_passes_the_blocks_that_do_not_run() -> None:
    """Residuals are added to every skip connection and to the middle block, also where these were left out."""
    base = tiny.unet_pipeline()
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 4)).eval()
    tiny.random_weights(control, 1)
    parts = {**base.components, "controlnet": control}
    pipe = tiny.silent(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    hint = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)).expand(2, -1, -1, -1)

    def made() -> Tensor:
        return pipe(image=hint, **tiny.unet_arguments(batch=2, steps=STEPS)).images

    plain = made()
    with accelerated(pipe, FeatureCache(Interval(1), Range())):
        assert torch.equal(made(), plain)
    with accelerated(pipe, FeatureCache(Interval(2), Range())):
        assert not torch.equal(made(), plain)
        assert [call.what for call in report(pipe).calls].count("reused") >= STEPS // 3


@ALL
@pytest.mark.parametrize(
    "cache", [cache_preset("teacache"), FeatureCache(Mask("fast"), Module())], ids=["teacache", "module"]
)
def test_what_cannot_work_is_refused(case: Case, cache: FeatureCache) -> None:
    pipe = case.make()
    expected = images(case, pipe)
    with pytest.raises(UnsupportedModelError, match="attention"), accelerated(pipe, cache):
        images(case, pipe)
    assert torch.equal(images(case, pipe), expected)


@ALL
def test_guidance_that_ends_halves_the_batch(case: Case) -> None:
    pipe = case.make()
    with accelerated(pipe, "guidance_interval"):
        images(case, pipe)
        rows = [record.not_run.get("", 0) for record in session_of(pipe).run.records]
    assert rows == [0] * (STEPS // 2) + [2] * (STEPS - STEPS // 2)
