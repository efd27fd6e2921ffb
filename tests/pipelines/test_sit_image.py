"""Image to image and inpainting with SiT: hand-written runs, every sampler, forms of images, wrong use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from torch import Tensor

import flowaccel
import tiny
from flowaccel import FlowRungeKuttaScheduler, FlowTurboScheduler, SiTImg2ImgPipeline, SiTInpaintPipeline, SiTPipeline
from flowaccel.pipelines import load_pipeline
from helpers import ALL_SAMPLERS, assert_close, counted
from tiny import autoencoder, generators, latent_sit_pipeline

STEPS = 4
STOCK: dict[str, Any] = {"stock euler": FlowMatchEulerDiscreteScheduler, "stock heun": FlowMatchHeunDiscreteScheduler}
EVERY_SAMPLER = [*STOCK, *ALL_SAMPLERS]
LATENT: dict[str, Any] = {"output_type": "latent"}


def scheduler(name: str) -> Any:
    return STOCK[name]() if name in STOCK else ALL_SAMPLERS[name][0](STEPS)


def pipeline(kind: Any, made: Any = None, **config: Any) -> Any:
    """A grey 8x8 pipeline on pixels."""
    pipe = kind(tiny.sit_network(**config), made or FlowRungeKuttaScheduler("heun"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 1, 8, 8)


def left_half(value: float = 1.0) -> Tensor:
    """A mask that paints the left half."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = value
    return mask


# --- against runs written by hand (t = 1 - sigma, velocity data - noise, no guidance)


class ByHand:
    """FlowTurbo's table on a network and its refiner, with an optional blend after every step."""

    def __init__(self, network: Any, refiner: Any, source: Tensor, noise: Tensor, mask: Tensor | None) -> None:
        self.network, self.refiner = network, refiner
        self.source, self.noise, self.mask = source, noise, mask
        self.labels = torch.tensor([3, 4])

    def noised(self, t: float) -> Tensor:
        return t * self.source + (1 - t) * self.noise

    def v(self, x: Tensor, t: float) -> Tensor:
        return self.network(x, t, self.labels).sample

    def r(self, x: Tensor, feed: Tensor, t: float) -> Tensor:
        return self.refiner(torch.cat([x, feed], dim=1), t, self.labels).sample

    @torch.no_grad()
    def run(self, kinds: str, steps: int) -> Tensor:
        first = steps - len(kinds)
        x, width, c = self.noised(first / steps), 1 / steps, None
        for step, kind in enumerate(kinds, start=first):
            t, after = step / steps, (step + 1) / steps
            if kind == "E":
                x = x + width * self.v(x, t)
            elif kind == "R":
                assert c is not None
                d = c + self.r(x, c, t)
                e = d + self.r(x + width * d, c, after)
                x, c = x + width / 2 * (d + e), d
            else:
                d = self.v(x, t) if kind == "H" or c is None else c
                e = self.v(x + width * d, after)
                x, c = x + width / 2 * (d + e), e
            if self.mask is not None:
                x = torch.where(self.mask > 0, x, self.noised(after))
        return x


