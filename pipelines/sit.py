"""Class-conditional image generation with SiT and any flow scheduler."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowaccel.checks import is_whole
from flowaccel.compat import register_components
from flowaccel.errors import RecipeConflictError
from flowaccel.models import SiTTransformer2DModel, convention_of
from flowaccel.pipelines.sit_blocks import Channels, CompiledBlocks, GuidedField, bare_field, step_times
from flowaccel.pipelines.sit_blocks import guide as guide
from flowaccel.recipe import recipe_of
from flowaccel.samplers import FlowSampler
from flowaccel.samplers.base import Project

register_components()

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class SiTCall:
    """Checked arguments of one call."""

    labels: Tensor
    """Labels (B,), or (2B,) with the null labels last if the run is guided."""
    batch: int
    scale: float
    channels: Channels
    generator: torch.Generator | list[torch.Generator] | None
    callback: Callable[[Any, int, Tensor, dict], dict | None] | None
    project: Project | None = None
    """Function applied to the state at the end of every step; its rows are those of one or two batches."""

    @property
    def copies(self) -> int:
        """Number of rows in the network's batch per image: 2 with guidance."""
        return self.labels.shape[0] // self.batch


class SiTBase(DiffusionPipeline):
    """Base class of the SiT pipelines: components, checks, and the denoising loop, eager and compiled."""

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
        self.image_processor: VaeImageProcessor = VaeImageProcessor(do_convert_rgb=False)
        self._interrupt = False
        self._guidance_scale: float | None = None
        self._blocks: CompiledBlocks | None = None

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their ids (empty if the model has no names)."""
        id2label = self.config.id2label or {}
        return {name.strip(): int(key) for key, names in id2label.items() for name in names.split(",")}

    @property
    def guidance_scale(self) -> float | None:
        """Guidance scale of the current or last call; None before the first."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether to skip the remaining evaluations (compiled: steps); callbacks set it by `pipe._interrupt = True`."""
        return self._interrupt

    def compile_blocks(
        self,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Compile whole H, P, R and Euler steps as functions: sample-aware compilation (FlowTurbo, arXiv 2409.18128).

        Each kind of step becomes one static graph of network, guidance and solver update, made at its first use.
        Times, step width and guidance scale are tensors in it, so other steps, block counts and scales use the same
        graph; another batch size, dtype, `guidance_channels` or guidance on or off makes another. Works with
        `FlowTurboScheduler` and with `FlowRungeKuttaScheduler`'s `euler` and `heun`; other schedulers raise a
        ValueError when the pipeline is called. `flowaccel.accelerate` and `restore` may come before or after.

        The networks run without anything wrapped around their `forward` (an attached `VelocityRefiner` is known to
        the scheduler and takes part). `callback_on_step_end` and the progress bar count steps instead of evaluations,
        and the callback always sees the state between two steps.

            >>> pipe.compile_blocks()
            >>> images = pipe([3, 1, 4]).images  # compiles, then fast
            >>> pipe.decompile_blocks()

        Args:
            backend, mode, options: of `torch.compile`.
        """
        self._blocks = CompiledBlocks(backend=backend, mode=mode, options=options)

    def decompile_blocks(self) -> None:
        """Undo `compile_blocks`; does nothing if the blocks are not compiled."""
        self._blocks = None

    def _request(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float,
        guidance_channels: Channels,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback: Callable[[Any, int, Tensor, dict], dict | None] | None,
        callback_inputs: list[str] | None,
    ) -> SiTCall:
        """Check the arguments that all pipelines share, before anything is computed."""
        label_ids = self._label_ids(class_labels)
        guided = self._check_guidance(guidance_scale, guidance_channels)
        self._check_rest(output_type, generator, len(label_ids), callback_inputs)
        self._check_compiled()
        self._interrupt = False
        self._guidance_scale = guidance_scale
        if len(label_ids) == 1 and isinstance(generator, torch.Generator):
            generator = [generator]  # so that guidance, which doubles the batch, does not draw twice the noise
        labels = torch.tensor(label_ids, device=self._execution_device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_label)])
        return SiTCall(
            labels=labels,
            batch=len(label_ids),
            scale=guidance_scale,
            channels=guidance_channels,
            generator=generator,
            callback=callback,
        )

    def _step_count(self, num_inference_steps: int | None) -> int:
        if num_inference_steps is None:
            num_inference_steps = getattr(self.scheduler, "default_num_inference_steps", None) or DEFAULT_STEPS
        return num_inference_steps

    def _set_timesteps(self, steps: int, first_step: int = 0) -> Tensor:
        """Prepare the scheduler for the steps from `first_step` on, and return the timesteps of their evaluations."""
        if isinstance(self.scheduler, FlowSampler):
            self.scheduler.set_timesteps(steps, device=self._execution_device, first_step=first_step)
            return self.scheduler.timesteps
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        if first_step:
            self.scheduler.set_begin_index(first_step * self.scheduler.order)
        return self.scheduler.timesteps[first_step * self.scheduler.order :]

    def _denoise(self, run: SiTCall, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Denoise `latents` (B, C, S, S) from the first timestep to the end."""
        return (
            self._denoise_eager(run, latents, timesteps) if self._blocks is None else self._denoise_fused(run, latents)
        )

    def _denoise_eager(self, run: SiTCall, latents: Tensor, timesteps: Tensor) -> Tensor:
        field = GuidedField(
            network=self.transformer,
            refiner=None,
            convention=convention_of(self.transformer),
            dtype=self.transformer.dtype,
            labels=run.labels,
            scale=run.scale,
            channels=run.channels,
        )
        # Only stochastic samplers draw noise; stock ones would draw it from a list of generators that is half as
        # long as the doubled batch.
        options: dict[str, Any] = {}
        if hasattr(self.scheduler, "prepare_sample"):
            options["generator"] = run.generator
            latents = self.scheduler.prepare_sample(latents, run.generator)
        own = isinstance(self.scheduler, FlowSampler)
        if own:
            options["project"] = run.project
        levels = [*timesteps.tolist(), 0.0]
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                # All rows go through the scheduler, since unguided channels of the null half carry a velocity of their
                # own.
                velocity = field.velocity(latents, timestep / self.scheduler.config.num_train_timesteps)
                state = torch.cat([latents] * run.copies)
                last = index + 1 == len(timesteps)
                state = self.scheduler.step(velocity, timestep, state, return_dict=False, **options)[0]
                latents = state[: run.batch]
                if (
                    run.project is not None
                    and not own
                    and (last or getattr(self.scheduler, "state_in_first_order", True))
                ):
                    latents = run.project(latents, levels[index + 1] / self.scheduler.config.num_train_timesteps)
                latents = self._call_back(run, index, timestep, latents)
                progress_bar.update()
        return latents

    def _denoise_fused(self, run: SiTCall, latents: Tensor) -> Tensor:
        blocks, scheduler = self._blocks, self.scheduler
        assert blocks is not None
        refiner = getattr(scheduler, "refiner", None)
        if refiner is not None and refiner.device != latents.device:
            refiner.to(latents.device)
        field = bare_field(self.transformer, refiner, run.labels, run.scale, run.channels)
        times = [step_times(scheduler, step.step, latents.device) for step in scheduler.fused_steps]
        carried: Tensor | None = None
        with self.progress_bar(total=len(times)) as progress_bar:
            for index, (step, (sigma, end, width)) in enumerate(zip(scheduler.fused_steps, times, strict=True)):
                if self.interrupt:
                    continue
                latents, carried = blocks.run_step(step, field, latents, (sigma, end, width), carried)
                if run.project is not None:
                    latents = run.project(latents, scheduler.grid[step.step + 1])
                latents = self._call_back(run, index, sigma * scheduler.config.num_train_timesteps, latents)
                progress_bar.update()
        return latents

    def _call_back(self, run: SiTCall, index: int, timestep: Tensor, latents: Tensor) -> Tensor:
        if run.callback is None:
            return latents
        return (run.callback(self, index, timestep, {"latents": latents}) or {}).get("latents", latents)

    def _result(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, latents: Tensor | None, run: SiTCall) -> Tensor:
        config, device = self.transformer.config, self._execution_device
        shape = (run.batch, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            return randn_tensor(shape, generator=run.generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape} for {run.batch} labels, got {tuple(latents.shape)}")
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
        if channels != "all" and not is_whole(channels, 1):
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

    def _check_compiled(self) -> None:
        if self._blocks is None:
            return
        if getattr(self.scheduler, "fused_steps", None) is None:
            solver = self.scheduler.config.get("solver")
            raise ValueError(
                "compiled blocks need a FlowTurboScheduler, or a FlowRungeKuttaScheduler with solver 'euler' or "
                f"'heun', but the pipeline has a {type(self.scheduler).__name__}{f' ({solver})' if solver else ''}; "
                "replace the scheduler, or call decompile_blocks()"
            )
        blind = [part.name for part in recipe_of(self).accelerators if part.tags & {"cache", "guidance_skip"}]
        if blind:
            raise RecipeConflictError(
                f"compiled blocks call the network in ways that {blind[0]!r} does not see, so it would do nothing; "
                "call decompile_blocks(), or flowaccel.restore on the pipeline (it can be had with "
                "transformer.compile_repeated_blocks())"
            )
        if hasattr(self.transformer, "_hf_hook"):
            raise ValueError(
                "compiled blocks do not work with offloading, whose hooks they bypass; "
                "keep the transformer on its device, or call decompile_blocks()"
            )


class SiTPipeline(SiTBase):
    """Class-conditional generation with a `SiTTransformer2DModel` (arXiv 2401.08740).

    Works with flowaccel's samplers and with diffusers' own FlowMatch schedulers.

    Args:
        transformer: the velocity network.
        scheduler: a flow scheduler in diffusers' convention.
        vae: decoder of the latent space; leave it out for a network that works on pixels.
        id2label: names of the classes, so that they can be asked for by name; several names are separated by commas.
    """

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
                (FlowTurbo, a searched grid), else 50.
            guidance_scale: classifier-free guidance s >= 1 in null + s * (conditional - null); 1 switches it off and
                halves the work.
            guidance_channels: how many of the leading latent channels are guided. The SiT code guides 3 of 4 and lets
                the rest follow the conditional velocity; its published numbers are made so. `"all"` guides every
                channel.
            generator: one generator, or one per image (an image then does not depend on its batch).
            latents: (B, C, S, S) starting noise instead of drawn one.
            output_type: `pil`, `np` (B, H, W, C) in [0, 1], `pt` (B, C, H, W) in [0, 1], or `latent` (B, C, S, S).
            return_dict: return an `ImagePipelineOutput` rather than a 1-tuple.
            callback_on_step_end: `callback(pipe, index, timestep, tensors)` after every evaluation, or after every step
                where blocks are compiled; may return `{"latents": ...}`.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only `latents`.

        Raises:
            ValueError: a bad class, scale, channel count, shape, step count or output type; each names what is allowed.
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
        noise = self._noise(latents, run)
        timesteps = self._set_timesteps(self._step_count(num_inference_steps))
        return self._result(self._denoise(run, noise, timesteps), output_type, return_dict)
