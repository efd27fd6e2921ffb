"""Image to image and inpainting with SiT: SDEdit (arXiv 2108.01073), and blending with the re-noised source after every
step, as FlowTurbo (arXiv 2409.18128) does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from flowaccel.pipelines.sit import SiTBase, SiTCall
from flowaccel.pipelines.sit_blocks import Channels
from flowaccel.samplers import FlowSampler
from flowaccel.samplers.formulas import noised

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | list[Picture]


class SiTFromImage(SiTBase):
    """Base class of image to image and inpainting: reading and encoding the source, and the start of a run."""

    def _first_step(self, strength: float, steps: int) -> int:
        """Return the number of first steps that `strength` skips."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1 (1 keeps nothing of the image), got {strength}")
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        own = isinstance(self.scheduler, FlowSampler)
        last = self.scheduler.last_start(steps) if own else steps - 1
        first = round((1 - strength) * steps)
        if first > last:
            least = math.ceil(1000 * (steps - last) / steps) / 1000
            reason = "begins at an R step, which has no velocity to refine" if first < steps else "leaves none to run"
            raise ValueError(f"strength={strength} of {steps} steps {reason}; use a strength of {least:g} or more")
        return first

    def _source(self, image: Pictures, run: SiTCall) -> Tensor:
        """Return the latents (B, C, S, S) of the source, or its pixels in [-1, 1] without a VAE."""
        config, device = self.transformer.config, self._execution_device
        latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        if self.vae is None:
            pixels = read_pictures("image", image, config.in_channels, config.sample_size, run.batch)
            return (2 * pixels - 1).to(device).expand(run.batch, *latent_shape)
        if isinstance(image, Tensor) and tuple(image.shape[-3:]) == latent_shape:
            latents = _batch("image", image.reshape(-1, *latent_shape), run.batch)
            return latents.to(device, torch.float32).expand(run.batch, *latent_shape)
        pixels = read_pictures("image", image, self.vae.config.in_channels, self._picture_size, run.batch)
        pixels = (2 * pixels - 1).to(device, self.vae.dtype)
        # The mode, not a sample: nothing is drawn, so the noise is that of SiTPipeline with the same generator.
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        latents = (latents - (getattr(self.vae.config, "shift_factor", None) or 0.0)) * self.vae.config.scaling_factor
        return latents.expand(run.batch, *latent_shape)

    @property
    def _picture_size(self) -> int:
        assert self.vae is not None
        return self.transformer.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _run_from(
        self, run: SiTCall, source: Tensor, noise: Tensor, steps: int, first: int, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        timesteps = self._set_timesteps(steps, first)
        # The level of the first step is that of the first evaluation, because a run begins with a step.
        sigma = float(timesteps[0]) / self.scheduler.config.num_train_timesteps
        return self._result(self._denoise(run, noised(source, sigma, noise), timesteps), output_type, return_dict)


class SiTImg2ImgPipeline(SiTFromImage):
    """Image to image with a `SiTTransformer2DModel`: the source is noised to some level and denoised from there.

    Takes the components of a `SiTPipeline`. One made of an accelerated pipeline has its sampler, but is not accelerated
    itself: give it to `flowaccel.accelerate`.

        >>> to_image = SiTImg2ImgPipeline.from_pipe(pipe)
        >>> images = to_image([3, 8], image=images, strength=0.5).images

    `from_pipe` casts to float32 unless `torch_dtype` is given; `SiTImg2ImgPipeline(**pipe.components)` casts nothing,
    but does not take over the class names, which are no component.

    Args:
        transformer, scheduler, vae, id2label: as in `SiTPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        image: Pictures,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.5,
        guidance_channels: Channels = 3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per class label from a source image.

        Args:
            class_labels: class ids or names; one or a list of B.
            image: one source for all labels, or B: PIL images, arrays (H, W, C) or (B, H, W, C) in [0, 1] or uint8,
                tensors (C, H, W) or (B, C, H, W) in [0, 1]; with one channel also (H, W) and (B, H, W). They must have
                the size that the pipeline generates. With a VAE a tensor of the latents' shape is taken as (scaled)
                latents.
            strength: how much of the way from noise to image is run, in (0, 1]: of N steps the first
                round((1 - strength) * N) are left out. 1 is `SiTPipeline`, and keeps nothing of the source. The first
                step that runs has no velocity to reuse, so a P step becomes a Heun step, and it must not be an R step.
            num_inference_steps: N.
            latents: (B, C, S, S) noise instead of drawn one.
            guidance_scale, guidance_channels, generator, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs: as in `SiTPipeline`.

        Raises:
            ValueError: as in `SiTPipeline`; a source of another size, number or range; a strength that leaves no step
                to run or begins at an R step, with the smallest that does not.
        """
        run = self._request(
            class_labels,
            guidance_scale,
            guidance_channels,
            generator,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        steps = self._step_count(num_inference_steps)
        first = self._first_step(strength, steps)
        source = self._source(image, run)
        noise = self._noise(latents, run)
        return self._run_from(run, source, noise, steps, first, output_type, return_dict)


class SiTInpaintPipeline(SiTFromImage):
    """Inpainting with a `SiTTransformer2DModel`: after every step the area to keep is put back, re-noised to the level
    reached, so that the rest grows to fit it. No network trained for inpainting is needed.

    Takes the components of a `SiTPipeline`. One made of an accelerated pipeline has its sampler, but is not accelerated
    itself: give it to `flowaccel.accelerate`.

        >>> inpaint = SiTInpaintPipeline.from_pipe(pipe)
        >>> images = inpaint(3, image=image, mask_image=mask, strength=1.0).images

    Args:
        transformer, scheduler, vae, id2label: as in `SiTPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        image: Pictures,
        mask_image: Pictures,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.5,
        guidance_channels: Channels = 3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per class label that equals the source outside of the mask.

        Args:
            class_labels: class ids or names; one or a list of B.
            image: the source or sources, as in `SiTImg2ImgPipeline`.
            mask_image: area to paint: one mask for all labels, or B, in the forms of a one-channel image and of
                the source's size. Values of 0.5 and more (white) are painted, the rest (black) is kept. With a VAE the
                mask is sampled at the nearest pixel of every latent.
            strength: as in `SiTImg2ImgPipeline`; 1 paints the masked area from pure noise.
            num_inference_steps, guidance_scale, guidance_channels, generator, latents, output_type, return_dict,
                callback_on_step_end, callback_on_step_end_tensor_inputs: as in `SiTImg2ImgPipeline`.

        Returns:
            Without a VAE the kept pixels are the source's exactly; with one, what the VAE makes of kept latents.

        Raises:
            ValueError: as in `SiTImg2ImgPipeline`, also for the mask.
        """
        run = self._request(
            class_labels,
            guidance_scale,
            guidance_channels,
            generator,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        steps = self._step_count(num_inference_steps)
        first = self._first_step(strength, steps)
        mask = self._mask(mask_image, run)
        source = self._source(image, run)
        noise = self._noise(latents, run)

        def keep(state: Tensor, sigma: float) -> Tensor:
            copies = state.shape[0] // run.batch
            kept = noised(source, sigma, noise).to(state.dtype)
            return torch.where(mask.repeat(copies, 1, 1, 1), state, kept.repeat(copies, 1, 1, 1))

        run = replace(run, project=keep)
        return self._run_from(run, source, noise, steps, first, output_type, return_dict)

    def _mask(self, mask_image: Pictures, run: SiTCall) -> Tensor:
        """Return the mask (B, 1, S, S), True where to paint."""
        side = self.transformer.config.sample_size
        masks = read_pictures("mask_image", mask_image, 1, side if self.vae is None else self._picture_size, run.batch)
        masks = torch.nn.functional.interpolate(masks, size=(side, side))
        return (masks >= 0.5).to(self._execution_device).expand(run.batch, 1, side, side)


def read_pictures(name: str, pictures: Pictures, channels: int, side: int, batch: int) -> Tensor:
    """Convert images in any form that diffusers accepts to float32 (1 or `batch`, channels, side, side) in [0, 1].

    Raises:
        ValueError: no image, or images of another size, number, range or number of channels; `name` is the argument.
    """
    listed = pictures if isinstance(pictures, list) else [pictures]
    if not listed:
        raise ValueError(f"{name} must hold at least one image, got an empty list")
    tensors = [_tensor(name, picture, channels) for picture in listed]
    wrong = [tensor for tensor in tensors if tuple(tensor.shape[1:]) != (channels, side, side)]
    if wrong:
        count, height, width = wrong[0].shape[1:]
        raise ValueError(
            f"{name} must have {side}x{side} pixels, the size that this pipeline generates, and {channels} "
            f"channel{'s' * (channels > 1)}; got {width}x{height} (width x height) and {count}. Resize it first"
        )
    tensor = torch.cat(tensors)
    if not (tensor.min() >= 0 and tensor.max() <= 1):
        raise ValueError(
            f"{name} must lie in [0, 1], got {float(tensor.min()):g} to {float(tensor.max()):g}; "
            "pass uint8, or scale it"
        )
    return _batch(name, tensor, batch)


def _tensor(name: str, picture: Picture, channels: int) -> Tensor:
    """Return the picture as a tensor (n, C, H, W), uint8 scaled to [0, 1]."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    if isinstance(picture, np.ndarray):
        tensor = torch.from_numpy(np.array(picture))  # a copy, because PIL's memory is read-only
        if tensor.dim() == 4 or (tensor.dim() == 3 and (channels > 1 or tensor.shape[-1] == 1)):
            tensor = tensor.movedim(-1, -3)
    elif isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
    else:
        raise ValueError(f"{name} must be a PIL image, an array, a tensor or a list of them, got {type(picture)}")
    if channels == 1 and tensor.dim() in (2, 3):
        tensor = tensor.reshape(-1, 1, *tensor.shape[-2:])
    if tensor.dim() == 3:
        tensor = tensor[None]
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must have 3 axes, or 4 with a leading one for the batch, got shape {tuple(tensor.shape)}"
        )
    return tensor / 255 if tensor.dtype == torch.uint8 else tensor.float()


def _batch(name: str, tensor: Tensor, batch: int) -> Tensor:
    if tensor.shape[0] not in (1, batch):
        raise ValueError(f"{name} must hold 1 image or {batch} (one per label), got {tensor.shape[0]}")
    return tensor