HAND: list[tuple[Any, int, float, str]] = [
    (FlowRungeKuttaScheduler("euler"), 5, 0.6, "EEE"),
    (FlowRungeKuttaScheduler("euler"), 5, 0.2, "E"),
    (FlowRungeKuttaScheduler("heun"), 4, 0.5, "HH"),
    (FlowTurboScheduler("H2P2R2"), 6, 1.0, "HHPPRR"),
    (FlowTurboScheduler("H2P2R2"), 6, 0.84, "HPPRR"),
    (FlowTurboScheduler("H2P2R2"), 6, 0.67, "PPRR"),  # the first P is a Heun step
    (FlowTurboScheduler("H2P2R2"), 6, 0.5, "PRR"),
    (FlowTurboScheduler("H3"), 3, 0.3, "H"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("made", "steps", "strength", "kinds"), HAND, ids=[f"{k}-{s}" for _, _, s, k in HAND])
def test_against_a_loop_by_hand(
    made: Any, steps: int, strength: float, kinds: str, masked: bool, image: Tensor
) -> None:
    pipe = pipeline(SiTInpaintPipeline if masked else SiTImg2ImgPipeline, made)
    refiner = tiny.random_refiner(pipe.transformer)
    noise = torch.randn(2, 1, 8, 8)
    hand = ByHand(pipe.transformer, refiner, 2 * image - 1, noise, left_half() if masked else None)
    options = {"strength": strength, "num_inference_steps": steps, "guidance_scale": 1.0, "latents": noise, **LATENT}
    masks = {"mask_image": left_half()} if masked else {}
    expected = hand.run(kinds, steps)
    with counted(pipe.transformer) as calls, counted(refiner) as refiner_calls:
        if "R" in kinds:
            flowaccel.accelerate(pipe, flowaccel.VelocityRefiner(refiner))
        images = pipe([3, 4], image, **masks, **options).images
        flowaccel.restore(pipe)
    assert_close(images, expected, 1e-5)
    evaluations = {"E": 1, "H": 2, "P": 1, "R": 0}
    assert len(calls) == sum(evaluations[kind] for kind in kinds) + (kinds[0] == "P")
    assert len(refiner_calls) == 2 * kinds.count("R")


# --- every sampler


@pytest.mark.parametrize("name", EVERY_SAMPLER)
def test_full_strength_is_generation_from_noise(name: str, image: Tensor) -> None:
    options = {"num_inference_steps": STEPS, **LATENT}
    expected = pipeline(SiTPipeline, scheduler(name))([1, 2], generator=generators(5, 6), **options).images
    pipe = pipeline(SiTImg2ImgPipeline, scheduler(name))
    assert torch.equal(pipe([1, 2], image, 1.0, generator=generators(5, 6), **options).images, expected)


@pytest.mark.parametrize("name", EVERY_SAMPLER)
def test_masks_of_one_value(name: str, image: Tensor) -> None:
    """All ones is image to image; all zeros gives the source back."""
    options = {"strength": 0.5, "num_inference_steps": STEPS, "output_type": "pt"}
    pipe = pipeline(SiTInpaintPipeline, scheduler(name))
    painted, kept = (
        pipe([1, 2], image, torch.full((8, 8), value), generator=generators(5, 6), **options).images
        for value in (1.0, 0.0)
    )
    to_image = pipeline(SiTImg2ImgPipeline, scheduler(name))
    assert torch.equal(painted, to_image([1, 2], image, generator=generators(5, 6), **options).images)
    assert_close(kept, image, 1e-6)
    assert (painted - image).abs().max() > 0.1


@pytest.mark.parametrize("name", EVERY_SAMPLER)
def test_image_does_not_depend_on_its_batch(name: str, image: Tensor) -> None:
    pipe = pipeline(SiTInpaintPipeline, scheduler(name))
    options = {"strength": 0.75, "num_inference_steps": STEPS, **LATENT}
    together = pipe([3, 1], image, left_half(), generator=generators(5, 6), **options).images
    singly = [
        pipe(label, image[i], left_half(), generator=generators(seed), **options).images
        for i, (label, seed) in enumerate(((3, 5), (1, 6)))
    ]
    assert_close(together, torch.cat(singly), 1e-5)
    source = 2 * image - 1
    assert torch.equal(together[..., 4:], source[..., 4:])
    assert (together - source)[..., :4].abs().max() > 0.1


def test_strength_leaves_out_first_steps(image: Tensor) -> None:
    """The further from the source, the more steps; the calls are those of the steps that ran."""
    pipe = pipeline(SiTImg2ImgPipeline, FlowRungeKuttaScheduler("midpoint"))
    lengths, distances = [], []
    for strength in (0.1, 0.5, 0.9):
        with counted(pipe.transformer) as rows:
            images = pipe([1, 2], image, strength, 10, generator=generators(5, 6), **LATENT).images
        lengths.append(len(rows))
        distances.append(float((images - (2 * image - 1)).abs().mean()))
    assert lengths == [2, 10, 18]
    assert distances == sorted(distances) and distances[0] < 0.3 < distances[2]


def test_stock_scheduler_with_a_shift(image: Tensor) -> None:
    """The noise level is that of the first timestep that runs, not 1 - its share of the steps."""
    pipe = pipeline(SiTInpaintPipeline, FlowMatchEulerDiscreteScheduler(shift=3.0))
    noise = torch.randn(2, 1, 8, 8)
    seen: list[tuple[float, Tensor]] = []

    def callback(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        seen.append((float(timestep), tensors["latents"]))
        return {}

    pipe([1, 2], image, left_half(), 0.5, 4, latents=noise, callback_on_step_end=callback)
    levels = [float(level) for level in pipe.scheduler.sigmas[2:]]
    assert [timestep for timestep, _ in seen] == pytest.approx([1000 * level for level in levels[:2]])
    for (_, latents), level in zip(seen, levels[1:], strict=True):
        assert_close(latents[..., 4:], ((1 - level) * (2 * image - 1) + level * noise)[..., 4:], 1e-5)
    assert levels[0] > 0.6  # half of the steps are left out, but not half of the noise


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_guidance_is_that_of_the_base_pipeline(scale: float, image: Tensor) -> None:
    pipe = pipeline(SiTImg2ImgPipeline, FlowRungeKuttaScheduler("euler"))
    noise = torch.randn(2, 1, 8, 8)
    images = pipe([1, 2], image, 0.25, 4, guidance_scale=scale, latents=noise, **LATENT).images
    start = 0.75 * (2 * image - 1) + 0.25 * noise
    with torch.no_grad():
        conditional = pipe.transformer(start, 0.75, torch.tensor([1, 2])).sample
        null = pipe.transformer(start, 0.75, torch.tensor([10, 10])).sample
    assert_close(images, start + 0.25 * (null + scale * (conditional - null)), 1e-5)


def test_interrupt_and_replaced_latents(image: Tensor) -> None:
    pipe = pipeline(SiTInpaintPipeline, FlowRungeKuttaScheduler("euler"))

    def stop(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    with counted(pipe.transformer) as rows:
        images = pipe([1, 2], image, left_half(), 0.5, 4, callback_on_step_end=stop, **LATENT).images
    assert rows == [4] and not images.any()


# --- images


def test_forms_of_images(image: Tensor) -> None:
    """Every form of the same pixels gives the same image."""
    bytes_ = (255 * image).round().to(torch.uint8)
    exact = bytes_ / 255
    array = exact.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(one[0].numpy()) for one in bytes_]
    mask = left_half()
    mask_bytes = (255 * mask).to(torch.uint8).numpy()
    forms: list[tuple[Any, Any]] = [
        (exact, mask),
        (list(exact), mask[None]),
        (exact[:, 0], mask[None, None]),
        (bytes_, mask.bool()),
        (array, mask.numpy()),
        (array[..., 0], mask.numpy()[..., None]),
        (bytes_.permute(0, 2, 3, 1).numpy(), mask_bytes),
        (list(array), [mask, mask]),
        (pictures, Image.fromarray(mask_bytes)),
        ([picture.convert("RGB") for picture in pictures], Image.fromarray(mask_bytes).convert("1")),
        (pictures, 0.6 * mask),
    ]
    pipe = pipeline(SiTInpaintPipeline)
    options = {"num_inference_steps": 2, "latents": torch.randn(2, 1, 8, 8), "output_type": "pil"}
    expected = pipe([1, 2], *forms[0], **options).images
    for source, painted in forms[1:]:
        images = pipe([1, 2], source, painted, **options).images
        assert [one.tobytes() for one in images] == [one.tobytes() for one in expected]
    for one, picture in zip(expected, pictures, strict=True):
        assert (np.asarray(one)[:, 4:] == np.asarray(picture)[:, 4:]).all()


def test_one_image_for_all_labels(image: Tensor) -> None:
    pipe = pipeline(SiTImg2ImgPipeline)
    options = {"num_inference_steps": 2, "latents": torch.randn(2, 1, 8, 8), **LATENT}
    shared = pipe([1, 2], image[:1], **options).images
    assert torch.equal(shared, pipe([1, 2], image[:1].repeat(2, 1, 1, 1), **options).images)
    assert not torch.equal(shared, pipe([1, 2], image, **options).images)


@torch.no_grad()
def test_vae() -> None:
    """The source is encoded, scaled and shifted; latents may be given instead; kept latents are the source's."""
    vae = autoencoder(scaling_factor=1.5, shift_factor=0.1)
    pipe = SiTInpaintPipeline(**latent_sit_pipeline(vae=vae).components)
    pipe.set_progress_bar_config(disable=True)
    colour = torch.rand(2, 3, 16, 16)
    latents = (vae.encode(2 * colour - 1).latent_dist.mode() - 0.1) * 1.5
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    options = {"num_inference_steps": STEPS, "latents": torch.randn(2, 4, 8, 8), **LATENT}
    painted = pipe([1, 2], colour, mask, **options).images
    assert_close(painted[..., 4:], latents[..., 4:], 1e-6)
    assert (painted - latents)[..., :4].abs().max() > 0.1
    assert_close(pipe([1, 2], latents, mask, **options).images, painted, 1e-5)
    kept = pipe([1, 2], colour, torch.zeros(16, 16), **{**options, "output_type": "pt"}).images
    assert_close(kept, (vae.decode(latents / 1.5 + 0.1).sample / 2 + 0.5).clamp(0, 1), 1e-5)


# --- wrong use

GOOD = torch.zeros(1, 8, 8)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"strength": 0.0}, r"strength must be above 0 and at most 1 .*got 0.0"),
    ({"strength": 1.1}, "strength must be above 0 and at most 1 .*got 1.1"),
    ({"strength": float("nan")}, "strength must be above 0 and at most 1 .*got nan"),
    ({"strength": 0.1}, "strength=0.1 of 4 steps leaves none to run; use a strength of 0.25 or more"),
    ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    ({"image": torch.zeros(1, 8, 16)}, r"image must have 8x8 pixels.* 1 channel; got 16x8 \(width x height\) and 1"),
    ({"image": Image.new("L", (9, 8))}, r"image must have 8x8 pixels.*got 9x8"),
    ({"image": torch.zeros(3, 1, 8, 8)}, r"image must hold 1 image or 2 \(one per label\), got 3"),
    ({"image": torch.full((1, 8, 8), 255.0)}, r"image must lie in \[0, 1\], got 255 to 255; pass uint8"),
    ({"image": torch.full((1, 8, 8), -1.0)}, r"image must lie in \[0, 1\], got -1 to -1"),
    ({"image": torch.full((1, 8, 8), float("nan"))}, r"image must lie in \[0, 1\], got nan"),
    ({"image": []}, "image must hold at least one image, got an empty list"),
    ({"image": "photo.png"}, "image must be a PIL image, an array, a tensor or a list of them, got <class 'str'>"),
    ({"image": torch.zeros(1, 1, 1, 8, 8)}, r"image must have 3 axes, or 4 .*got shape \(1, 1, 1, 8, 8\)"),
    ({"mask_image": torch.zeros(16, 16)}, "mask_image must have 8x8 pixels.*got 16x16"),
    ({"mask_image": torch.zeros(3, 1, 8, 8)}, "mask_image must hold 1 image or 2"),
    ({"mask_image": torch.full((8, 8), 2.0)}, r"mask_image must lie in \[0, 1\], got 2 to 2"),
    ({"output_type": "jpeg"}, "output_type must be one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_use(options: dict[str, Any], message: str) -> None:
    pipe = pipeline(SiTInpaintPipeline)
    arguments = {"image": GOOD, "mask_image": left_half(), "num_inference_steps": 4, **options}
    with counted(pipe.transformer) as rows, pytest.raises(ValueError, match=message):
        pipe([1, 2], **arguments)
    assert rows == []


@pytest.mark.parametrize(("blocks", "least"), [("H2P4R2", 0.375), ("H1R2", 1.0), ("P1R2", 1.0), ("H2P3R2", 0.429)])
def test_smallest_strength_before_refiner_steps(blocks: str, least: float) -> None:
    """The message names a strength that works, and that an honest step less does not."""
    pipe = pipeline(SiTImg2ImgPipeline, FlowTurboScheduler(blocks))
    steps = pipe.scheduler.blocks.total
    message = f"strength=.* of {steps} steps begins at an R step.*use a strength of {least:g} or more"
    with pytest.raises(ValueError, match=message):
        pipe(1, GOOD, least - 1 / steps)
    with pytest.raises(ValueError, match="num_inference_steps must be"):
        pipe(1, GOOD, 0.01, steps + 1)
    assert pipe(1, GOOD, least, **LATENT).images.isfinite().all()


def test_wrong_use_of_colour() -> None:
    pipe = SiTImg2ImgPipeline(**latent_sit_pipeline(vae=autoencoder()).components)
    with pytest.raises(ValueError, match=r"image must have 16x16 pixels.* and 3 channels; got 8x8 .* and 3"):
        pipe(1, Image.new("RGB", (8, 8)), num_inference_steps=2)


# --- beside the other pipelines


def test_components_of_an_accelerated_pipeline(image: Tensor) -> None:
    """The sampler comes along; the refiner does not, so that the network itself makes every evaluation."""
    base = tiny.sit_pipeline()
    refiner = tiny.random_refiner(base.transformer)
    options: dict[str, Any] = {"image": image[:1], "strength": 0.75, "latents": torch.randn(1, 1, 8, 8), **LATENT}
    plain = SiTImg2ImgPipeline(base.transformer, FlowTurboScheduler("H1P1R2"))
    plain.set_progress_bar_config(disable=True)
    expected = plain(1, **options).images
    with flowaccel.accelerated(base, tiny.flowturbo(refiner, "H1P1R2")), counted(refiner) as calls:
        pipe = SiTImg2ImgPipeline(**base.components)
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(pipe(1, **options).images, expected)
    assert not calls


def test_image_to_image_accelerated(image: Tensor) -> None:
    pipe = SiTImg2ImgPipeline(**tiny.sit_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    refiner = tiny.random_refiner(pipe.transformer)
    with flowaccel.accelerated(pipe, tiny.flowturbo(refiner, "H1P1R2")), counted(refiner) as calls:
        pipe(1, image[:1], strength=0.75, **LATENT)
    assert len(calls) == 4


@pytest.mark.parametrize("kind", [SiTImg2ImgPipeline, SiTInpaintPipeline])
def test_save_and_load(kind: Any, tmp_path: Path, image: Tensor) -> None:
    pipe = kind(tiny.sit_network(), FlowTurboScheduler("H1P2"), id2label={"0": "zero", "1": "one"})
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = [load_pipeline(tmp_path), kind.from_pretrained(tmp_path), SiTPipeline.from_pretrained(tmp_path)]
    assert [type(one) for one in loaded] == [kind, kind, SiTPipeline]
    masks = {"mask_image": left_half()} if kind is SiTInpaintPipeline else {}
    options = {"latents": torch.randn(2, 1, 8, 8), **masks, **LATENT}
    expected = pipe(["zero", "one"], image, **options).images
    again = kind.from_pipe(loaded[2])
    for one in (*loaded[:2], again):
        one.set_progress_bar_config(disable=True)
        assert one.labels == {"zero": 0, "one": 1}
        assert torch.equal(one(["zero", "one"], image, **options).images, expected)


def test_they_are_exported() -> None:
    assert flowaccel.SiTImg2ImgPipeline is SiTImg2ImgPipeline
    assert flowaccel.SiTInpaintPipeline is SiTInpaintPipeline
