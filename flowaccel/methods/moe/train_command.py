"""`flowaccel train moe`."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline

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
from flowaccel.cli.generate import parse_arguments
from flowaccel.cli.loading import open_pipeline
from flowaccel.hooks import Pipeline
from flowaccel.methods.moe.accelerator import MixtureOfExperts
from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.networks import moe_class, upcycle_to_moe
from flowaccel.methods.moe.settings import BY_TOKEN, MoESettings
from flowaccel.methods.moe.train import (
    PREDICTOR,
    MoEObjective,
    drawn_batches,
    expert_rates,
    moe_losses,
    prepare_training,
    realised_capacity,
    settle,
)
from flowaccel.recipe import Recipe
from flowaccel.training.ddpm import DDPMObjective, Diffusion
from flowaccel.training.embedded import FLOW_PIPELINES, known_data, null_label, training_data
from flowaccel.training.flow import FlowObjective
from flowaccel.training.labelled import LabelledObjective
from flowaccel.training.loop import LoopConfig, Progress
from flowaccel.training.loop import train as run_training

MOE_METHODS = ("copies", "shared", "scratch")
FULL_SHARE, RAMP_SHARE = 0.02, 0.1
"""Shares of the steps in which copies run all experts, and in which their capacity falls from there."""
BACKBONE_RATE = 0.1


def moe(
    pipe: PipeArgument,
    out: Annotated[Path, typer.Option(help="Folder for the recipe with the network; a started one is resumed.")],
    router: Annotated[str | None, typer.Option(help="How experts are chosen; docs/moe.md compares the ways.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer; default 16.")] = None,
    capacity: Annotated[
        float | None, typer.Option(help="Experts that a token takes on average, at most all; default 1.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Which blocks have experts: a name, default odd, or indices such as 1,3.")
    ] = None,
    moe_entry: Annotated[
        list[str] | None,
        typer.Option(
            "--moe", metavar="KEY=VALUE", help="Further entry of MoESettings, such as inner_dim=256; may be repeated."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="copies: every expert starts as the dense feed-forward; shared: that stays beside them; scratch: "
            "all weights start anew."
        ),
    ] = "copies",
    objective: Annotated[
        str | None, typer.Option(help="flow or ddpm; default that of the pipeline, which no other fits.")
    ] = None,
    full_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps with all experts for every token; default 2% for copies, else 0.")
    ] = None,
    ramp: Annotated[
        int | None, typer.Option(min=0, help="Steps in which the capacity falls from there; default 10%, else 0.")
    ] = None,
    backbone_rate: Annotated[
        float | None,
        typer.Option(help="How much faster all but the experts learn; default 0.1, from scratch 1."),
    ] = None,
    data: Annotated[str, typer.Option(help="Embedded data set.")] = "digits",
    steps: Annotated[int, typer.Option(min=1)] = 20_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    label_drop: Annotated[float, typer.Option(help="Share of rows trained on the null label.")] = 0.1,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is saved.")] = 0.999,
    calibration_batches: Annotated[
        int, typer.Option(min=1, help="Batches that thresholds are fitted to at the end, and measured with.")
    ] = 50,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    save_every: Annotated[int, typer.Option(min=1, help="Also how often capacities of all layers are logged.")] = 500,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train experts (DiffMoE, arXiv 2503.14487) for a SiTPipeline, a DiTPipeline or a StableDiffusion3Pipeline.

    Writes a recipe (--recipe OUT) and, while training, losses and capacities to OUT/training/capacity.jsonl.

    Example: flowaccel train moe zoo:sit-digits --out sparse --experts 8 --steps 800 --batch-size 64
    --learning-rate 1e-3
    """
    with friendly_errors(" The last checkpoint is kept; the same command goes on from there."):
        named = given_options(
            {"router": router, "num_experts": experts, "capacity": capacity, "layers": _blocks(layers)}
        )
        settings = _moe_settings(named, moe_entry)
        pipeline = open_pipeline(pipe, device)
        images, wrap = training_data(pipe, pipeline, known_data(data), (*FLOW_PIPELINES, DiTPipeline))
        torch.manual_seed(seed)
        network = _sparse_network(pipeline.transformer.eval(), settings, method)
        prepare_training(network)
        wrapped = wrap(network)
        drawn = _own_objective(
            pipeline, objective, data=images, null_label=null_label(wrapped), batch_size=batch_size,
            label_drop=label_drop,
        )  # fmt: skip
        loop = LoopConfig(
            steps=steps,
            learning_rate=learning_rate,
            rate_scales=expert_rates(_or(backbone_rate, 1.0 if method == "scratch" else BACKBONE_RATE)),
            clip_apart=(PREDICTOR,),
            ema_decay=ema_decay,
            precision=precision,
            save_every=save_every,
            seed=seed,
        )
        annealed = _annealed(network, drawn, full_steps, ramp, steps)
        built = {**asdict(_built(network)), "method": method}
        loss = None
        with progress_bar() as notify:
            for state in run_training(wrapped, annealed, loop, out / "training", built):
                loss = state.loss
                if state.step % save_every == 0 or state.step == steps:
                    log_capacities(out / "training" / "capacity.jsonl", state, drawn, network, wrapped)
                notify("steps", state.step, steps)
        settle(network, drawn, batches=calibration_batches, seed=seed, call=wrapped)
        held_out = drawn_batches(drawn, calibration_batches, seed + 1, network.device)
        found = realised_capacity(network, held_out, call=wrapped)
        mean = sum(found.values()) / len(found)
        network.requires_grad_(False)
        Recipe([MixtureOfExperts(network)], name=out.name).for_pipeline(pipeline).save_pretrained(out)
        emit(
            {"out": str(out), "steps": steps, "loss": loss, "capacity": mean, "layers": found},
            as_json,
            lambda: say(f"wrote the recipe to {out}; a token takes {mean:.3f} experts on average"),
        )


