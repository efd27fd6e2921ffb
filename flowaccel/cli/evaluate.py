"""`flowaccel evaluate`: quality against measured seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from flowaccel.cli.common import (
    ArgumentOption,
    DeviceOption,
    DtypeOption,
    ExpectWorldOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    ask_again,
    emit,
    friendly_errors,
    output_folder,
    progress,
    say,
)
from flowaccel.cli.generate import free_arguments, parse_conditions
from flowaccel.cli.loading import PromptsOption, launched, open_pipeline, own_modules, saved_with, zoo_entry
from flowaccel.errors import UnnamedCodeError
from flowaccel.evaluation import DEFAULT_METRICS, Protocol, Results, console_table, set_attention
from flowaccel.evaluation import evaluate as run_evaluation
from flowaccel.evaluation.features.extractors import runs_code
from flowaccel.hooks import Pipeline
from flowaccel.recipe import resolve


def evaluate(
    context: typer.Context,
    pipe: PipeArgument,
    config: Annotated[Path | None, typer.Option(help="YAML file with these options; the command line wins.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="To compare; may be given several times; default: the one saved with PIPE.")
    ] = None,
    baseline_steps: Annotated[
        str, typer.Option(help="Fewer steps of the untouched pipeline, such as 10,20; default a quarter and a half.")
    ] = "",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Another library's accelerator: native:fbc, native:taylorseer, native:mag or cache-dit; may be given "
            "several times.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the untouched pipeline.")] = 50,
    num_samples: Annotated[int, typer.Option(min=2, help="Images per row.")] = 2000,
    classes: Annotated[str | None, typer.Option(help="Class ids, such as 0-9; default all.")] = None,
    prompts: PromptsOption = None,
    reference: Annotated[
        str | None, typer.Option(help="zoo:SET, a folder of images, or statistics as .safetensors or .npz.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="inception, clip or dinov2, alone or with :PATH; zoo:NAME; MODULE:ATTRIBUTE.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP of clip_score: clip or clip:PATH; default --features.")] = None,
    attributes: Annotated[
        str | None, typer.Option(metavar="zoo:SET", help="What reads for attribute_accuracy what prompts state.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help=f"Separated by commas; default the zoo's for PIPE, else {','.join(DEFAULT_METRICS)}."),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the zoo's for PIPE or the pipeline's.")] = None,
    argument: ArgumentOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call when sampling.")] = 100,
    latency_batch: Annotated[int, typer.Option(min=1, help="Images per timed call.")] = 25,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds of two calls per row.")] = 10,
    attention: Annotated[str | None, typer.Option(help="sdpa, xformers or flash.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Run folder; a started one is resumed.")] = None,
    expect_world: ExpectWorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure recipes against the untouched pipeline and against the same pipeline with fewer steps.

    Example: flowaccel evaluate zoo:sit-digits --recipe flowturbo-H2P4R2 --baseline-steps 5,8 --num-samples 500 --out
        runs/try

    Several processes share the sampling: torchrun --nproc-per-node 4 -m flowaccel evaluate ... --expect-world 4
    """
    if config is not None:
        with friendly_errors():
            merged = _merged(context, config)
        context.invoke(evaluate, **merged)
        return
    hint = " What was made so far is kept; the same command goes on from there."
    with friendly_errors(hint), own_modules(features, clip), launched(device, expect_world) as own_device:
        pipeline = open_pipeline(pipe, own_device, dtype)
        if attention is not None:
            set_attention(pipeline, attention)
        protocol = default_protocol(
            pipe,
            pipeline,
            classes=classes,
            prompts=prompts,
            argument=argument,
            metrics=None if metrics is None else tuple(name.strip() for name in metrics.split(",") if name.strip()),
            features=features,
            reference=reference,
            clip=clip,
            attributes=attributes,
            guidance_scale=guidance_scale,
            steps=steps,
            baselines=tuple(baseline or ()),
            baseline_steps=_numbers("--baseline-steps", baseline_steps) or fewer_steps(steps),
            num_samples=num_samples,
            seed=seed,
            batch_size=batch_size,
            rounds=rounds,
            latency_batch=latency_batch,
        )
        if num_samples < len(protocol.conditions):
            say(f"only the first {num_samples} of {len(protocol.conditions)} prompts or classes are sampled for")
        folder = output_folder(out, "evaluate")
        saved = None if recipe else saved_with(pipe)
        recipes = [resolve(name) for name in recipe or ()] + ([saved] if saved else [])
        with progress() as notify:
            results = run_evaluation(pipeline, recipes, protocol, folder, notify)
        emit(results, as_json, lambda: show(results, folder))


