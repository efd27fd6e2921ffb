"""Image to image, inpainting and video to video of stock pipelines: they leave out steps, whatever a step evaluates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    WanVideoToVideoPipeline,
)

import families
import flowaccel
import tiny
from flowaccel.pipelines import SiTImg2ImgPipeline
from flowaccel.samplers import (
    FlowAdamsBashforthScheduler,
    FlowRungeKuttaScheduler,
    FlowSampler,
    FlowTurboScheduler,
    PolicyScheduler,
)

STEPS = 8
# The evaluations of a run that leaves out 3 of 8 steps.
SAMPLERS: dict[str, tuple[Callable[[Any], FlowSampler], int]] = {
    "euler": (lambda config: FlowRungeKuttaScheduler.from_config(config, solver="euler"), 5),
    "heun": (lambda config: FlowRungeKuttaScheduler.from_config(config, solver="heun"), 10),
    "midpoint": (lambda config: FlowRungeKuttaScheduler.from_config(config, solver="midpoint"), 10),
    "rk4": (lambda config: FlowRungeKuttaScheduler.from_config(config, solver="rk4"), 20),
    "ab2": (FlowAdamsBashforthScheduler.from_config, 5),
    "policy": (PolicyScheduler.from_config, 5),
    "H4P4R0": (lambda config: FlowTurboScheduler.from_config(config, blocks="H4P4R0"), 6),
    "H1P5R2": (lambda config: FlowTurboScheduler.from_config(config, blocks="H1P5R2"), 8),
}
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 1, 16, 16).index_fill(3, torch.arange(8, 16), 1.0)


def sd3(kind: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    pipe = tiny.sd3_pipeline(in_channels=16, out_channels=16, num_layers=1)
    parts = pipe.components | {"vae": tiny.autoencoder(16)}
    given = tiny.sd3_arguments(1, STEPS, scale=1.0) | {"image": PICTURE, "output_type": "latent"}
    return tiny.silent(kind(**parts)), given | arguments


def flux(kind: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    pipe = tiny.flux_pipeline(num_layers=1, num_single_layers=1)
    given = tiny.flux_arguments(1, STEPS, true_scale=1.0) | {"image": PICTURE, "output_type": "latent"}
    return tiny.silent(kind(**pipe.components)), given | arguments


def wan() -> tuple[Any, dict[str, Any]]:
    parts = families.wan_pipeline().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    given = families.wan_arguments(1, STEPS, guided=False) | {"video": list(PICTURE.expand(5, -1, -1, -1))}
    given |= {"output_type": "latent"}
    del given["num_frames"]
    return tiny.silent(WanVideoToVideoPipeline(**{name: parts[name] for name in names})), given


def sit() -> tuple[Any, dict[str, Any]]:
    given = families.sit_arguments(1, STEPS, guided=False) | {"image": torch.full((1, 1, 8, 8), 0.5)}
    return tiny.silent(SiTImg2ImgPipeline.from_pipe(tiny.sit_pipeline())), given


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd3_img2img": lambda: sd3(StableDiffusion3Img2ImgPipeline),
    "sd3_inpaint": lambda: sd3(StableDiffusion3InpaintPipeline, mask_image=MASK),
    "flux_img2img": lambda: flux(FluxImg2ImgPipeline),
    "flux_inpaint": lambda: flux(FluxInpaintPipeline, mask_image=MASK),
    "wan_video_to_video": wan,
    "sit_img2img": sit,
}


def watched(pipe: Any) -> list[float]:
    """The times at which the network is called from here on."""
    times: list[float] = []
    forward = pipe.transformer.forward

    @functools.wraps(forward)
    def seen(*args: Any, **kwargs: Any) -> Any:
        times.append(float(kwargs["timestep"].flatten()[0]))
        return forward(*args, **kwargs)

    pipe.transformer.forward = seen
    return times


def strength_for(name: str) -> float:
    """One that leaves out 3 of the 8 steps though it divides none of them: Wan rounds up and SiT to the nearest."""
    return 0.65 if name == "wan_video_to_video" else 0.6 if name == "sit_img2img" else 0.55


@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "by_hand"])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_sampler_begins_where_euler_begins(name: str, accelerated: bool) -> None:
    """With a seam around the pipeline, or with the scheduler put into an untouched one."""
    pipe, arguments = PIPELINES[name]()
    times = watched(pipe)
    with flowaccel.accelerated(pipe, flowaccel.Sampler("euler")):
        config = {
            name: pipe.scheduler.config[name] for name in ("shift", "use_dynamic_shifting", "num_train_timesteps")
        }
    begins, counts, made = {}, {}, {}
    if accelerated:
        flowaccel.accelerate(pipe, [])
    for sampler, (make, _) in SAMPLERS.items():
        if sampler == "H1P5R2" and name.startswith("flux") and not accelerated:
            continue  # refused, see below
        pipe.scheduler = make(config)
        times.clear()
        arguments["generator"] = torch.Generator().manual_seed(0)
        made[sampler] = pipe(**arguments, return_dict=False, strength=strength_for(name))[0]
        begins[sampler], counts[sampler] = times[0], len(times)
        if accelerated:
            assert flowaccel.report(pipe).num_steps == len(times)
    assert len(set(begins.values())) == 1, begins
    assert counts == {sampler: SAMPLERS[sampler][1] for sampler in counts}
    families.assert_close(made["policy"], made["euler"])  # on the same grid


def test_sd3_begins_at_the_level_that_euler_is_known_for() -> None:
    """8 steps, strength .5, shift 3: sigma .75, not the .955 of the fourth evaluation."""
    pipe, arguments = PIPELINES["sd3_img2img"]()
    flowaccel.accelerate(pipe, flowaccel.Sampler("rk4"))
    times = watched(pipe)
    pipe(**arguments, strength=0.5)
    assert times[0] == 750.0 and len(times) == 16


@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_the_ends_of_strength(strength: float) -> None:
    """All of the steps, and the last one alone."""
    pipe, arguments = PIPELINES["flux_img2img"]()
    flowaccel.accelerate(pipe, flowaccel.Sampler("heun"))
    times = watched(pipe)
    pipe(**arguments, strength=strength)
    assert len(times) == (2 * STEPS if strength == 1 else 2)


def test_inpainting_keeps_what_the_mask_leaves() -> None:
    """The re-noised source comes back after every evaluation at the level of the next, and at the end as it is."""
    pipe, arguments = PIPELINES["sd3_inpaint"]()
    kept = {}
    for sampler in (flowaccel.Sampler("euler"), flowaccel.Sampler("flowturbo", {"blocks": "H4P4R0"})):
        with flowaccel.accelerated(pipe, sampler):
            arguments["generator"] = torch.Generator().manual_seed(0)
            kept[sampler.sampler] = pipe(**arguments, strength=0.5).images
    euler, turbo = kept.values()
    assert torch.equal(euler[..., :4], turbo[..., :4]) and not torch.equal(euler[..., 4:], turbo[..., 4:])


def test_a_step_that_cannot_be_told_is_refused_before_the_run() -> None:
    pipe, arguments = PIPELINES["flux_img2img"]()
    pipe.scheduler = FlowTurboScheduler.from_config(pipe.scheduler.config, blocks="H1P5R2")
    times = watched(pipe)
    with pytest.raises(ValueError, match=r"11 evaluations in 8 steps.*flowaccel\.accelerate"):
        pipe(**arguments, strength=0.55)
    assert not times
    flowaccel.accelerate(pipe, [])  # what the message says
    pipe(**arguments, strength=0.55)
    assert len(times) == SAMPLERS["H1P5R2"][1]


def test_a_refiner_step_cannot_be_the_first() -> None:
    pipe, arguments = PIPELINES["sd3_img2img"]()
    flowaccel.accelerate(pipe, flowaccel.Sampler("flowturbo", {"blocks": "H1P5R2"}))
    times = watched(pipe)
    with pytest.raises(ValueError, match=r"step 6 of 8, an R step.*strength of 0\.375 or more"):
        pipe(**arguments, strength=0.2)
    assert not times
    pipe(**arguments, strength=0.375)
    assert len(times) == 2 + 2 * 2


def test_a_bounded_policy_does_not_begin_midway_of_more_steps() -> None:
    pipe, arguments = PIPELINES["sd3_img2img"]()
    pipe.scheduler = PolicyScheduler.from_config(pipe.scheduler.config, max_steps=4)
    pipe.scheduler.decide = lambda velocity, levels: [max(level - 0.25, 0.0) for level in levels]
    times = watched(pipe)
    with pytest.raises(ValueError, match="num_inference_steps=4 or less"):
        pipe(**arguments, strength=0.5)
    assert not times


def test_entries_left_out_without_asking_are_refused() -> None:
    """A pipeline that slices `timesteps` by its steps and tells nobody: entry 4 of Heun's begins step 2, not step 4."""
    scheduler = FlowRungeKuttaScheduler("heun")
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"left out 4 of them.*steps_left_out \* scheduler.order"):
        scheduler.step(torch.zeros(1), scheduler.timesteps[4], torch.zeros(1))
    assert 4 * scheduler.order == 8 and scheduler.order == 1
    scheduler.step(torch.zeros(1), scheduler.timesteps[8], torch.zeros(1))
