"""Digits generator with mediator attention, and its fair control.

The control is full attention with the same biases and convolution. The softmax network that is trained as long is
`dense` of `flowaccel.zoo_build.moe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flowaccel import zoo
from flowaccel.data import digits
from flowaccel.methods.mediators.accelerator import Mediators
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.mediators.schedule import MediatorSchedule
from flowaccel.methods.mediators.settings import MediatorSettings
from flowaccel.methods.mediators.train import MediatorObjective
from flowaccel.pipelines import load_pipeline
from flowaccel.training.flow import FlowObjective, shift_augment
from flowaccel.training.loop import LoopConfig, Progress, train
from flowaccel.zoo_build.moe import BATCH, FRESH_LOOP
from flowaccel.zoo_build.width import save_variant

COUNTS = (4, 16)
DYNAMIC = MediatorSchedule(fixed=((0.0, 4), (0.5, 16)))
"""Schedule of the zoo's recipe."""
TRAININGS = {"mediators": MediatorSettings(counts=COUNTS), "control": MediatorSettings(counts=None)}


def fresh_network(settings: MediatorSettings, seed: int) -> Any:
    """Create an untrained network of the digits generator's shape."""
    torch.manual_seed(seed)
    base = load_pipeline(zoo.folder("sit-digits")).transformer
    own = {name: value for name, value in base.config.items() if not name.startswith("_")}
    network = MediatorSiTTransformer2DModel(**own, mediator_config=asdict(settings))
    network.requires_grad_(True)
    network.pos_embed.requires_grad_(False).copy_(base.pos_embed)  # the one that the others were trained with
    return network


def train_fresh(
    network: Any, settings: MediatorSettings, work: Path, loop: LoopConfig = FRESH_LOOP
) -> Iterator[Progress]:
    """Train in place; all numbers of mediators share every batch."""
    objective: Any = FlowObjective(
        data=digits("generator"), null_label=network.null_label, batch_size=BATCH, augment=shift_augment
    )
    if settings.counts is not None:
        objective = MediatorObjective(objective=objective, counts=settings.counts)
    yield from train(network, objective, loop, work, {"mediators": str(asdict(settings))})


def build_mediators(out: Path) -> Iterator[tuple[str, Progress, int]]:
    """Build the recipe with mediators for the digits pipeline of the zoo."""
    settings = TRAININGS["mediators"]
    network = fresh_network(settings, FRESH_LOOP.seed)
    for progress in train_fresh(network, settings, out / "training"):
        yield "mediators", progress, FRESH_LOOP.steps
    save_variant(lambda trained: Mediators(trained, schedule=DYNAMIC), network, out, "sit-digits-mediators")
