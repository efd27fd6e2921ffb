"""`flowaccel train mediators`."""

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
    emit,
    friendly_errors,
    say,
    whole_numbers,
)
from flowaccel.cli.common import progress as progress_bar
from flowaccel.cli.loading import open_pipeline
from flowaccel.methods.mediators.accelerator import Mediators
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.mediators.settings import MediatorSettings
from flowaccel.methods.mediators.train import MediatorObjective
from flowaccel.pipelines import SiTPipeline
from flowaccel.recipe import Recipe
from flowaccel.training.embedded import known_data, training_data
from flowaccel.training.flow import FlowObjective
from flowaccel.training.loop import LoopConfig
from flowaccel.training.loop import train as run_training

METHODS = ("retrofit", "scratch")
FEATURE_WEIGHT = 0.5


def mediators(
    pipe: PipeArgument,
    out: Annotated[Path, typer.Option(help="Folder for the recipe with the network; a started one is resumed.")],
    counts: Annotated[
        str, typer.Option(help="Numbers of mediators that the network can run with, squares, such as 4,16,64.")
    ] = "4,16",
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer", help="--counts holds one number for each layer with mediators, in the order of the blocks."
        ),
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Blocks whose attention goes through them, such as 0,1,2,3; default all.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="retrofit: from the pipeline's softmax network, drawn to what its blocks return; scratch: all weights "
            "start anew."
        ),
    ] = "retrofit",
    feature_weight: Annotated[
        float | None, typer.Option(help="With retrofit: weight of the distance to the blocks' outputs; default 0.5.")
    ] = None,
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="Learn position biases.")] = True,
    dwc: Annotated[bool, typer.Option("--dwc/--no-dwc", help="Add a depthwise convolution of the values.")] = True,
    data: Annotated[str, typer.Option(help="Embedded data set.")] = "digits",
    steps: Annotated[int, typer.Option(min=1)] = 20_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Shared out among the numbers of mediators.")] = 256,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    label_drop: Annotated[float, typer.Option(help="Share of rows trained on the null label.")] = 0.1,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is saved.")] = 0.999,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    save_every: Annotated[int, typer.Option(min=1)] = 500,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train attention through mediators (Attention Mediators, arXiv 2408.05710) for a SiTPipeline.

    One network serves all numbers of mediators, where the paper trains one for each; or, with --per-layer, every layer
    has a number of its own. Writes a recipe (--recipe OUT).

    Example: flowaccel train mediators zoo:sit-digits --out mediated --counts 4,16 --steps 2000 --batch-size 64
    --learning-rate 5e-4
    """
    with friendly_errors(" The last checkpoint is kept; the same command goes on from there."):
        settings = MediatorSettings(
            counts=whole_numbers("--counts", counts),
            per_layer=per_layer,
            layers=None if layers is None else whole_numbers("--layers", layers),
            use_bias=bias,
            use_dwc=dwc,
        )
        weight = _feature_weight(method, feature_weight)
        pipeline = open_pipeline(pipe, device)
        images, _ = training_data(pipe, pipeline, known_data(data), (SiTPipeline,))
        base = pipeline.transformer.eval()
        torch.manual_seed(seed)
        network = _mediated_network(base, settings, method)
        flow = FlowObjective(data=images, null_label=network.null_label, batch_size=batch_size, label_drop=label_drop)
        objective = MediatorObjective(
            objective=flow,
            counts=None if per_layer else settings.counts,
            teacher=base.requires_grad_(False) if weight else None,
            feature_weight=weight,
        )
        loop = LoopConfig(
            steps=steps,
            learning_rate=learning_rate,
            ema_decay=ema_decay,
            precision=precision,
            save_every=save_every,
            seed=seed,
        )
        built = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
        loss = None
        with progress_bar() as notify:
            for state in run_training(network, objective, loop, out / "training", {**built, "method": method}):
                loss = state.loss
                notify("steps", state.step, steps)
        network.requires_grad_(False)
        Recipe([Mediators(network)], name=out.name).for_pipeline(pipeline).save_pretrained(out)
        emit(
            {"out": str(out), "steps": steps, "loss": loss, "counts": built["counts"]},
            as_json,
            lambda: say(f"wrote the recipe to {out}; loss {loss}"),
        )


def _feature_weight(method: str, given: float | None) -> float:
    """Return the weight of the feature loss.

    Raises ValueError for an unknown method, or for a weight without features to compare with.
    """
    if method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "scratch":
        if given is not None:
            raise ValueError(
                f"--feature-weight is for --method retrofit, which has a teacher, got {given}; leave it out"
            )
        return 0.0
    return FEATURE_WEIGHT if given is None else given


def _mediated_network(base: Any, settings: MediatorSettings, method: str) -> Any:
    """Return a network with weights of its own, copied from `base` or new."""
    if method == "retrofit":
        network: Any = MediatorSiTTransformer2DModel.from_base(copy.deepcopy(base), settings)
    else:
        config = MediatorSiTTransformer2DModel.own_config(base)
        own = {name: value for name, value in config.items() if not name.startswith("_")}
        network = MediatorSiTTransformer2DModel(**own, mediator_config=asdict(settings)).to(base.device)
    network.requires_grad_(True)
    network.pos_embed.requires_grad_(False).copy_(base.pos_embed)
    return network
