"""`flowaccel plan`: the heads and channels that a pipeline's dynamic network computes at each step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from flowaccel.cli.common import (
    ArgumentOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    console,
    emit,
    friendly_errors,
    progress,
    say,
)
from flowaccel.cli.generate import call_arguments, parse_conditions
from flowaccel.cli.loading import PromptsOption, open_pipeline, saved_with
from flowaccel.evaluation import sample_generator
from flowaccel.hooks import Pipeline, session_of
from flowaccel.methods.dynamic_width.accelerator import DynamicWidth
from flowaccel.methods.dynamic_width.gathering import TokenCounts, choose_gather, fit_capacities, watched_tokens
from flowaccel.methods.dynamic_width.plan import WidthPlan
from flowaccel.recipe import Recipe, accelerated, resolve

SHADES = " ▁▂▃▄▅▆▇█"


def plan(
    pipe: PipeArgument,
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe with dynamic width: a file or a folder; default the one saved with PIPE."),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="A class id for the run that shows the steps.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt for that run.")] = None,
    prompts: PromptsOption = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default the recipe's or the pipeline's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    argument: ArgumentOption = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Images of that run; with token routers, what they keep is counted on these.")
    ] = 1,
    capacities: Annotated[
        bool,
        typer.Option(
            "--capacities", help="Fix how many tokens every layer computes, enough for what was counted: no waiting."
        ),
    ] = False,
    buckets: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many different widths, by unions of neighbours; for compiled networks."),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the recipe with the plan in it, and plan.png; default: only print.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which share of its heads and channels every layer computes at every step, and write it into the recipe.

    Images are made, because only a run tells at which times a pipeline calls its network. A recipe that holds a plan
    refuses other samplers and numbers of steps; one without makes its plans itself. Where tokens are left out, it is
    measured for every layer whether gathering the others pays on this device.

    Example: flowaccel plan zoo:sit-digits --recipe narrow --steps 4 --out narrow-4
    """
    with friendly_errors():
        pipeline = open_pipeline(pipe, device, dtype)
        chosen = saved_with(pipe) if recipe is None else resolve(recipe)
        chosen = _without_plan(chosen or Recipe(), buckets).loaded(pipeline)
        conditions = parse_conditions(pipeline, classes, prompt, prompts)
        arguments = call_arguments(pipeline, pipe, argument, guidance_scale=guidance_scale, height=height, width=width)
        count = steps or chosen.num_inference_steps
        if count is not None:
            arguments["num_inference_steps"] = count
        pipeline.set_progress_bar_config(disable=True)
        with progress() as notify, accelerated(pipeline, chosen):
            network = pipeline.transformer
            with watched_tokens(network) as seen:
                generators = [sample_generator(seed, sample_id) for sample_id in range(num_samples)]
                pipeline(**conditions.arguments(range(num_samples)), **arguments, generator=generators)
            found, weights = network.dynamic.plan, network.dynamic.gate_weights
            tokens = _tokens(pipeline, seen, capacities)
            notify("run", 1, 1)
        if out is not None:
            _with_plan(chosen, found, count, tokens).save_pretrained(out)
            draw(found, out / "plan.png")
        emit(_data(found, weights, tokens, out), as_json, lambda: _show(found, weights, tokens, out))


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token statistics of a network's layers, by path; empty where no layer leaves out tokens."""

    kept: dict[str, float]
    """Share of the tokens, on average."""
    relative_time: dict[str, float]
    """Time of gathering those, relative to computing all and clearing the rest."""
    gather: dict[str, bool]
    capacities: dict[str, float] | None


def _tokens(pipeline: Pipeline, seen: TokenCounts, fitted: bool) -> Tokens:
    """Measure the token statistics on the pipeline's device, for batches like the one that was made.

    Raises:
        ValueError: capacities are asked for, and nothing leaves out tokens.
    """
    network, run = pipeline.transformer, session_of(pipeline).run
    if run is None or not seen.paths:
        if fitted:
            raise ValueError("--capacities is for networks that leave out tokens, trained with --tokens")
        return Tokens(kept={}, relative_time={}, gather={}, capacities=None)
    kept = {path: seen.share(path) for path in seen.paths}
    capacities = None
    if fitted:
        capacities = {path: count / seen.tokens[path] for path, count in fit_capacities(network, seen).items()}
    _, shapes, rows = next(iter(run.shapes.values()))
    text = shapes.get("encoder_hidden_states")
    times = choose_gather(
        network,
        rows=rows,
        tokens=seen.tokens[seen.paths[0]],
        kept=kept,
        text_tokens=0 if text is None else text.shape[1],
    )
    gather = {site.path: site.module.gather for site in network.dynamic.sites}
    return Tokens(kept=kept, relative_time=times, gather=gather, capacities=capacities)


