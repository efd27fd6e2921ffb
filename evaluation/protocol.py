"""Protocol of an evaluation: what is compared, the rows, and how a row's samples are made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaccel import Recipe
from flowaccel.evaluation.baselines.baselines import parse_baseline
from flowaccel.evaluation.candidates import BASELINE, BaselineCandidate, Candidate, RecipeCandidate
from flowaccel.evaluation.metrics.table import find_metric
from flowaccel.evaluation.samples.call_arguments import check_names
from flowaccel.evaluation.samples.finite import check_samples
from flowaccel.evaluation.samples.prompts import Conditions
from flowaccel.evaluation.samples.store import SampleStore, folder_name, sample_generator
from flowaccel.evaluation.timing.cost import denoiser
from flowaccel.hooks import Pipeline

DEFAULT_METRICS = ("fid", "kid", "class_accuracy", "rel_l2")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Protocol of an evaluation: what is compared, and how."""

    conditions: Conditions
    """Classes or prompts to sample for."""
    steps: int
    """Steps of the untouched pipeline."""
    baseline_steps: tuple[int, ...] = ()
    """Also measure the untouched pipeline with these numbers of steps."""
    baselines: tuple[str, ...] = ()
    """Also measure these accelerators of other libraries, see `parse_baseline`."""
    num_samples: int = 2000
    seed: int = 0
    batch_size: int = 100
    guidance_scale: float | None = None
    """None leaves the pipeline's default."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of every pipeline call, such as `height`; plain values, as JSON has them."""
    features: str = "zoo:digits-features"
    reference: str = "zoo:digits"
    metrics: tuple[str, ...] = DEFAULT_METRICS
    rounds: int = 10
    """Timed rounds of two calls per row."""
    clip: str | None = None
    """The CLIP network of clip_score; None takes the feature network."""
    attributes: str | None = None
    """Attribute set of attribute_accuracy, which reads from prompts what images have to show: `zoo:SET`."""
    latency_batch: int = 25
    """Images per timed call."""
    resamples: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "num_samples", "batch_size", "latency_batch", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2 (10 for an interval worth printing), got {self.rounds}")
        if self.num_samples < 2:
            raise ValueError("num_samples must be at least 2: a covariance needs two samples")
        check_names(self.arguments)
        for metric in self.metrics:
            find_metric(metric)
        for baseline in self.baselines:
            parse_baseline(baseline)


def plan_rows(recipes: Sequence[Recipe], protocol: Protocol) -> list[Candidate]:
    """Return the rows of an evaluation in order: the untouched pipeline, fewer steps, the baselines, the recipes.

    Raises:
        ValueError: two rows of one name.
    """
    fewer = [steps for steps in protocol.baseline_steps if steps != protocol.steps]
    baselines = [parse_baseline(text) for text in protocol.baselines]
    rows = [
        Candidate(name=BASELINE, steps=protocol.steps),
        *(Candidate(name=f"{BASELINE}@{steps}", steps=steps) for steps in fewer),
        *(BaselineCandidate(name=b.name, steps=protocol.steps, family=b.family, baseline=b) for b in baselines),
        *(
            RecipeCandidate(
                name=recipe.name,
                steps=recipe.num_inference_steps or protocol.steps,
                family=re.split("[@:-]", recipe.name)[0],
                recipe=recipe,
            )
            for recipe in recipes
        ),
    ]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"rows need different names, got more than once: {', '.join(twice)}; give the recipes names")
    return rows


def row_store(out: Path, row: Candidate) -> SampleStore:
    """Return the sample store of a row in a run folder."""
    return SampleStore(out / "rows" / folder_name(row.name))


def row_manifest(pipe: Pipeline, protocol: Protocol, row: Candidate, weights: dict[str, str]) -> dict[str, Any]:
    """Return everything that a row's samples depend on, and nothing else."""
    manifest = {
        "pipeline": type(pipe).__name__,
        "scheduler": _plain_config(pipe.scheduler),
        "dtype": str(denoiser(pipe).dtype),
        "weights": weights | row.fingerprints(),
        "recipe": row.describe(),
        "steps": row.steps,
        "guidance_scale": protocol.guidance_scale,
        "arguments": protocol.arguments or None,
        "conditions": protocol.conditions.describe(),
        "seed": protocol.seed,
    }
    if row.by_batch:
        manifest["batch_size"] = protocol.batch_size
    return manifest


def _plain_config(scheduler: Any) -> dict[str, Any]:
    return {"class": type(scheduler).__name__} | {
        key: value for key, value in scheduler.config.items() if not key.startswith("_")
    }


def call(pipe: Any, protocol: Protocol, ids: Sequence[int], steps: int) -> Tensor:
    """Call the pipeline once for sample ids, and return uint8 images (N, C, H, W), rounded.

    Raises:
        FloatingPointError: an image is not finite.
    """
    arguments = {**protocol.arguments, **protocol.conditions.arguments(ids)}
    if protocol.guidance_scale is not None:
        arguments["guidance_scale"] = protocol.guidance_scale
    generators = [sample_generator(protocol.seed, sample_id) for sample_id in ids]
    output = pipe(**arguments, num_inference_steps=steps, generator=generators, output_type="np")
    images = getattr(output, "images", None)
    if images is None:
        raise no_images(pipe)
    check_samples(pipe, images, ids)
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().clamp(0, 255).to(torch.uint8)


def no_images(pipe: Pipeline) -> ValueError:
    """Return the error for a pipeline that does not make images."""
    return ValueError(
        f"evaluate needs a pipeline that makes images, and {type(pipe).__name__} does not; "
        "`flowaccel generate` writes videos, comparing them is not in this version"
    )
