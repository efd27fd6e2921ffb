"""Builders of the zoo's entries: `flowaccel zoo build NAME` runs the builder of that name.

A builder yields (stage, progress, steps of the stage) as it goes; every stage resumes from its own checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowaccel.data import digits
from flowaccel.methods.flowturbo.accelerator import FOLDER, new_refiner
from flowaccel.methods.flowturbo.train import RefinerObjective
from flowaccel.models import DigitsClassifier, SiTTransformer2DModel
from flowaccel.pipelines import SiTPipeline
from flowaccel.samplers import FlowRungeKuttaScheduler
from flowaccel.training.features import ClassifierObjective
from flowaccel.training.flow import FlowObjective, shift_augment
from flowaccel.training.loop import LoopConfig, Progress, train
from flowaccel.zoo_build.mediators import build_mediators
from flowaccel.zoo_build.moe import build_moe
from flowaccel.zoo_build.policy import build_policy
from flowaccel.zoo_build.shapes import build_shapes_clip, build_shapes_features, build_t2i_shapes
from flowaccel.zoo_build.width import build_width

Step = tuple[str, Progress, int]

SIT_DIGITS = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 1,
    "num_layers": 12,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_classes": 10,
    "learn_sigma": False,
}
SIT_DIGITS_LOOP = LoopConfig(
    steps=4500, learning_rate=1e-3, warmup=200, cosine=True, weight_decay=0.01, save_every=250, keep=(2250,), seed=0
)
REFINER_LOOP = LoopConfig(steps=2000, learning_rate=2e-3, warmup=100, cosine=True, save_every=500, seed=0)
# Trained as it is used: guided velocities, and steps of the lengths that 3 and 4 steps have.
REFINER_OBJECTIVE: dict[str, Any] = {
    "batch_size": 64,
    "delta_min": 0.22,
    "delta_max": 0.4,
    "per_sample_delta": True,
    "inside": True,
    "guidance_scale": 1.5,
}
FEATURES_LOOP = LoopConfig(
    steps=3000, learning_rate=2e-3, warmup=100, cosine=True, weight_decay=0.05, save_every=1000, seed=0
)


def build_sit_digits(out: Path) -> Iterator[Step]:
    """Build the digits pipeline: a SiT with 64 tokens and 12 blocks of width 64, and its velocity refiner."""
    torch.manual_seed(SIT_DIGITS_LOOP.seed)
    transformer = SiTTransformer2DModel(**SIT_DIGITS)
    yield from train_sit_digits(transformer, out)
    labels = {str(digit): str(digit) for digit in range(10)}
    SiTPipeline(transformer, FlowRungeKuttaScheduler("heun"), id2label=labels).save_pretrained(out)
    transformer.float().requires_grad_(False)
    yield from train_refiner(transformer, out, out / FOLDER, REFINER_LOOP, **REFINER_OBJECTIVE)


def train_sit_digits(model: SiTTransformer2DModel, out: Path, loop: LoopConfig = SIT_DIGITS_LOOP) -> Iterator[Step]:
    """Train the generator alone, in place; its final weights are rounded to bfloat16, as they are shipped."""
    objective = FlowObjective(data=digits("generator"), null_label=model.null_label, augment=shift_augment)
    for progress in train(model, objective, loop, out / "training"):
        yield "generator", progress, loop.steps
    model.to(torch.bfloat16)


def train_refiner(
    teacher: SiTTransformer2DModel, work: Path, folder: Path, loop: LoopConfig, **objective: Any
) -> Iterator[Step]:
    """Train a velocity refiner for `teacher`, and write it to `folder` in bfloat16."""
    torch.manual_seed(loop.seed)
    refiner = new_refiner(teacher)
    loss = RefinerObjective(teacher=teacher, data=digits("generator"), null_label=teacher.null_label, **objective)
    for progress in train(refiner, loss, loop, work / f"training-{folder.name}"):
        yield "refiner", progress, loop.steps
    _save(refiner, folder)


def build_digits_features(out: Path) -> Iterator[Step]:
    """Build the digit classifier that the evaluator takes features from."""
    torch.manual_seed(FEATURES_LOOP.seed)
    model = DigitsClassifier()
    for progress in train(model, ClassifierObjective(data=digits("features")), FEATURES_LOOP, out / "training"):
        yield "classifier", progress, FEATURES_LOOP.steps
    _save(model, out)


def _save(model: nn.Module, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]


BUILDERS: dict[str, Callable[[Path], Iterator[Step]]] = {
    "sit-digits": build_sit_digits,
    "digits-features": build_digits_features,
    "sit-digits-width": build_width,
    "sit-digits-width-tokens": functools.partial(build_width, tokens=True),
    "sit-digits-moe": build_moe,
    "sit-digits-mediators": build_mediators,
    "sit-digits-policy": build_policy,
    "t2i-shapes": build_t2i_shapes,
    "shapes-features": build_shapes_features,
    "shapes-clip": build_shapes_clip,
}
