"""`SiTPipeline`: any flow scheduler, reproducible images, guidance, callbacks, decoding, wrong use, save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import flowaccel
from flowaccel import FlowRungeKuttaScheduler, FlowTurboScheduler, SiTPipeline
from flowaccel.pipelines.sit_blocks import guide
from helpers import ALL_SAMPLERS, assert_close, counted
from tiers import Process
from tiny import autoencoder, generators, latent_sit_pipeline

STEPS = 4
LATENT: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
STOCK: dict[str, Any] = {
    "stock euler": FlowMatchEulerDiscreteScheduler,
    "stock euler, shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "stock heun": FlowMatchHeunDiscreteScheduler,
}
NAMES = {"0": "tench, Tinca tinca", "1": "goldfish", "7": "cock"}


def scheduler(name: str) -> Any:
    return STOCK[name]() if name in STOCK else ALL_SAMPLERS[name][0](STEPS)


# --- schedulers and seeds


@pytest.mark.parametrize("name", [*STOCK, *ALL_SAMPLERS])
def test_image_does_not_depend_on_its_batch(name: str) -> None:
    """One generator per image: three at once are the three alone, with any scheduler."""
    pipe = latent_sit_pipeline(scheduler(name))
    together = pipe([3, 1, 4], generator=generators(5, 6, 7), **LATENT).images
    singly = [pipe(label, generator=generators(seed), **LATENT).images for label, seed in ((3, 5), (1, 6), (4, 7))]
    assert together.isfinite().all()
    assert_close(together, torch.cat(singly), 1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", [*STOCK, *ALL_SAMPLERS])
def test_same_seed_same_image(name: str) -> None:
    pipe = latent_sit_pipeline(scheduler(name))
    one, other = (pipe([3, 1], generator=generators(5)[0], **LATENT).images for _ in range(2))
    assert torch.equal(one, other)


def test_stock_euler_is_eulers_method() -> None:
    """Given the same noise levels the stock scheduler and ours give the same image."""
    latents = torch.randn(2, 4, 8, 8)
    pipe = latent_sit_pipeline(FlowRungeKuttaScheduler("euler"))
    expected = pipe([1, 2], latents=latents, **LATENT).images
    stock = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler = stock
    uniform = [1 - step / STEPS for step in range(STEPS)]
    original = stock.set_timesteps
    stock.set_timesteps = lambda count, device=None: original(sigmas=uniform, device=device)
    assert_close(pipe([1, 2], latents=latents, **LATENT).images, expected, 1e-5)


def test_default_step_count() -> None:
    lengths = []
    for made in (FlowTurboScheduler("H1P2"), FlowRungeKuttaScheduler("euler")):
        pipe = latent_sit_pipeline(made)
        pipe(1, output_type="latent", guidance_scale=1.0)
        lengths.append(len(made.timesteps))
    assert lengths == [4, 50]


def test_given_latents_are_used_and_kept() -> None:
    pipe = latent_sit_pipeline()
    latents = torch.randn(2, 4, 8, 8)
    kept = latents.clone()
    one = pipe([1, 2], latents=latents, **LATENT).images
    assert torch.equal(latents, kept)
    assert torch.equal(one, pipe([1, 2], latents=latents, generator=generators(1, 2), **LATENT).images)
    drawn = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators(1, 2)])
    seeded = pipe([1, 2], generator=generators(1, 2), **LATENT).images
    assert torch.equal(seeded, pipe([1, 2], latents=drawn, **LATENT).images)


def test_half_precision_keeps_the_state_in_float32() -> None:
    pipe = latent_sit_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    expected = pipe(1, latents=latents, **LATENT).images
    half = pipe.to(dtype=torch.bfloat16)(1, latents=latents.bfloat16(), **LATENT).images
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


# --- guidance


def test_scale_one_is_the_conditional_velocity() -> None:
    """One row per image and call, and no null label."""
    pipe = latent_sit_pipeline()
    latents = torch.randn(2, 4, 8, 8)
    with counted(pipe.transformer) as rows:
        images = pipe([1, 2], guidance_scale=1.0, latents=latents, **LATENT).images
    assert rows == [2] * STEPS
    expected = latents
    with torch.no_grad():
        for step in range(STEPS):
            expected = expected + pipe.transformer(expected, step / STEPS, torch.tensor([1, 2])).sample / STEPS
    assert_close(images, expected, 1e-5)
    with counted(pipe.transformer) as rows:
        pipe([1, 2], guidance_scale=1.5, latents=latents, **LATENT)
    assert rows == [4] * STEPS


@pytest.mark.parametrize("channels", [1, 3, "all"])
def test_guided_channels(channels: Any) -> None:
    """One Euler step: the guided channels move by the guided velocity, the others by the conditional one."""
    pipe = latent_sit_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    moved = pipe(2, 1, guidance_scale=4.0, guidance_channels=channels, latents=latents, output_type="latent").images
    with torch.no_grad():
        conditional, null = pipe.transformer(latents.repeat(2, 1, 1, 1), 0.0, torch.tensor([2, 10])).sample.chunk(2)
    guided = null + 4 * (conditional - null)
    count = 4 if channels == "all" else channels
    expected = latents + torch.cat([guided[:, :count], conditional[:, count:]], dim=1)
    assert_close(moved, expected, 1e-5)
    assert (guided - conditional).abs().max() > 0.05


def test_three_and_all_channels_differ_only_by_what_is_left_out() -> None:
    pipe = latent_sit_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    by_channels = [
        pipe(2, guidance_channels=channels, latents=latents, **LATENT).images for channels in (3, "all", 4, 9)
    ]
    assert (by_channels[0] - by_channels[1]).abs().max() > 1e-3
    assert torch.equal(by_channels[1], by_channels[2]) and torch.equal(by_channels[1], by_channels[3])


def test_guide() -> None:
    velocity = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 10.0]]).reshape(2, 4, 1, 1)
    assert guide(velocity, 2.0, 3).flatten(1).tolist() == [[2, 4, 6, 4], [2, 4, 6, 10]]
    assert guide(velocity, 2.0, "all").flatten(1).tolist() == [[2, 4, 6, -2]] * 2


def test_network_without_null_class() -> None:
    pipe = latent_sit_pipeline(null_class=False)
    assert pipe([0, 9], guidance_scale=1.0, **LATENT).images.isfinite().all()
    with pytest.raises(ValueError, match=r"guidance_scale=1.5 needs a null class.*use guidance_scale=1"):
        pipe([0, 9], **LATENT)


# --- callbacks


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_callback_sees_and_replaces_the_latents(scale: float) -> None:
    pipe = latent_sit_pipeline()
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert given is pipe and list(tensors) == ["latents"]
        seen.append((index, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == STEPS - 1 else {}

    options = {**LATENT, "guidance_scale": scale}
    images = pipe([1, 2], callback_on_step_end=callback, **options).images
    assert seen == [(i, t, (2, 4, 8, 8)) for i, t in enumerate([1000.0, 750.0, 500.0, 250.0])]
    assert not images.any()


def test_callback_replaces_latents_in_the_middle() -> None:
    """From then on the run is that of the replaced latents."""
    pipe = latent_sit_pipeline()
    latents, other = torch.randn(2, 1, 4, 8, 8)
    swapped = pipe(
        1, latents=latents, callback_on_step_end=lambda p, i, t, d: {"latents": other} if i == 1 else None, **LATENT
    ).images
    pipe.scheduler.set_timesteps(STEPS)
    expected = other
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps[2:]:
            doubled = expected.repeat(2, 1, 1, 1)
            output = pipe.transformer(doubled, 1 - timestep / 1000, torch.tensor([1, 10])).sample
            expected = expected + guide(output, 1.5, 3)[:1] / STEPS
    assert_close(swapped, expected, 1e-5)


def test_callback_that_returns_nothing_changes_nothing() -> None:
    pipe = latent_sit_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    watched = pipe(1, latents=latents, callback_on_step_end=lambda *_: None, **LATENT).images
    assert torch.equal(watched, pipe(1, latents=latents, **LATENT).images)


@pytest.mark.parametrize("name", ["euler", "heun", "flowturbo-hp", "sde-heun", "stock heun"])
def test_interrupted_run_leaves_nothing_behind(name: str) -> None:
    pipe = latent_sit_pipeline(scheduler(name))
    options = {**LATENT, "latents": torch.randn(1, 4, 8, 8)}
    assert not pipe.interrupt
    expected = pipe(1, generator=generators(1), **options).images

    def stop(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given._interrupt = index == 1
        return {}

    with counted(pipe.transformer) as rows:
        pipe(2, callback_on_step_end=stop, generator=generators(2), **options)
    assert len(rows) == 2 and pipe.interrupt
    assert torch.equal(pipe(1, generator=generators(1), **options).images, expected)
    assert not pipe.interrupt


@pytest.mark.parametrize("name", ["heun", "ab2", "flowturbo-hpr", "sde-heun", "stock heun"])
def test_raised_run_leaves_nothing_behind(name: str) -> None:
    pipe = latent_sit_pipeline(scheduler(name))
    options = {**LATENT, "latents": torch.randn(1, 4, 8, 8)}
    expected = pipe(1, generator=generators(1), **options).images

    def fail(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == 2:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        pipe(2, callback_on_step_end=fail, generator=generators(2), **options)
    assert torch.equal(pipe(1, generator=generators(1), **options).images, expected)


# --- output


def test_output_types_agree() -> None:
    pipe = latent_sit_pipeline(in_channels=3)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "latents": torch.randn(2, 3, 8, 8)}
    latent, pt, array, pil = (
        pipe([1, 2], output_type=kind, **options).images for kind in ("latent", "pt", "np", "pil")
    )
    expected = (latent / 2 + 0.5).clamp(0, 1)
    assert latent.shape == pt.shape == (2, 3, 8, 8)
    assert_close(pt, expected, 1e-6)
    assert isinstance(array, np.ndarray) and array.shape == (2, 8, 8, 3) and array.dtype == np.float32
    assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), expected, 1e-6)
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (8, 8) for image in pil)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in pil])).permute(0, 3, 1, 2)
    assert torch.equal(pixels, (expected * 255).round().byte())


def test_grey_images() -> None:
    pipe = latent_sit_pipeline(in_channels=1)
    (image,) = pipe(1, num_inference_steps=1).images
    assert image.mode == "L" and image.size == (8, 8)


def test_return_dict() -> None:
    pipe = latent_sit_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    (images,) = pipe(1, latents=latents, return_dict=False, **LATENT)
    assert torch.equal(images, pipe(1, latents=latents, **LATENT).images)


@pytest.mark.parametrize(
    "options", [{"scaling_factor": 0.5, "shift_factor": None}, {"scaling_factor": 1.5, "shift_factor": 0.1}], ids=str
)
def test_optional_decoder(options: dict[str, Any]) -> None:
    vae = autoencoder(**options)
    pipe = latent_sit_pipeline(vae=vae)
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "latents": torch.randn(2, 4, 8, 8)}
    latents = pipe([1, 2], output_type="latent", **arguments).images
    with torch.no_grad():
        decoded = vae.decode(latents / options["scaling_factor"] + (options["shift_factor"] or 0.0)).sample
    images = pipe([1, 2], output_type="pt", **arguments).images
    assert images.shape == (2, 3, 16, 16)
    assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), 1e-5)


def test_classes_by_name() -> None:
    pipe = latent_sit_pipeline(id2label=NAMES)
    assert pipe.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "cock": 7}
    latents = torch.randn(3, 4, 8, 8)
    by_name = pipe(["Tinca tinca", "cock", 1], latents=latents, **LATENT).images
    assert torch.equal(by_name, pipe([0, 7, 1], latents=latents, **LATENT).images)
    assert latent_sit_pipeline().labels == {}


@pytest.mark.parametrize("labels", [3, [3], (3,), np.int64(3), torch.tensor(3)], ids=repr)
def test_ways_to_give_a_class(labels: Any) -> None:
    pipe = latent_sit_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(pipe(labels, latents=latents, **LATENT).images, pipe([3], latents=latents, **LATENT).images)


# --- wrong use

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (10, {}, r"class_labels must lie in 0 .. 9, got \[10\]"),
    ([1, -1], {}, r"class_labels must lie in 0 .. 9, got \[-1\]"),
    (True, {}, "class_labels must be integers or class names, got True"),
    (1.5, {}, "class_labels must be integers or class names, got 1.5"),
    (None, {}, "class_labels must be integers or class names, got None"),
    ([[1]], {}, r"class_labels must be integers or class names, got \[1\]"),
    ([], {}, "class_labels must name at least one class, got an empty list"),
    ("trout", {}, r"unknown class 'trout'; the classes of this model are \['tench', 'Tinca tinca', 'goldfish'"),
    (1, {"guidance_scale": 0.5}, "guidance_scale must be finite and at least 1.*got 0.5"),
    (1, {"guidance_scale": -1}, "guidance_scale must be finite and at least 1.*got -1"),
    (1, {"guidance_scale": float("nan")}, "guidance_scale must be finite and at least 1.*got nan"),
    (1, {"guidance_scale": float("inf")}, "guidance_scale must be finite and at least 1.*got inf"),
    (1, {"guidance_channels": 0}, "guidance_channels must be a positive number of channels or 'all', got 0"),
    (1, {"guidance_channels": "3"}, "guidance_channels must be a positive number of channels or 'all', got '3'"),
    (1, {"guidance_channels": 1.5}, "guidance_channels must be a positive number of channels or 'all', got 1.5"),
    (1, {"output_type": "jpeg"}, r"output_type must be one of \('pil', 'np', 'pt', 'latent'\), got 'jpeg'"),
    ([1, 2], {"generator": generators(1)}, "generator must be one generator or a list of 2 .* got 1"),
    ([1, 2], {"generator": tuple(generators(1, 2))}, "generator must be one torch.Generator or a list .* got tuple"),
    (1, {"generator": 5}, "generator must be one torch.Generator or a list of them, got int"),
    ([1, 2], {"latents": torch.zeros(1, 4, 8, 8)}, r"latents must have shape \(2, 4, 8, 8\) for 2 labels, got \(1,"),
    (1, {"latents": torch.zeros(1, 4, 8, 16)}, r"latents must have shape \(1, 4, 8, 8\) for 1 labels"),
    (1, {"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    (1, {"callback_on_step_end_tensor_inputs": ["prompt"]}, r"may only name \['latents'\], got \['prompt'\]"),
]


@pytest.mark.parametrize(("labels", "options", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_use(labels: Any, options: dict[str, Any], message: str) -> None:
    """Before anything is computed, and the next run is as if nothing had happened."""
    pipe = latent_sit_pipeline(id2label=NAMES)
    with counted(pipe.transformer) as rows, pytest.raises(ValueError, match=message):
        pipe(labels, **{"num_inference_steps": 2, **options})
    assert rows == []


def test_unknown_name_where_classes_have_none() -> None:
    with pytest.raises(ValueError, match="unknown class 'cock'; the classes of this model are unnamed"):
        latent_sit_pipeline()("cock")


def test_steps_that_do_not_fit_the_blocks() -> None:
    pipe = latent_sit_pipeline(FlowTurboScheduler("H1P2"))
    with pytest.raises(ValueError, match="num_inference_steps must be 3 for blocks 'H1P2'"):
        pipe(1, num_inference_steps=4)


# --- save and load

FRESH = """
import sys, torch
import flowaccel
from flowaccel.pipelines import load_pipeline
from safetensors.torch import load_file, save_file
folder, request, result = sys.argv[1:]
latents = load_file(request)["latents"]
images = {}
for name, load in (("class", flowaccel.SiTPipeline.from_pretrained), ("load_pipeline", load_pipeline)):
    pipe = load(folder)
    assert type(pipe) is flowaccel.SiTPipeline and type(pipe.scheduler) is flowaccel.FlowTurboScheduler
    assert pipe.labels == {"zero": 0, "one": 1}, pipe.labels
    images[name] = pipe(["one", "zero"], latents=latents, output_type="pt").images.contiguous()
