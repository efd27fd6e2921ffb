"""`flowaccel train width`."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowaccel.cli.common import (
    DeviceOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    append_entry,
    emit,
    friendly_errors,
    given_options,
    say,
)
from flowaccel.cli.common import progress as progress_bar
from flowaccel.cli.loading import open_pipeline
from flowaccel.hooks import Identity, Pipeline
from flowaccel.methods.dynamic_width.accelerator import DynamicWidth
from flowaccel.methods.dynamic_width.adapter import WidthAdapter, add_timed_lora
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.td_lora import TimedLoraSettings
from flowaccel.methods.dynamic_width.train import (
    STYLES,
    MacsCosts,
    WidthObjective,
    call_arguments,
    freeze_backbone,
    layer_ratios,
    plan_training,
    trainable_share,
)
from flowaccel.recipe import Recipe, accelerated, resolve
from flowaccel.training.embedded import known_data, training_data
from flowaccel.training.loop import LoopConfig, Progress
from flowaccel.training.loop import train as run_training


def width(
    pipe: PipeArgument,
    out: Annotated[Path, typer.Option(help="Folder for the recipe with the network; a started one is resumed.")],
    ratio: Annotated[
        float, typer.Option(help="Share of the switchable multiply-adds to aim at, above 0 and at most 1.")
    ] = 0.5,
    style: Annotated[
        str,
        typer.Option(help=f"Defaults of what follows: {' or '.join(STYLES)}; docs/width.md compares them."),
    ] = "recommended",
    tokens: Annotated[bool, typer.Option(help="Also let feed-forwards leave out tokens.")] = False,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Groups of hidden channels in a feed-forward; default one per head.")
    ] = None,
    normalise: Annotated[
        bool | None, typer.Option(help="Give routers time less its mean, in units of its spread.")
    ] = None,
    bias: Annotated[float | None, typer.Option(help="What the logits of heads and channels start at.")] = None,
    token_bias: Annotated[float | None, typer.Option(help="What the logits of tokens start at.")] = None,
    tau: Annotated[float | None, typer.Option(help="Temperature of the relaxation.")] = None,
    frozen: Annotated[
        bool,
        typer.Option(
            "--frozen", help="Leave the network's weights as they are: train routers and a TD-LoRA, a few MB."
        ),
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="With --frozen: rank of every expert of the TD-LoRA.")] = 4,
    experts: Annotated[int, typer.Option(min=1, help="With --frozen: experts, mixed by the timestep.")] = 4,
    data: Annotated[str, typer.Option(help="Embedded data set.")] = "digits",
    steps: Annotated[int, typer.Option(min=1)] = 20_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    router_rate: Annotated[float, typer.Option(help="How much faster routers learn than the rest.")] = 1.0,
    label_drop: Annotated[float, typer.Option(help="Share of rows trained on the null label.")] = 0.1,
    macs_weight: Annotated[float, typer.Option(help="Weight of the loss on multiply-adds.")] = 2.0,
    ramp: Annotated[int, typer.Option(min=0, help="Steps after which the target reaches the ratio.")] = 1000,
    complete_steps: Annotated[
        int, typer.Option(min=0, help="For so many steps the whole network is trained beside the dynamic one.")
    ] = 0,
    distill: Annotated[
        float | None, typer.Option(help="Weight of the distance to what the untouched network returns; 0 for none.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Times of training: stratified, uniform or deployment (needs --deploy).")
    ] = None,
    deploy: Annotated[
        str | None, typer.Option(metavar="RECIPE@N", help="Train on the times of this sampler: `euler@20`, `none@28`.")
    ] = None,
    controller: Annotated[
        bool | None, typer.Option(help="Move the target until the ratio without noise is the one asked for.")
    ] = None,
    rest: Annotated[
        float | None, typer.Option(help="Last part of the training, in which routers rest, from 0 to below 1.")
    ] = None,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is saved.")] = 0.999,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    save_every: Annotated[int, typer.Option(min=1, help="Also how often the ratios of all layers are logged.")] = 500,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train dynamic width and tokens (DyDiT, arXiv 2410.03456) for a SiTPipeline or a StableDiffusion3Pipeline.

    Writes a recipe (--recipe OUT) and, while training, the ratios of all layers to OUT/training/ratios.jsonl.

    Example: flowaccel train width zoo:sit-digits --out narrow --steps 2000 --batch-size 64 --learning-rate 5e-4
    """
    with friendly_errors(" The last checkpoint is kept; the same command goes on from there."):
        given = {"normalise": normalise, "bias": bias, "token_bias": token_bias, "tau": tau}
        density = density or ("deployment" if deploy is not None else None)
        options = {"density": density, "controller": controller, "distill_weight": distill}
        plan = plan_training(
            style, routers=given_options(given), objective=given_options(options), rest=rest, steps=steps
        )
        pipeline = open_pipeline(pipe, device)
        images, wrap = training_data(pipe, pipeline, known_data(data))
        base = pipeline.transformer.eval()
        torch.manual_seed(seed)
        settings = DynamicSettings(tokens=tokens, groups=groups, **plan.routers)
        network = _dynamic_network(base, settings, TimedLoraSettings(rank=rank, experts=experts) if frozen else None)
        wrapped, teacher = wrap(network), wrap(base.requires_grad_(False))
        if frozen:
            freeze_backbone(network)
        example = WidthObjective.example(images, teacher.null_label, base.device)
        objective = WidthObjective(
            data=images,
            null_label=teacher.null_label,
            costs=MacsCosts.of(network, call_arguments(wrapped, *example), 1),
            ratio=ratio,
            batch_size=batch_size,
            label_drop=label_drop,
            macs_weight=macs_weight,
            ramp=ramp,
            complete_steps=complete_steps,
            teacher=teacher if plan.objective.get("distill_weight", 0.0) > 0 else None,
            times=() if deploy is None else deployment_times(pipeline, deploy),
            **plan.objective,
        )
        objective.prepare(wrapped)
        loop = LoopConfig(
            steps=steps,
            learning_rate=learning_rate,
            # a controller that moves as fast as its routers swings
            rate_scales={"dynamic.correction": 1.0, "dynamic": router_rate},
            ema_decay=ema_decay,
            precision=precision,
            save_every=save_every,
            seed=seed,
        )
        learning = steps if objective.freeze_step is None else objective.freeze_step
        if (aim := objective.target(learning - 1)) > ratio:
            say(
                f"warning: the routers' training aims at {aim:.3f} when it ends, not at --ratio {ratio}; lower --ramp "
                "or give more --steps"
            )
        with progress_bar() as notify:
            routers = asdict(network.dynamic.settings)
            for state in run_training(wrapped, objective, loop, out / "training", routers):
                if state.step % save_every == 0 or state.step == steps:
                    log_ratios(out / "training" / "ratios.jsonl", state, objective, wrapped)
                notify("steps", state.step, steps)
        found = layer_ratios(objective, wrapped, torch.Generator().manual_seed(seed))
        share = trainable_share(network)
        network.requires_grad_(False).eval()
        part = WidthAdapter.of(network, Identity.of(base).config) if frozen else network
        Recipe([DynamicWidth(part)], name=out.name).for_pipeline(pipeline).save_pretrained(out)
        emit(
            {"out": str(out), "steps": steps, "trained_share": share, **asdict(found)},
            as_json,
            lambda: say(f"wrote the recipe to {out}; ratio with the gates of evaluation {found.ratio:.3f}"),
        )


