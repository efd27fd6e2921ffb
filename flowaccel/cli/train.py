"""`flowaccel train METHOD`: the learned accelerators."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline, StableDiffusion3Pipeline

from flowaccel import zoo
from flowaccel.accelerators import DynamicWidth, MixtureOfExperts
from flowaccel.accelerators.velocity_refiner import new_refiner
from flowaccel.cli.common import (
    DeviceOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    emit,
    friendly_errors,
    open_pipeline,
    open_recipe,
    say,
)
from flowaccel.cli.common import progress as progress_bar
from flowaccel.cli.generate import parse_arguments
from flowaccel.data import DATASETS, CaptionedSet, ImageSet
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import Identity
from flowaccel.models import DynamicSettings, make_dynamic, upcycle_to_moe
from flowaccel.models.dynamic import WidthAdapter, add_timed_lora
from flowaccel.models.moe import moe_class
from flowaccel.modules import TimedLoraSettings
from flowaccel.modules.moe import MoESettings, moe_layers
from flowaccel.modules.moe.settings import BY_TOKEN
from flowaccel.pipelines import SiTPipeline
from flowaccel.recipe import Recipe, accelerated
from flowaccel.training.ddpm import DDPMObjective, Diffusion
from flowaccel.training.flow import FlowObjective
from flowaccel.training.labelled import LabelledObjective
from flowaccel.training.loop import LoopConfig, Progress
from flowaccel.training.loop import train as run_training
from flowaccel.training.moe import (
    PREDICTOR,
    MoEObjective,
    drawn_batches,
    expert_rates,
    moe_losses,
    prepare_training,
    realised_capacity,
    settle,
)
from flowaccel.training.refiner import DELTA_MAX, RefinerObjective
from flowaccel.training.text_to_image import prompted_data
from flowaccel.training.width import (
    STYLES,
    MacsCosts,
    WidthObjective,
    call_arguments,
    freeze_backbone,
    layer_ratios,
    plan_training,
    trainable_share,
)

app = typer.Typer(help="Train a learned accelerator.", no_args_is_help=True)

FLOW_PIPELINES = (SiTPipeline, StableDiffusion3Pipeline)
MOE_METHODS = ("copies", "shared", "scratch")
FULL_SHARE, RAMP_SHARE = 0.02, 0.1
"""Of the steps: how long copies run all experts, and how long their capacity falls from there."""
BACKBONE_RATE = 0.1


@app.callback()
def methods() -> None:
    """Train a learned accelerator."""


@app.command("refiner")
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


@app.command("width")
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
        plan = plan_training(style, routers=_given(given), objective=_given(options), rest=rest, steps=steps)
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


@app.command("moe")
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
        named = _given({"router": router, "num_experts": experts, "capacity": capacity, "layers": _blocks(layers)})
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
    """A name, or indices between commas."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else text


def _moe_settings(named: dict[str, Any], entries: list[str] | None) -> MoESettings:
    """From the options that are given and those of --moe.

    Raises:
        ValueError: an entry that is not known or out of its range, or given twice.
    """
    free = parse_arguments(entries, "--moe", "inner_dim=256")
    if twice := sorted(named.keys() & free.keys()):
        raise ValueError(f"{twice[0]} is given both by an option of its own and by --moe; give one")
    return MoESettings.of({**named, **free})


def _sparse_network(base: Any, settings: MoESettings, method: str) -> Any:
    """With weights of its own, from those of `base` or anew."""
    if method not in MOE_METHODS:
        raise ValueError(f"--method must be one of {', '.join(MOE_METHODS)}, got {method!r}")
    if method != "scratch":
        return upcycle_to_moe(copy.deepcopy(base), settings, method)
    kind: Any = moe_class(base)
    config = {name: value for name, value in kind.own_config(base).items() if not name.startswith("_")}
    return kind(**config, moe_config=asdict(settings)).to(base.device)


