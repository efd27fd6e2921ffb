"""Digits generator with dynamic width and tokens, and the control that is trained as long without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flowaccel import zoo
from flowaccel.data import digits
from flowaccel.methods.dynamic_width.accelerator import DynamicWidth
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.train import RECOMMENDED, MacsCosts, WidthObjective, call_arguments
from flowaccel.models import SiTTransformer2DModel
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe
from flowaccel.recipe.accelerator import Accelerator
from flowaccel.training.flow import FlowObjective, shift_augment
from flowaccel.training.loop import LoopConfig, Progress, train

LOOP = LoopConfig(
    steps=1200,
    learning_rate=5e-4,
    warmup=50,
    cosine=True,
    ema_decay=0.99,
    rate_scales={"dynamic": 2.0},
    save_every=100,
    seed=0,
)
BATCH = 64
RATIO = 0.5
OBJECTIVE: dict[str, Any] = {**RECOMMENDED["objective"], "ramp": 400, "freeze_step": 1080}


def dynamic_digits(base: SiTTransformer2DModel, *, tokens: bool, **routers: Any) -> Any:
    """Return a dynamic copy of the digits generator whose weights are all trainable."""
    torch.manual_seed(LOOP.seed)
    network = make_dynamic(copy.deepcopy(base), DynamicSettings(tokens=tokens, **{**RECOMMENDED["routers"], **routers}))
    network.requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    return network


def train_width(
    network: Any, base: SiTTransformer2DModel, work: Path, *, ratio: float, loop: LoopConfig = LOOP, **options: Any
) -> Iterator[Progress]:
    """Train a dynamic digits generator in place, with `base` as its teacher."""
    data = digits("generator")
    example = WidthObjective.example(data, base.null_label, base.device)
    settings = {**OBJECTIVE, "batch_size": BATCH, "teacher": base, "augment": shift_augment, **options}
    objective = WidthObjective(
        data=data,
        null_label=base.null_label,
        costs=MacsCosts.of(network, call_arguments(network, *example), 1),
        ratio=ratio,
        **settings,
    )
    objective.prepare(network)
    yield from train(network, objective, loop, work, asdict(network.dynamic.settings))


def save_variant(kind: Callable[[Any], Accelerator], network: Any, folder: Path, name: str) -> None:
    """Save the recipe for the shipped digits generator: weights in bfloat16, routers in float32."""
    network.requires_grad_(False).eval()
    pipe = load_pipeline(zoo.folder("sit-digits"))
    network.place("cpu", torch.bfloat16)
    Recipe([kind(network)], name=name).for_pipeline(pipe).save_pretrained(folder)


def build_width(out: Path, *, tokens: bool = False) -> Iterator[tuple[str, Progress, int]]:
    """Build the recipe with dynamic width, or width and tokens, for the digits pipeline of the zoo."""
    base = load_pipeline(zoo.folder("sit-digits")).transformer.float().eval().requires_grad_(False)
    network = dynamic_digits(base, tokens=tokens)
    for progress in train_width(network, base, out / "training", ratio=RATIO):
        yield "width", progress, LOOP.steps
    save_variant(DynamicWidth, network, out, "sit-digits-width-tokens" if tokens else "sit-digits-width")


def train_longer(network: SiTTransformer2DModel, work: Path, *, loop: LoopConfig = LOOP) -> Iterator[Progress]:
    """Train the control: the stock network, in place, for as long and at the same rate.

    It has the same images, labels and noise; times are drawn uniformly, and there is no teacher.
    """
    network.requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    objective = FlowObjective(
        data=digits("generator"), null_label=network.null_label, batch_size=BATCH, augment=shift_augment
    )
    yield from train(network, objective, loop, work)