def default_protocol(
    pipe: str,
    pipeline: Pipeline,
    *,
    classes: str | None = None,
    prompts: str | None = None,
    argument: list[str] | None = None,
    **given: Any,
) -> Protocol:
    """Create a protocol from the options that are given, with the zoo's defaults for PIPE.

    Raises:
        ValueError: something is wrong, or has no default and is missing.
    """
    known = zoo_entry(pipe)
    conditions = parse_conditions(pipeline, classes, None, prompts or getattr(known, "prompts", None))
    settings = {name: value for name, value in given.items() if value is not None}
    for name in ("features", "reference", "clip", "attributes", "metrics", "guidance_scale"):
        settings.setdefault(name, getattr(known, name, None))
    if settings["metrics"] is None:
        settings["metrics"] = DEFAULT_METRICS
    for name in ("features", "reference"):
        if not settings[name]:
            raise ValueError(f"this pipeline has no default for --{name}; give one (see --help)")
    return Protocol(conditions=conditions, arguments=free_arguments(pipeline, pipe, argument), **settings)


def show(results: Results, folder: Path) -> None:
    """Print the table, and the location of the other results."""
    Console().print(console_table(results))
    files = [name for name in ("results.json", "pareto.png", "samples.png", "report.html") if (folder / name).exists()]
    say(f"{' and '.join(filter(None, [', '.join(files[:-1]), files[-1]]))} are in {folder}")


def fewer_steps(steps: int) -> tuple[int, ...]:
    """Return the step counts of the baselines that every evaluation has: a quarter and a half of `steps`."""
    return tuple(sorted({max(1, steps // 4), max(1, steps // 2)} - {steps}))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{option} must be step counts separated by commas, such as 10,20, got {text!r}")
    return tuple(int(part) for part in parts)


def _merged(context: typer.Context, config: Path) -> dict[str, Any]:
    """Return the options of the YAML file, overridden by those typed on the command line."""
    try:
        loaded = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{config} must map option names to values, such as `num_samples: 2000`")
    given = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    unknown = sorted(set(given) - set(context.params) | ({"config"} & set(given)))
    if unknown:
        allowed = sorted(set(context.params) - {"config", "context", "as_json"})
        raise ValueError(f"{config} has unknown options {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    for option in ("features", "clip"):
        if option in given and runs_code(str(given[option])) and context.params[option] is None:
            raise ask_again(context, UnnamedCodeError(str(config), option, str(given[option])))
    typed = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    options = {option.name: option for option in context.command.params}
    values = {
        name: options[name].process_value(context, _as_typed(value, getattr(options[name], "multiple", False)))
        for name, value in given.items()
        if name not in typed and value is not None
    }
    merged = {**context.params, **values, "config": None, "context": context}
    return merged | {"out": None if merged["out"] is None else Path(merged["out"])}


def _as_typed(value: Any, several: bool) -> Any:
    """Return a YAML value as it would stand on the command line, so that it is checked in the same way."""
    if isinstance(value, dict):
        parts = [f"{name}={json.dumps(one)}" for name, one in value.items()]
    else:
        parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return parts if several else ",".join(parts)
