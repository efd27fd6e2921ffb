"""`flowaccel demo`: the product in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowaccel.cli.common import (
    DeviceOption,
    JsonOption,
    SeedOption,
    emit,
    friendly_errors,
    open_pipeline,
    open_recipe,
    output_folder,
    progress,
    say,
)
from flowaccel.cli.evaluate import show
from flowaccel.evaluation import Classes, Protocol
from flowaccel.evaluation import evaluate as run_evaluation

PIPE = "zoo:sit-digits"
STEPS = 15
BASELINE_STEPS = (5, 8)
RECIPES = ("euler@10", "flowturbo-H1P3R2", "flowturbo-H2P4R2")


def demo(
    num_samples: Annotated[int, typer.Option(min=50, help="Images per row.")] = 400,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds of two calls per row.")] = 8,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder; a started one is resumed.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sample handwritten digits by Heun, by fewer steps and by FlowTurbo, and measure quality and milliseconds side by
    side.

    Example: flowaccel demo --out runs/demo
    """
    with friendly_errors(" What was made so far is kept; the same command goes on from there."):
        pipeline = open_pipeline(PIPE, device)
        protocol = Protocol(
            conditions=Classes(tuple(range(10))),
            steps=STEPS,
            baseline_steps=BASELINE_STEPS,
            num_samples=num_samples,
            seed=seed,
            rounds=rounds,
        )
        folder = output_folder(out, "demo")
        say(f"{PIPE}: {num_samples} images a row, a demo-sized sample; benchmarks/flowturbo.py uses 2000.")
        with progress() as notify:
            results = run_evaluation(pipeline, [open_recipe(name) for name in RECIPES], protocol, folder, notify)
        emit(results, as_json, lambda: show(results, folder))
