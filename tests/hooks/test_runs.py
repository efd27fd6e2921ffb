"""Runs of pipelines that do not walk their scheduler's timesteps once from the first to the last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)

import families
import flowaccel
import tiny
from flowaccel import FeatureCache, UnsupportedModelError
from flowaccel.hooks import session_of

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def cache() -> FeatureCache:
    """Every second evaluation is computed, and the last."""
    return FeatureCache(gate="interval", interval=2, phase=0, scope="output", predictor="hold", last=1)


def computed(pipe: Any) -> list[tuple[int, str]]:
    """Per conditional call of the last run, its step and whether the network ran."""
    run = session_of(pipe).last_run
    assert run is not None
    return [(record.step, record.what) for record in run.records if "cond" in record.branches]


def unet_img2img(kind: Any = StableDiffusionImg2ImgPipeline, **config: Any) -> Any:
    pipe = tiny.unet_pipeline(**config)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return tiny.silent(kind(**parts, requires_safety_checker=False))


class Walk(DiffusionPipeline):
    """A minimal pipeline around a real scheduler and network, with the loops of others: `steps` says how each one is
    made, `segments` how often, `cut` how many evaluations another pipeline makes at the end.
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, count: int = 6, steps: str = "plain", segments: int = 1, cut: int = 0) -> torch.Tensor:
        self.scheduler.set_timesteps(count)
        for _ in range(segments):
            timesteps = self.scheduler.timesteps[: count - cut]
            self._num_timesteps = len(timesteps) * segments
            x = torch.ones(1, 1, 8, 8)
            with self.progress_bar(total=len(timesteps)):
                for t in timesteps:
                    labels = torch.zeros(1, dtype=torch.long)
                    v = self.transformer(x, timestep=1 - t.expand(1) / 1000, class_labels=labels, return_dict=False)[0]
                    if steps == "twice":  # Cosmos 1 asks for the clean sample first
                        v = self.scheduler.step(v, t, x, return_dict=False)[1]
                        self.scheduler._step_index -= 1
                        x = self.scheduler.step(v, t, x, return_dict=False, pred_original_sample=v)[0]
                    else:
                        x = self.scheduler.step(v, t, x, return_dict=False)[0]
            if segments > 1:
                self.scheduler.set_timesteps(count)  # WanAnimate gets ready for a next one, also after the last
        return x


def walk(scheduler: Any = None) -> Walk:
    return tiny.silent(Walk(tiny.sit_network(), scheduler or FlowMatchEulerDiscreteScheduler()))


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionPAGImg2ImgPipeline])
@pytest.mark.parametrize("strength", [0.8, 1.0])
def test_a_timestep_that_is_listed_twice_counts_twice(kind: Any, strength: float) -> None:
    """PNDM lists its second timestep twice, so that an img2img of 6 steps has 7, of which strength .8 leaves out 2."""
    options = {"pag_applied_layers": ["mid"]} if "PAG" in kind.__name__ else {}
    pipe = unet_img2img(kind)
    if options:
        pipe.set_pag_applied_layers(["mid"])
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    flowaccel.accelerate(pipe, cache())
    arguments = tiny.unet_arguments(steps=6) | {"image": PICTURE, "strength": strength, "output_type": "latent"}
    del arguments["height"], arguments["width"]
    if options:
        arguments["pag_scale"] = 0.0
    pipe(**arguments)
    made, run = 5 if strength < 1 else 7, session_of(pipe).last_run
    assert run is not None and run.num_steps == made == len(computed(pipe)) and not run.failed
    assert computed(pipe)[-1] == (made - 1, "computed")


def test_a_run_that_leaves_its_end_to_another_pipeline() -> None:
    """SDXL's `denoising_end`, by a minimal pipeline: the last evaluation that is made is the last."""
    pipe = walk()
    flowaccel.accelerate(pipe, cache())
    pipe(6, cut=2)
    assert flowaccel.report(pipe).num_steps == 4
    assert computed(pipe)[-1] == (3, "computed") and not flowaccel.report(pipe).failed


def test_timesteps_that_nobody_uses_do_not_wipe_the_report() -> None:
    """WanAnimate sets them after every segment, also the last; a minimal pipeline does here."""
    pipe = walk()
    flowaccel.accelerate(pipe, cache())
    pipe(6, segments=2)
    report = flowaccel.report(pipe)
    assert len(report.steps) == report.num_steps == 6 and not report.failed
    pipe.scheduler.set_timesteps(3)
    assert flowaccel.report(pipe).num_steps == 6