def _blocks(text: str | None) -> str | tuple[int, ...] | None:
    """Parse a name, or indices between commas."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else text


def _moe_settings(named: dict[str, Any], entries: list[str] | None) -> MoESettings:
    """Create the settings from the options that are given and those of --moe.

    Raises:
        ValueError: an entry that is not known or out of its range, or given twice.
    """
    free = parse_arguments(entries, "--moe", "inner_dim=256")
    if twice := sorted(named.keys() & free.keys()):
        raise ValueError(f"{twice[0]} is given both by an option of its own and by --moe; give one")
    return MoESettings.of({**named, **free})


def _sparse_network(base: Any, settings: MoESettings, method: str) -> Any:
    """Return a network with experts and weights of its own, copied from `base` or new."""
    if method not in MOE_METHODS:
        raise ValueError(f"--method must be one of {', '.join(MOE_METHODS)}, got {method!r}")
    if method != "scratch":
        return upcycle_to_moe(copy.deepcopy(base), settings, method)
    kind: Any = moe_class(base)
    config = {name: value for name, value in kind.own_config(base).items() if not name.startswith("_")}
    return kind(**config, moe_config=asdict(settings)).to(base.device)


def _built(network: Any) -> MoESettings:
    """Return the settings of the network's experts, as completed by the method."""
    return next(iter(moe_layers(network).values())).settings


def _own_objective(pipeline: Pipeline, asked: str | None, **drawn: Any) -> LabelledObjective:
    """Return the objective that the pipeline's network is trained on.

    Raises:
        ValueError: another one was asked for, or its scheduler is not for networks that tell the noise.
    """
    own = "ddpm" if isinstance(pipeline, DiTPipeline) else "flow"
    if asked not in (None, own):
        raise ValueError(
            f"--objective of a {type(pipeline).__name__} is {own}, which its network and its sampler are made for, "
            f"got {asked!r}; leave it out"
        )
    if own == "flow":
        return FlowObjective(**drawn)
    config = pipeline.scheduler.config
    if config.get("prediction_type") != "epsilon" or not hasattr(pipeline.scheduler, "betas"):
        raise ValueError(
            f"the scheduler of a DiTPipeline must have betas and prediction_type 'epsilon' to train for it, got a "
            f"{type(pipeline.scheduler).__name__} with prediction_type {config.get('prediction_type')!r}"
        )
    return DDPMObjective(chain=Diffusion(pipeline.scheduler.betas), **drawn)


def _annealed(
    network: Any, drawn: LabelledObjective, full_steps: int | None, ramp: int | None, steps: int
) -> MoEObjective:
    """Return an objective that goes from all experts down to the capacity of the settings.

    It does so if asked to, or if the network starts with all experts.

    Raises:
        ValueError: a schedule for a router that gives every token equally many experts.
    """
    settings = _built(network)
    if (full_steps or ramp) and settings.router in BY_TOKEN:
        raise ValueError(
            f"--full-steps and --ramp are for routers with which tokens take as many experts as they need, got "
            f"router={settings.router!r}, where every token takes {settings.capacity:g}"
        )
    starts_full = any(layer.capacity > layer.settings.capacity for layer in moe_layers(network).values())
    shares = (FULL_SHARE, RAMP_SHARE) if starts_full else (0.0, 0.0)
    full_steps, ramp = (
        _or(given, round(share * steps)) for given, share in zip((full_steps, ramp), shares, strict=True)
    )
    return MoEObjective(objective=drawn, full_steps=full_steps, ramp=ramp)


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


def log_capacities(path: Path, state: Progress, drawn: LabelledObjective, network: Any, wrapped: Any) -> None:
    """Append the routers' losses and the inference capacities of all layers at this step to a file.

    They are measured with the weights of this step and the thresholds that follow them, on a batch drawn for this.
    """
    batches = drawn_batches(drawn, 1, state.step, network.device)
    entry = {
        "step": state.step,
        "loss": state.loss,
        "router_losses": {path: float(loss) for path, loss in moe_losses(network).items()},
        "capacity": realised_capacity(network, batches, call=wrapped),
    }
    append_entry(path, entry)
