"""`flowaccel demo`: the product in one command."""

from __future__ import annotations

from dataclasses import dataclass
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
    output_folder,
    progress,
    say,
)
from flowaccel.cli.evaluate import default_protocol, show
from flowaccel.cli.loading import open_pipeline
from flowaccel.evaluation import evaluate as run_evaluation
from flowaccel.recipe import resolve


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """Settings of the demo for one pipeline of the zoo; the rest is as the zoo has it."""

    pipe: str
    steps: int
    baseline_steps: tuple[int, ...]
    recipes: tuple[str, ...]
    metrics: tuple[str, ...]
    num_samples: int
    rounds: int
    latency_batch: int
    remark: str = ""


DIGITS_RECIPES = ("euler@6", "ab2@4", "flowturbo-H1P2", "flowturbo-H1P1R1-single", "flowturbo-H1P2R1-single")
T2I_RECIPES = ("euler:shift=3@6", "flowturbo-H1P4R1-single", "taylorseer:interval=3", "guidance_skip")
TASKS = {
    "digits": DemoTask(
        pipe="zoo:sit-digits",
        steps=10,
        baseline_steps=(2, 3, 5),
        recipes=DIGITS_RECIPES,
        metrics=("fid", "class_accuracy"),
        num_samples=400,
        rounds=6,
        latency_batch=25,
        remark="; benchmarks/flowturbo.py uses 2000",
    ),
    "t2i": DemoTask(
        pipe="zoo:t2i-shapes",
        steps=28,
        baseline_steps=(6, 14),
        recipes=T2I_RECIPES,
        metrics=("fid", "attribute_accuracy"),
        num_samples=128,
        rounds=3,
        latency_batch=10,
    ),
}


def demo(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "digits",
    num_samples: Annotated[int | None, typer.Option(min=50, help="Images per row; default the task's.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Timed rounds of two calls per row; default the task's.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Run folder; a started one is resumed.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sample in full, by fewer steps and accelerated, and measure quality and milliseconds side by side: handwritten
    digits by Heun and FlowTurbo, or pictures of coloured shapes from text by Euler, time
    shift, FlowTurbo, a cache and guidance that ends.

    Example: flowaccel demo --task digits --out runs/demo
    """
    with friendly_errors(" What was made so far is kept; the same command goes on from there."):
        if task not in TASKS:
            raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
        chosen = TASKS[task]
        pipeline = open_pipeline(chosen.pipe, device, dtype)
        protocol = default_protocol(
            chosen.pipe,
            pipeline,
            steps=chosen.steps,
            baseline_steps=chosen.baseline_steps,
            num_samples=num_samples or chosen.num_samples,
            seed=seed,
            metrics=chosen.metrics,
            rounds=rounds or chosen.rounds,
            latency_batch=chosen.latency_batch,
        )
        folder = output_folder(out, "demo")
        say(f"{chosen.pipe}: {protocol.num_samples} images a row, a demo-sized sample{chosen.remark}.")
        with progress() as notify:
            results = run_evaluation(pipeline, [resolve(name) for name in chosen.recipes], protocol, folder, notify)
        emit(results, as_json, lambda: show(results, folder))