def _built(network: Any) -> MoESettings:
    """The settings as a method completed them."""
    return next(iter(moe_layers(network).values())).settings


def null_label(network: Any) -> int:
    """The label that stands for no class."""
    found: int = getattr(network, "null_label", None) or network.config.num_embeds_ada_norm
    return found


def _own_objective(pipeline: Any, asked: str | None, **drawn: Any) -> LabelledObjective:
    """What the pipeline's network is trained on.

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
    """From all experts down to the capacity of the settings, if asked to or the network starts with all of them.

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
    """Append the routers' losses of this step, and the capacities of all layers in use, with the weights of this step
    and the thresholds that follow them, on a batch drawn for this, to a file.
    """
    batches = drawn_batches(drawn, 1, state.step, network.device)
    entry = {
        "step": state.step,
        "loss": state.loss,
        "router_losses": {path: float(loss) for path, loss in moe_losses(network).items()},
        "capacity": realised_capacity(network, batches, call=wrapped),
    }
    _append(path, entry)


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _dynamic_network(base: Any, settings: DynamicSettings, lora: TimedLoraSettings | None) -> Any:
    """With weights of its own; or around those of `base`, with a TD-LoRA."""
    if lora is None:
        return make_dynamic(copy.deepcopy(base), settings)
    network = make_dynamic(base, settings)
    add_timed_lora(network, lora)
    return network


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def known_data(name: str) -> str:
    """The name of an embedded data set; raises ValueError for another."""
    if name not in DATASETS:
        raise ValueError(f"--data must be one of {sorted(DATASETS)}, got {name!r}")
    return name


def deployment_times(pipeline: Any, recipe: str) -> tuple[float, ...]:
    """Times in SiT's convention (1 data) at which a recipe's sampler calls the network.

    Raises:
        ValueError: the recipe does not say how many steps.
    """
    chosen = open_recipe(recipe)
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
    _append(path, {"step": state.step, "loss": state.loss, **asdict(found)})


def training_data(
    pipe: str, pipeline: Any, data_set: str, kinds: tuple[Any, ...] = FLOW_PIPELINES
) -> tuple[ImageSet, Callable[[Any], Any]]:
    """What the parts of a pipeline of one of `kinds` are trained on, and how its networks are called for that.

    Raises:
        ValueError: images without what the pipeline is conditioned on, or that its network does not take.
        UnsupportedModelError: another pipeline.
    """
    if not isinstance(pipeline, kinds):
        *others, last = (f"a {kind.__name__}" for kind in kinds)
        listed = f"{', '.join(others)} or {last}" if others else last
        raise UnsupportedModelError(f"this trains parts of {listed}, got a {type(pipeline).__name__}")
    data = DATASETS[data_set]("generator")
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        if not isinstance(data, ImageSet):
            raise ValueError(f"--data {data_set} has captions, and a {type(pipeline).__name__} takes classes")
        _check_fit(data, data_set, pipeline.transformer)
        return data, lambda network: network
    if not isinstance(data, CaptionedSet):
        raise ValueError(f"--data {data_set} has no captions, and a {type(pipeline).__name__} takes prompts")
    called = zoo.entry(pipe).arguments if pipe.startswith(zoo.PREFIX) else {}
    default = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
    prompted = prompted_data(pipeline, data, called.get("max_sequence_length", default))
    return prompted.latents, prompted.wrap


def _check_fit(data: ImageSet, data_set: str, network: Any) -> None:
    """Raises ValueError unless a class-conditional network takes such images and classes."""
    size = network.config.sample_size
    wanted, found = (network.config.in_channels, size, size), tuple(data.images.shape[1:])
    if found != wanted:
        raise ValueError(
            f"--data {data_set} has images of shape {found}, and the network of this pipeline takes {wanted}"
        )
    if (classes := int(data.labels.max()) + 1) > null_label(network):
        raise ValueError(
            f"--data {data_set} has {classes} classes, and the network of this pipeline knows {null_label(network)}"
        )