save_file(images, result)
"""


def test_fresh_process_gives_the_same_image(tmp_path: Path, process: Process) -> None:
    pipe = latent_sit_pipeline(FlowTurboScheduler("H1P2"), vae=autoencoder(), id2label={"0": "zero", "1": "one"})
    latents = torch.randn(2, 4, 8, 8)
    expected = pipe(["one", "zero"], latents=latents, output_type="pt").images
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == "SiTPipeline"
    assert index["transformer"] == ["flowaccel", "SiTTransformer2DModel"]
    assert index["scheduler"] == ["flowaccel", "FlowTurboScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert {path.suffix for path in (tmp_path / "pipe").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    save_file({"latents": latents}, tmp_path / "request.safetensors")
    folders = [tmp_path / name for name in ("pipe", "request.safetensors", "result")]
    process("-c", FRESH, *folders, cwd=tmp_path)
    for images in load_file(tmp_path / "result").values():
        assert torch.equal(images, expected)


def test_without_a_decoder_it_is_saved_without_one(tmp_path: Path) -> None:
    pipe = latent_sit_pipeline(FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == [None, None]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vae is None and loaded.scheduler.config.shift == 2.0
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(loaded(1, latents=latents, **LATENT).images, pipe(1, latents=latents, **LATENT).images)


@pytest.mark.gpu
@torch.no_grad()
def test_model_offload() -> None:
    pipe = latent_sit_pipeline(vae=autoencoder())
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "latents": torch.randn(2, 4, 8, 8), "output_type": "pt"}
    expected = pipe([1, 2], **arguments).images
    pipe.enable_model_cpu_offload()
    assert_close(pipe([1, 2], **arguments).images.cpu(), expected, 1e-3)
    assert pipe.transformer.device.type == pipe.vae.device.type == "cpu"


def test_it_is_the_exported_class() -> None:
    assert flowaccel.SiTPipeline is SiTPipeline
