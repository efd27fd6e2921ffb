"""Pipeline runs that a calibration is made on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowaccel.evaluation import Conditions, sample_generator
from flowaccel.evaluation.samples.finite import check_samples
from flowaccel.hooks import Pipeline
from flowaccel.recipe.calibration import identities

Notify = Callable[[str, int, int], None]
"""`notify(stage, done, total)`, for progress bars."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Samples that a calibration is made on.

    Args:
        conditions: prompts or classes, in turn.
        steps: `num_inference_steps` of every call, at least 1.
        num_samples: images or videos, at least 1.
        first: number of the first of them, from 0; the seed and the number of a sample, and its condition, make it.
        seed: seed of everything random.
        batch_size: per call, at least 1.
        arguments: further arguments of every call, such as `guidance_scale`.

    Raises:
        ValueError: out of range.
    """

    conditions: Conditions
    steps: int
    num_samples: int
    first: int = 0
    seed: int = 0
    batch_size: int = 16
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("num_samples", 1), ("first", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def batches(self) -> list[Sequence[int]]:
        """Sample ids, batch by batch."""
        ids = range(self.first, self.first + self.num_samples)
        return [ids[start : start + self.batch_size] for start in range(0, self.num_samples, self.batch_size)]

    def guidance_scale(self, pipe: Pipeline) -> float | None:
        """Return the guidance scale of the runs: as given, else the pipeline's default; None where it has none."""
        parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
        value = self.arguments.get("guidance_scale", None if parameter is None else parameter.default)
        return float(value) if isinstance(value, (int, float)) else None

    def facts(self, pipe: Pipeline, steps: int, model: str | None) -> dict[str, Any]:
        """Return what a calibration records about runs of `steps` evaluations with `pipe`.

        The pipeline is accelerated as in those runs.
        """
        network, scheduler = identities(pipe)
        return {
            "network": network.kind,
            "network_config": network.config,
            "scheduler": scheduler.kind,
            "scheduler_config": scheduler.config,
            "steps": steps,
            "guidance_scale": self.guidance_scale(pipe),
            "conditions": min(len(self.conditions), self.num_samples),
            "images": self.num_samples,
            "model": model,
        }

    def run(self, pipe: Pipeline, notify: Notify, stage: str) -> Iterator[Tensor]:
        """Call the pipeline batch by batch, and yield images, uint8 (N, C, H, W), frames one below the other.

        Raises:
            FloatingPointError: a sample is not finite.
        """
        for ids, output in zip(self.batches, self.outputs(pipe, notify, stage, output_type="np"), strict=True):
            made = output.frames if hasattr(output, "frames") else output.images
            check_samples(pipe, made, ids)
            yield _pixels(made)

    def outputs(self, pipe: Any, notify: Notify, stage: str, *, output_type: str) -> Iterator[Any]:
        """Call the pipeline batch by batch, and yield its outputs."""
        done = 0
        notify(stage, 0, self.num_samples)
        for ids in self.batches:
            generators = [sample_generator(self.seed, sample_id) for sample_id in ids]
            output = pipe(
                **self.conditions.arguments(ids),
                **{**self.arguments, "output_type": output_type},
                num_inference_steps=self.steps,
                generator=generators,
            )
            done += len(ids)
            notify(stage, done, self.num_samples)
            yield output


def _pixels(made: Any) -> Tensor:
    numbers = torch.from_numpy(np.asarray(made)).flatten(1, -3)  # (N, frames * H, W, C)
    return (numbers.movedim(-1, 1) * 255).round().clamp(0, 255).to(torch.uint8)
