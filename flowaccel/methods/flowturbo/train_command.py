"""`flowaccel train refiner`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from flowaccel.cli.common import DeviceOption, JsonOption, PipeArgument, SeedOption, emit, friendly_errors, say
from flowaccel.cli.common import progress as progress_bar
from flowaccel.cli.loading import open_pipeline
from flowaccel.methods.flowturbo.accelerator import new_refiner
from flowaccel.methods.flowturbo.train import DELTA_MAX, RefinerObjective
from flowaccel.training.embedded import known_data, training_data
from flowaccel.training.loop import LoopConfig
from flowaccel.training.loop import train as run_training


def refiner(
    pipe: PipeArgument,
    out: Annotated[Path, typer.Option(help="Folder for the refiner; a started one is resumed.")],
    data: Annotated[str, typer.Option(help="Embedded data set.")] = "digits",
    steps: Annotated[int, typer.Option(min=1)] = 30_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 18,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    delta_min: Annotated[float, typer.Option(help="Shortest training step; 0 is the published recipe.")] = 0.0,
    delta_max: Annotated[
        float, typer.Option(help="Longest training step; the widths 1/N in mind should lie below.")
    ] = DELTA_MAX,
    label_drop: Annotated[float, typer.Option(help="Share of rows trained on the null label.")] = 0.1,
    guidance_scale: Annotated[
        float, typer.Option(help="Feed velocities guided by this; 1 is the published recipe.")
    ] = 1.0,
    drop_both: Annotated[bool, typer.Option(help="Feed dropped rows the null velocity (the paper's text).")] = False,
    clamp: Annotated[bool, typer.Option(help="Keep t + delta at or below 1.")] = False,
    inside: Annotated[bool, typer.Option(help="Draw t so that t + delta stays below 1.")] = False,
    per_sample_delta: Annotated[bool, typer.Option(help="One step length per image.")] = False,
    trajectory_steps: Annotated[
        int, typer.Option(min=0, help="Draw states from Euler trajectories of so many steps.")
    ] = 0,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    save_every: Annotated[int, typer.Option(min=1)] = 500,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train FlowTurbo's velocity refiner (arXiv 2409.18128) for a SiTPipeline or a StableDiffusion3Pipeline.

    The defaults are the published recipe.

    Example: flowaccel train refiner zoo:sit-digits --out my-refiner --steps 2000 --batch-size 64 --learning-rate 1e-3
    """
    with friendly_errors(" The last checkpoint is kept; the same command goes on from there."):
        known = known_data(data)
        pipeline = open_pipeline(pipe, device)
        images, wrap = training_data(pipe, pipeline, known)
        teacher = wrap(pipeline.transformer.eval().requires_grad_(False))
        objective = RefinerObjective(
            teacher=teacher,
            data=images,
            null_label=teacher.null_label,
            batch_size=batch_size,
            delta_min=delta_min,
            delta_max=delta_max,
            label_drop=label_drop,
            guidance_scale=guidance_scale,
            drop_both=drop_both,
            clamp=clamp,
            inside=inside,
            per_sample_delta=per_sample_delta,
            trajectory_steps=trajectory_steps,
        )
        loop = LoopConfig(
            steps=steps, learning_rate=learning_rate, precision=precision, save_every=save_every, seed=seed
        )
        torch.manual_seed(seed)
        network = new_refiner(pipeline.transformer).to(pipeline.transformer.device)
        loss = None
        with progress_bar() as notify:
            for state in run_training(wrap(network), objective, loop, out / "training"):
                loss = state.loss
                notify("steps", state.step, steps)
        network.save_pretrained(out)
        emit(
            {"out": str(out), "steps": steps, "loss": loss},
            as_json,
            lambda: say(f"wrote the refiner to {out}; loss {loss}"),
        )
