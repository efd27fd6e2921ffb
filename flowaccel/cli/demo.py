"""`flowaccel demo`: the product in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowaccel.cli.common import (
    DeviceOption,
    DtypeOption,
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
STEPS = 10
BASELINE_STEPS = (2, 3, 5)
RECIPES = ("euler@6", "ab2@4", "flowturbo-H1P2", "flowturbo-H1P1R1-single", "flowturbo-H1P2R1-single")


def demo(
    num_samples: Annotated[int, typer.Option(min=50, help="Images per row.")] = 400,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds of two calls per row.")] = 6,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Run folder; a started one is resumed.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sample handwritten digits by Heun, by fewer steps and by FlowTurbo, and measure quality and milliseconds side by
    side.

    Example: flowaccel demo --out runs/demo
    """
    with friendly_errors(" What was made so far is kept; the same command goes on from there."):
        pipeline = open_pipeline(PIPE, device, dtype)
        protocol = Protocol(
            conditions=Classes(tuple(range(10))),
            steps=STEPS,
            baseline_steps=BASELINE_STEPS,
            num_samples=num_samples,
            seed=seed,
            metrics=("fid", "class_accuracy"),
            rounds=rounds,
        )
        folder = output_folder(out, "demo")
        say(f"{PIPE}: {num_samples} images a row, a demo-sized sample; benchmarks/flowturbo.py uses 2000.")
        with progress() as notify:
            results = run_evaluation(pipeline, [open_recipe(name) for name in RECIPES], protocol, folder, notify)
        emit(results, as_json, lambda: show(results, folder))