def test_two_steps_on_one_output_are_one() -> None:
    """Cosmos 1's loop, by a minimal pipeline around its scheduler."""
    pipe = walk(EDMEulerScheduler(prediction_type="epsilon", final_sigmas_type="sigma_min"))
    expected = pipe(6, steps="twice")
    flowaccel.accelerate(pipe, cache())
    changed = pipe(6, steps="twice")
    assert [step for step, _ in computed(pipe)] == list(range(6)) and flowaccel.report(pipe).num_steps == 6
    assert [what for _, what in computed(pipe)].count("reused") == 2 and not torch.equal(changed, expected)
    assert not flowaccel.report(pipe).failed


def sky_reels() -> Any:
    torch.manual_seed(0)
    network = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=families.WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = families.wan_pipeline().vae
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return tiny.silent(
        SkyReelsV2DiffusionForcingPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=scheduler,
            transformer=families.prepared(network, 0),
        )
    )


def sky_reels_arguments(guided: bool) -> dict[str, Any]:
    return families.wan_arguments(steps=6, guided=guided) | {"prompt": None, "num_frames": 9, "output_type": "latent"}


@pytest.mark.parametrize("guided", [True, False])
def test_steps_on_copies_of_the_scheduler_are_counted(guided: bool) -> None:
    pipe = sky_reels()
    flowaccel.accelerate(pipe, cache())
    pipe(**sky_reels_arguments(guided))
    report = flowaccel.report(pipe)
    assert report.num_steps == 6 and not report.failed
    assert computed(pipe) == [(step, "reused" if step in (1, 3) else "computed") for step in range(6)]


def test_frames_at_different_times_are_refused_before_a_network_call() -> None:
    pipe = sky_reels()
    arguments = sky_reels_arguments(False) | {"ar_step": 2, "causal_block_size": 1}
    with flowaccel.accelerated(pipe, []):
        expected = pipe(**arguments | {"generator": torch.Generator().manual_seed(0)}).frames
        assert len(flowaccel.report(pipe).steps) == flowaccel.report(pipe).num_steps > 6
    calls = []
    flowaccel.accelerate(pipe, cache())
    pipe.transformer.condition_embedder.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UnsupportedModelError, match=r"one after the other.*ar_step=0"):
        pipe(**arguments)
    assert not calls
    flowaccel.restore(pipe)
    assert pipe(**arguments | {"generator": torch.Generator().manual_seed(0)}).frames.equal(expected)


def instruct() -> tuple[Any, dict[str, Any]]:
    pipe = unet_img2img(StableDiffusionInstructPix2PixPipeline, in_channels=8)
    arguments = tiny.unet_arguments(batch=2, steps=4) | {"image": PICTURE.expand(2, -1, -1, -1)}
    del arguments["height"], arguments["width"]
    return pipe, arguments


def perturbed(guided: bool) -> tuple[Any, dict[str, Any]]:
    pipe = tiny.unet_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipe = tiny.silent(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))
    pipe.set_pag_applied_layers(["mid"])
    return pipe, tiny.unet_arguments(batch=2, steps=4, scale=4.0 if guided else 0.0) | {"pag_scale": 2.0}


THREE_ROWS = {
    "InstructPix2Pix": (instruct, 3),
    "PAG": (lambda: perturbed(True), 3),
    "PAG_without_guidance": (lambda: perturbed(False), 2),
}


@pytest.mark.parametrize("name", THREE_ROWS)
def test_rows_beyond_guidance_are_no_images(name: str) -> None:
    make, copies = THREE_ROWS[name]
    pipe, arguments = make()
    arguments["output_type"] = "latent"
    scheduler = pipe.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    for recipe, same in ((flowaccel.GuidanceSkip(), True), (cache(), False)):
        arguments["generator"] = torch.Generator().manual_seed(0)
        expected = pipe(**arguments).images
        with flowaccel.accelerated(pipe, recipe):
            arguments["generator"] = torch.Generator().manual_seed(0)
            made = pipe(**arguments).images
            run = session_of(pipe).last_run
        assert run is not None and run.images == 2 and {record.rows for record in run.records} == {2 * copies}
        assert torch.equal(made, expected) == same
        if not same:
            assert [record.what for record in run.records] == ["computed", "reused", "computed", "computed"]
            assert all(len(record.computed) == 2 for record in run.records)
