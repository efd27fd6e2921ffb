"""Class-conditional image generation with SiT and any flow scheduler."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowaccel.models import SiTTransformer2DModel, convention_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_STEPS = 50


class SiTPipeline(DiffusionPipeline):
    """Class-conditional generation with a `SiTTransformer2DModel` (arXiv 2401.08740).

    Works with flowaccel's samplers and with diffusers' own FlowMatch schedulers.

    Args:
        transformer: the velocity network.
        scheduler: a flow scheduler in diffusers' convention.
        vae: decoder of the latent space; leave it out for a network that works on pixels.
        id2label: names of the classes, so that they can be asked for by name; several names are separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    transformer: SiTTransformer2DModel
    scheduler: Any
    vae: AutoencoderKL | None

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(do_convert_rgb=False)
        self._interrupt = False

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their ids (empty where the model has none)."""
        id2label = self.config.id2label or {}
        return {name.strip(): int(key) for key, names in id2label.items() for name in names.split(",")}

    @property
    def interrupt(self) -> bool:
        """Set by callbacks (`pipe._interrupt = True`) to skip the remaining evaluations."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.5,
        guidance_channels: int | Literal["all"] = 3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per class label.

        Args:
            class_labels: class ids or names; one or a list of B.
            num_inference_steps: steps of the scheduler; `None` takes the scheduler's own number where it has one
                (FlowTurbo), else 50.
            guidance_scale: classifier-free guidance s >= 1 in null + s * (conditional - null); 1 switches it off and
                halves the work.
            guidance_channels: how many of the leading latent channels are guided. The SiT code guides 3 of 4 and lets
                the rest follow the conditional velocity; its published numbers are made so. `"all"` guides every
                channel.
            generator: one generator, or one per image (an image then does not depend on its batch).
            latents: (B, C, S, S) starting noise instead of drawn one.
            output_type: `pil`, `np` (B, H, W, C) in [0, 1], `pt` (B, C, H, W) in [0, 1], or `latent` (B, C, S, S).
            return_dict: return an `ImagePipelineOutput` rather than a 1-tuple.
            callback_on_step_end: `callback(pipe, index, timestep, tensors)` after every evaluation; may return
                `{"latents": ...}`.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only `latents`.

        Raises:
            ValueError: a bad class, scale, channel count, shape, step count or output type; each names what is allowed.
        """
        label_ids = self._label_ids(class_labels)
        guided = self._check_guidance(guidance_scale, guidance_channels)
        self._check_rest(output_type, generator, len(label_ids), callback_on_step_end_tensor_inputs)
        self._interrupt = False
        if len(label_ids) == 1 and isinstance(generator, torch.Generator):
            generator = [generator]  # so that guidance, which doubles the batch, does not draw twice the noise
        device, batch = self._execution_device, len(label_ids)
        labels = torch.tensor(label_ids, device=device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_label)])
        latents = self._starting_latents(latents, batch, generator, device)

        if num_inference_steps is None:
            num_inference_steps = getattr(self.scheduler, "default_num_inference_steps", DEFAULT_STEPS)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # Only stochastic samplers draw noise; stock ones would draw it for the doubled batch from a list that is half
        # as long.
        stochastic = hasattr(self.scheduler, "prepare_sample")
        noise_source = {"generator": generator} if stochastic else {}
        if stochastic:
            latents = self.scheduler.prepare_sample(latents, generator)
        # Both halves go through the scheduler, since unguided channels of the null half carry a velocity of their own.
        state = torch.cat([latents, latents]) if guided else latents
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                if guided:
                    state = torch.cat([state[:batch], state[:batch]])
                velocity = self._velocity(state, timestep, labels)
                if guided:
                    velocity = guide(velocity, guidance_scale, guidance_channels)
                state = self.scheduler.step(velocity, timestep, state, return_dict=False, **noise_source)[0]
                if callback_on_step_end is not None:
                    state = self._call_back(callback_on_step_end, index, timestep, state, batch)
                progress_bar.update()
        images = self._decode(state[:batch], output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, state: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """The network's velocity in diffusers' convention, float32."""
        convention = convention_of(self.transformer)
        sigma = timestep / self.scheduler.config.num_train_timesteps
        time = convention.network_time(sigma).expand(state.shape[0])
        output = self.transformer(state.to(self.transformer.dtype), time, labels, return_dict=False)[0]
        return convention.velocity_sign * output.to(state.dtype)

    def _call_back(self, callback: Callable, index: int, timestep: Tensor, state: Tensor, batch: int) -> Tensor:
        given = state[:batch]
        latents = (callback(self, index, timestep, {"latents": given}) or {}).get("latents", given)
        return state if latents is given else torch.cat([latents] * (state.shape[0] // batch))

    def _starting_latents(self, latents: Tensor | None, batch: int, generator: Any, device: torch.device) -> Tensor:
        config = self.transformer.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape} for {batch} labels, got {tuple(latents.shape)}")
        return latents.to(device, torch.promote_types(latents.dtype, torch.float32))

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type=output_type)

    def _label_ids(self, class_labels: int | str | list[int | str]) -> list[int]:
        given = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
        count = self.transformer.config.num_classes
        if not given:
            raise ValueError("class_labels must name at least one class, got an empty list")
        ids = [self._label_id(label) for label in given]
        wrong = sorted({label for label in ids if not 0 <= label < count})
        if wrong:
            raise ValueError(f"class_labels must lie in 0 .. {count - 1}, got {wrong}")
        return ids

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            if label not in self.labels:
                raise ValueError(
                    f"unknown class {label!r}; the classes of this model are {list(self.labels)[:20] or 'unnamed'}"
                )
            return self.labels[label]
        try:
            index = operator.index(label)
        except TypeError:
            index = None
        if index is None or isinstance(label, bool):
            raise ValueError(f"class_labels must be integers or class names, got {label!r}")
        return index

    def _check_guidance(self, scale: float, channels: int | str) -> bool:
        if not 1 <= scale < math.inf:
            raise ValueError(f"guidance_scale must be finite and at least 1 (1 switches guidance off), got {scale}")
        if channels != "all" and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
            raise ValueError(f"guidance_channels must be a positive number of channels or 'all', got {channels!r}")
        if scale > 1 and not self.transformer.config.null_class:
            raise ValueError(
                f"guidance_scale={scale} needs a null class, which this transformer was trained without; "
                "use guidance_scale=1"
            )
        return scale > 1

    def _check_rest(self, output_type: str, generator: Any, batch: int, inputs: list[str] | None) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if not isinstance(generator, (torch.Generator, list, type(None))):
            raise ValueError(f"generator must be one torch.Generator or a list of them, got {type(generator).__name__}")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"generator must be one generator or a list of {batch} (one per label), got {len(generator)}"
            )
        if inputs is not None and set(inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may only name {self._callback_tensor_inputs}, got {inputs}"
            )


def guide(velocity: Tensor, scale: float, channels: int | Literal["all"]) -> Tensor:
    """Classifier-free guidance of the leading channels of a doubled batch [conditional; null].

    Args:
        velocity: (2B, C, ...) outputs of the conditional and of the null half.
        scale: s in null + s * (conditional - null).
        channels: how many leading channels are guided; both halves get the guided value there and keep their own
            beyond.

    Returns:
        (2B, C, ...).
    """
    conditional, null = velocity.chunk(2)
    guided = null + scale * (conditional - null)
    if channels == "all" or channels >= velocity.shape[1]:
        return torch.cat([guided, guided])
    rest = slice(int(channels), None)
    return torch.cat([torch.cat([guided[:, :channels], half[:, rest]], dim=1) for half in (conditional, null)])