def _without_plan(recipe: Recipe, buckets: int | None) -> Recipe:
    """Return the recipe without its width plan, ready for a new one.

    Raises:
        ValueError: nothing in it has a width.
    """
    without: dict[str, Any] = {"plan": None, "gather": None, "capacities": None}
    parts = [
        replace(part, **without, buckets=buckets or part.buckets) if isinstance(part, DynamicWidth) else part
        for part in recipe.accelerators
    ]
    if not any(isinstance(part, DynamicWidth) for part in parts):
        raise ValueError(
            f"recipe {recipe.name!r} has no dynamic width; train one with `flowaccel train width` and give it with "
            "--recipe"
        )
    return replace(recipe, accelerators=parts)


def _with_plan(recipe: Recipe, found: WidthPlan, steps: int | None, tokens: Tokens) -> Recipe:
    chosen: dict[str, Any] = {
        "plan": found,
        "buckets": None,
        "gather": tokens.gather or None,
        "capacities": tokens.capacities,
    }
    parts = [replace(part, **chosen) if isinstance(part, DynamicWidth) else part for part in recipe.accelerators]
    return replace(recipe, accelerators=parts, num_inference_steps=steps)


def _data(found: WidthPlan, weights: list[int], tokens: Tokens, out: Path | None) -> dict[str, Any]:
    return {
        "out": None if out is None else str(out),
        "scheduler": found.scheduler,
        "timesteps": list(found.timesteps),
        "gates": list(found.gates),
        "shares": found.shares.tolist(),
        "ratios": found.ratios(weights).tolist(),
        "different_widths": found.buckets,
        "tokens": asdict(tokens),
    }


def _show(found: WidthPlan, weights: list[int], tokens: Tokens, out: Path | None) -> None:
    ratios = found.ratios(weights)
    table = Table(box=None, pad_edge=False, title=f"share that is on, {found.scheduler}, first step left")
    table.add_column("gate")
    table.add_column("steps")
    table.add_column("mean", justify="right")
    for name, shares in zip(found.gates, found.shares.T, strict=True):
        table.add_row(name, "".join(_shade(share) for share in shares.tolist()), f"{shares.mean():.0%}")
    table.add_row("all weights", "".join(_shade(share) for share in ratios.tolist()), f"{ratios.mean():.0%}")
    console.print(table)
    say(f"{found.buckets} different widths at {len(found.timesteps)} evaluations")
    if tokens.kept:
        times = sorted(tokens.relative_time.values())
        say(
            f"tokens kept: {sum(tokens.kept.values()) / len(tokens.kept):.0%}; gathering them pays in "
            f"{sum(tokens.gather.values())} of {len(tokens.gather)} layers here, where it takes {times[0]:.2f} to "
            f"{times[-1]:.2f} of the time of computing all"
        )
    if out is not None:
        say(f"wrote the recipe and plan.png to {out}; use it with --recipe {out}")


def _shade(share: float) -> str:
    return SHADES[round(share * (len(SHADES) - 1))]


def draw(found: WidthPlan, path: Path) -> None:
    """Draw the plan as a heat map, heads and channels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of import that the table does not need
    from matplotlib.figure import Figure

    kinds = sorted({name.rsplit(".", 1)[1] for name in found.gates})
    figure = Figure(figsize=(4.2 * len(kinds), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, kind in enumerate(kinds):
        rows = [index for index, name in enumerate(found.gates) if name.endswith(f".{kind}")]
        axes = figure.add_subplot(1, len(kinds), place + 1)
        shares: Tensor = found.shares[:, torch.tensor(rows)].T
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set(title=kind, xlabel="evaluation (noise to image)", ylabel="block")
        figure.colorbar(image, ax=axes, label="share on" if place == len(kinds) - 1 else None)
    figure.savefig(path, dpi=120)
