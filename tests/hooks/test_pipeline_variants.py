"""Stock pipelines beside those of tests/families.py that call the same networks, with images, masks and hints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import families
import tiny
from flowaccel import accelerated, report

STEPS = 9


def picture(*shape: int, seed: int = 100) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def image(batch: int = 2, size: int = 16) -> Tensor:
    return torch.cat([picture(1, 3, size, size, seed=100 + i) for i in range(batch)])


def mask(batch: int = 2, size: int = 16) -> Tensor:
    half = torch.zeros(batch, 1, size, size)
    half[..., : size // 2] = 1
    return half


def of(name: str, base: Callable[..., Any], **parts: Any) -> Any:
    """A pipeline of the class `name` with the components of another."""
    found = base().components
    kind: Any = getattr(diffusers, name)
    return tiny.stock(kind, **{k: v for k, v in found.items() if v is not None}, **parts)


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def flux_with(channels: int) -> Any:
    return lambda: tiny.flux_pipeline(in_channels=channels, out_channels=16)


PART = {"strength": 0.7}

VARIANTS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "ZImageImg2ImgPipeline": (
        lambda: of("ZImageImg2ImgPipeline", families.z_image_pipeline),
        lambda: families.z_image_arguments(2, STEPS) | PART | {"image": image()},
    ),
    "ZImageInpaintPipeline": (
        lambda: of("ZImageInpaintPipeline", families.z_image_pipeline),
        lambda: families.z_image_arguments(2, STEPS) | PART | {"image": image(), "mask_image": mask()},
    ),
    "FluxInpaintPipeline": (
        lambda: of("FluxInpaintPipeline", tiny.flux_pipeline),
        lambda: families.flux_arguments(2, STEPS) | PART | {"image": image(), "mask_image": mask()},
    ),
    "FluxControlPipeline": (
        lambda: of("FluxControlPipeline", flux_with(32)),
        lambda: without(families.flux_arguments(2, STEPS, guided=False), "true_cfg_scale") | {"control_image": image()},
    ),
    "FluxFillPipeline": (
        lambda: of("FluxFillPipeline", flux_with(16 + 16 + 16)),
        lambda: (
            without(families.flux_arguments(2, STEPS, guided=False), "true_cfg_scale")
            | {"image": image(), "mask_image": mask()}
        ),
    ),
    "FluxKontextPipeline": (
        lambda: of("FluxKontextPipeline", tiny.flux_pipeline),
        lambda: families.flux_arguments(2, STEPS) | {"image": image(), "_auto_resize": False, "max_area": 16 * 16},
    ),
    "StableDiffusion3Img2ImgPipeline": (
        lambda: of("StableDiffusion3Img2ImgPipeline", tiny.sd3_pipeline),
        lambda: families.sd3_arguments(2, STEPS) | PART | {"image": image()},
    ),
    "StableDiffusionImg2ImgPipeline": (
        lambda: of("StableDiffusionImg2ImgPipeline", tiny.unet_pipeline, requires_safety_checker=False),
        lambda: without(families.sd15_arguments(2, STEPS), "height", "width") | PART | {"image": image()},
    ),
    "StableDiffusionXLImg2ImgPipeline": (
        lambda: of("StableDiffusionXLImg2ImgPipeline", tiny.sdxl_pipeline),
        lambda: without(families.sdxl_arguments(2, STEPS), "height", "width") | PART | {"image": image()},
    ),
    "StableDiffusionXLInpaintPipeline": (
        lambda: of("StableDiffusionXLInpaintPipeline", tiny.sdxl_pipeline),
        lambda: families.sdxl_arguments(2, STEPS) | PART | {"image": image(), "mask_image": mask()},
    ),
    "StableDiffusionXLPAGPipeline": (
        lambda: of("StableDiffusionXLPAGPipeline", tiny.sdxl_pipeline, pag_applied_layers=["mid"]),
        lambda: families.sdxl_arguments(2, STEPS) | {"pag_scale": 3.0},
    ),
    "QwenImageImg2ImgPipeline": (
        lambda: of("QwenImageImg2ImgPipeline", families.qwen_pipeline),
        lambda: families.qwen_arguments(2, STEPS) | PART | {"image": image()},
    ),
    "QwenImageInpaintPipeline": (
        lambda: of("QwenImageInpaintPipeline", families.qwen_pipeline),
        lambda: families.qwen_arguments(2, STEPS) | PART | {"image": image(), "mask_image": mask()},
    ),
    "ChromaImg2ImgPipeline": (
        lambda: of("ChromaImg2ImgPipeline", families.chroma_pipeline),
        lambda: families.masked_arguments(2, STEPS) | PART | {"image": image()},
    ),
    "LTXImageToVideoPipeline": (
        lambda: of("LTXImageToVideoPipeline", families.ltx_pipeline),
        lambda: families.ltx_arguments(batch=2, steps=STEPS) | {"image": image(size=32)},
    ),
    "WanVideoToVideoPipeline": (
        lambda: of("WanVideoToVideoPipeline", families.wan_pipeline),
        lambda: (
            {k: v for k, v in families.wan_arguments(2, STEPS).items() if k != "num_frames"}
            | PART
            | {"video": picture(2, 5, 3, 16, 16)}
        ),
    ),
}


def made(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    output = pipe(**arguments)
    found = output.frames if hasattr(output, "frames") else output.images
    return torch.as_tensor(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_seen_and_its_blocks_are_reused(name: str) -> None:
    build, arguments = VARIANTS[name]
    pipe = build()
    expected = made(pipe, arguments())
    for neutral in ([], "fbcache:threshold=0", "easycache:threshold=0"):
        with accelerated(pipe, neutral):
            assert torch.equal(made(pipe, arguments()), expected), neutral
    for saving in ("fbcache:threshold=1e6,max_run=2", "ab_cache"):
        with accelerated(pipe, saving):
            found = made(pipe, arguments())
            assert report(pipe).count("reused") >= 1, saving
            assert torch.isfinite(found).all()
    assert torch.equal(made(pipe, arguments()), expected)