def _dynamic_network(base: Any, settings: DynamicSettings, lora: TimedLoraSettings | None) -> Any:
    """Return a dynamic network with weights of its own, or one that shares those of `base` and has a TD-LoRA."""
    if lora is None:
        return make_dynamic(copy.deepcopy(base), settings)
    network = make_dynamic(base, settings)
    add_timed_lora(network, lora)
    return network


def deployment_times(pipeline: Pipeline, recipe: str) -> tuple[float, ...]:
    """Return the times in SiT's convention (1 data) at which a recipe's sampler calls the network.

    Raises:
        ValueError: the recipe does not say how many steps.
    """
    chosen = resolve(recipe)
    if chosen.num_inference_steps is None:
        raise ValueError(f"--deploy must say how many steps, such as {recipe}@20, got {recipe!r}")
    with accelerated(pipeline, chosen):
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(chosen.num_inference_steps)
        scale = scheduler.config.get("num_train_timesteps", 1000)
        return tuple(1 - float(value) / scale for value in scheduler.timesteps)


def log_ratios(path: Path, state: Progress, objective: WidthObjective, network: Any) -> None:
    """Append the ratios of all layers, with the gates of evaluation and the weights of this step, to a file."""
    found = layer_ratios(objective, network, torch.Generator().manual_seed(state.step))
    append_entry(path, {"step": state.step, "loss": state.loss, **asdict(found)})
