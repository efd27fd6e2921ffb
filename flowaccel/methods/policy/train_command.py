"""`flowaccel train policy`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.live import Live
from rich.table import Table
from torch import Tensor

from flowaccel.cli.common import (
    ArgumentOption,
    DeviceOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    console,
    emit,
    friendly_errors,
    say,
    whole_numbers,
)
from flowaccel.cli.common import progress as progress_bar
from flowaccel.cli.generate import call_arguments, parse_conditions
from flowaccel.cli.loading import open_pipeline, own_modules
from flowaccel.methods.policy.accelerator import LearnedPolicy
from flowaccel.methods.policy.network import SPARSE
from flowaccel.methods.policy.train.discriminator import DiscriminatorConfig, DiscriminatorTraining, new_discriminator
from flowaccel.methods.policy.train.loop import (
    PolicyObjective,
    PolicySettings,
    PolicyTask,
    Update,
    check_launch,
    new_policy,
    references,
    set_costs,
)
from flowaccel.methods.policy.train.rewards import feature_network_of, load_reward
from flowaccel.recipe import Recipe
from flowaccel.training.loop import LoopConfig
from flowaccel.training.loop import train as run_training

SPARSITY = (0.75, 0.6, 0.5)
NO_JUDGE, CONV_RATE = "none", 1e-3
LARGE = 64
"""Side of an image from which on crops hide nothing that a discriminator could see."""


def policy(
    pipe: PipeArgument,
    out: Annotated[Path, typer.Option(help="Folder for the recipe with the policy; a started one is resumed.")],
    reward: Annotated[
        str,
        typer.Option(
            help="accuracy:FEATURES, clip_score:CLIP, pick_score, or your own MODULE:ATTRIBUTE; FEATURES such as "
            "zoo:digits-features, CLIP such as zoo:shapes-clip."
        ),
    ],
    levels: Annotated[str, typer.Option(help="Heads: step or count, cache, sparse.")] = "step,cache",
    counts: Annotated[
        str | None, typer.Option(help="With the head count: the numbers of steps that it chooses from, as 4,6,8,12,20.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of untouched images, and the most of accelerated ones.")] = 28,
    updates: Annotated[int, typer.Option(min=1)] = 600,
    groups: Annotated[int, typer.Option(min=1, help="Samples per update.")] = 8,
    group_size: Annotated[int, typer.Option(help="Rollouts of each, at least 2.")] = 8,
    pool: Annotated[int, typer.Option(min=1, help="Samples that are trained on.")] = 512,
    discount: Annotated[float, typer.Option(help="What a step more leaves of the reward; lower makes faster.")] = 0.97,
    price: Annotated[
        float | None, typer.Option(help="In the place of the discount: what a step takes off the reward.")
    ] = None,
    discriminator: Annotated[
        str,
        typer.Option(
            help="Learns to tell accelerated images: conv (small images), zoo:NAME, clip:PATH_OR_HUB_ID, or none."
        ),
    ] = "conv",
    realism: Annotated[float, typer.Option(help="Weight of how unaccelerated images look to it.")] = 1.0,
    fidelity: Annotated[
        float, typer.Option(help="Weight of how near images come to untouched ones; not the paper's.")
    ] = 0.0,
    estimator: Annotated[str, typer.Option(help="grpo or rloo.")] = "grpo",
    epochs: Annotated[int, typer.Option(min=1, help="Updates on the same rollouts.")] = 1,
    per_decision: Annotated[bool, typer.Option("--per-decision", help="Clip every decision's ratio.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are made at once.")] = 32,
    head_width: Annotated[int, typer.Option(min=1, help="Of the heads.")] = 128,
    solver_order: Annotated[
        int, typer.Option(min=1, max=2, help="Of steps: 1 for Euler's, the paper's, 2 for Adams-Bashforth's.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option()] = 1e-5,
    classes: Annotated[str | None, typer.Option(help="Classes to train on, such as 0-9 or 1,5; default all.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts to train on, or zoo:SET.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    argument: ArgumentOption = None,
    save_every: Annotated[int, typer.Option(min=1)] = 20,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the heads of an acceleration policy (RAPID3, arXiv 2509.22323) on a pipeline that stays as it is.

    They learn by finished images: what these are worth, and what was computed for them. Writes a recipe (--recipe OUT).

    Example: flowaccel train policy zoo:sit-digits --out policy --reward accuracy:zoo:digits-features --updates 400
    --learning-rate 1e-3 --fidelity 1 --head-width 32
    """
    with (
        friendly_errors(" The last checkpoint is kept; the same command goes on from there."),
        own_modules(feature_network_of(reward)),
    ):
        settings = PolicySettings(
            groups=groups,
            group_size=group_size,
            discount=discount,
            price=price,
            realism=realism,
            fidelity=fidelity,
            estimator=estimator,  # type: ignore[arg-type]
            epochs=epochs,
            per_decision=per_decision,
            batch_size=batch_size,
        )
        check_launch()
        settings.check_pool(pool)
        if save_every % epochs:
            raise ValueError(f"save_every must be a multiple of epochs, {epochs}, got {save_every}")
        pipeline = open_pipeline(pipe, device)
        pipeline.set_progress_bar_config(disable=True)
        arguments = call_arguments(pipeline, pipe, argument, guidance_scale=guidance_scale)
        task = PolicyTask(
            conditions=parse_conditions(pipeline, classes, None, prompts),
            size=pool,
            steps=steps,
            seed=seed + 1,
            arguments=tuple(arguments.items()),
        )
        worth = load_reward(reward, pipeline.device)
        options = {
            "width": head_width,
            "solver_order": solver_order,
            "counts": () if counts is None else whole_numbers("--counts", counts),
            "sparsity": SPARSITY if SPARSE in levels else (),
        }
        heads = new_policy(pipeline, task, tuple(part.strip() for part in levels.split(",")), seed, **options)
        work = out / "training"
        with progress_bar() as notify:
            untouched = references(
                pipeline, task, work, batch_size, notify=lambda done: notify("references", done, pool)
            )
        set_costs(pipeline, heads, task, work)
        judge = _judge(discriminator, untouched, pipeline.device, seed)
        objective = PolicyObjective(pipeline, task, worth, settings, untouched, updates, judge, seed)
        loop = LoopConfig(steps=updates, learning_rate=learning_rate, ema_decay=0.9, save_every=save_every, seed=seed)
        also = {
            "reward": reward,
            "discriminator": discriminator,
            "levels": levels,
            "pool": pool,
            "untouched_steps": steps,
            **options,
            **asdict(settings),
        }
        with Live(refresh_per_second=1, transient=True, console=console) as live:
            for state in run_training(heads, objective, loop, work, also):
                if objective.last is not None:
                    live.update(_table(state.step, updates, objective.last))
        heads.requires_grad_(False)
        recipe = Recipe([LearnedPolicy(heads)], name=out.name, num_inference_steps=steps)
        recipe.for_pipeline(pipeline).save_pretrained(out)
        last = objective.last
        emit(
            {"out": str(out), "updates": updates, "reward": last and last.reward, "cost": last and last.cost},
            as_json,
            lambda: say(f"wrote the recipe to {out}" + (f"; {last.cost:.1f} dense steps an image" if last else "")),
        )


def _judge(name: str, untouched: Tensor, device: torch.device, seed: int) -> DiscriminatorTraining | None:
    if name == NO_JUDGE:
        return None
    channels, height, width = untouched.shape[1:]
    network = new_discriminator(name, (channels, height, width), seed).to(device)
    rate = CONV_RATE if name == "conv" else DiscriminatorConfig.learning_rate
    config = DiscriminatorConfig(learning_rate=rate, augment=min(height, width) >= LARGE, seed=seed)
    return DiscriminatorTraining(network, untouched, config)


def _table(done: int, total: int, last: Update) -> Table:
    table = Table(title=f"update {done} of {total}")
    cells = {
        "reward": f"{last.reward:.3f}",
        "quality": f"{last.quality:.3f}",
        "realism": "-" if last.realism is None else f"{last.realism:.3f}",
        "dense steps": f"{last.cost:.2f}",
        "steps": f"{last.steps:.1f}",
        "computed": f"{last.computed:.1f}",
        "entropy": f"{last.stats.entropy:.2f}",
        "clipped": f"{last.stats.clip_fraction:.0%}",
        "equal groups": str(last.stats.skipped),
    }
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    return table
