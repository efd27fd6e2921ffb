"""`flowaccel calibrate`: a cache fitted to the user's own pipeline, prompts and number of steps."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flowaccel.accelerators import Calibration, FeatureCache
from flowaccel.calibration import METHODS, Sampling, find_method
from flowaccel.calibration import calibrate as run_calibration
from flowaccel.cli.common import (
    ArgumentOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PipeArgument,
    PromptsOption,
    SeedOption,
    emit,
    friendly_errors,
    open_pipeline,
    open_recipe,
    output_folder,
    progress,
    resolve_device,
    say,
)
from flowaccel.cli.generate import call_arguments, parse_conditions
from flowaccel.predictors import PREDICTORS
from flowaccel.recipe import Recipe


def calibrate(
    pipe: PipeArgument,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")],
    target_speedup: Annotated[
        float, typer.Option(help="Network calls over computed network calls, above 1; seconds follow less than fully.")
    ],
    recipe: Annotated[
        str | None, typer.Option(help="What the cache is put on top of, such as heun: a preset, a file or a folder.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class ids, separated by commas; ranges such as 0-9.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: PromptsOption = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Images or videos; default one per class or prompt.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, at least 3; default the recipe's or pipeline's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video; default the pipeline's.")] = None,
    argument: ArgumentOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or videos per call.")] = 8,
    predictor: Annotated[
        str | None, typer.Option(help=f"What stands in: {', '.join(PREDICTORS)}; default the method's.")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="First steps, always computed; below 1 a part of the run. Default the method's."),
    ] = None,
    last: Annotated[int | None, typer.Option(help="Last steps, always computed; default the method's.")] = None,
    max_run: Annotated[int | None, typer.Option(help="Most steps reused in a row; default the method's.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Folder for the recipe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a cache to your own prompts, steps and target, write it as a recipe, and say what it saves and what it costs.

    Example: flowaccel calibrate zoo:sit-digits --method teacache --target-speedup 1.8 --steps 25 --out my-cache
    """
    with friendly_errors():
        chosen = find_method(method)
        if predictor is not None and predictor not in PREDICTORS:
            raise ValueError(f"--predictor must be one of {', '.join(PREDICTORS)}, got {predictor!r}")
        pipeline = open_pipeline(pipe, resolve_device(device), dtype)
        pipeline.set_progress_bar_config(disable=True)
        base = Recipe() if recipe is None else open_recipe(recipe)
        conditions = parse_conditions(pipeline, classes, prompt, prompts)
        sampling = Sampling(
            conditions=conditions,
            steps=_steps(pipeline, base, steps),
            num_samples=num_samples or len(conditions),
            seed=seed,
            batch_size=batch_size,
            arguments=call_arguments(
                pipeline,
                pipe,
                argument,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                num_frames=num_frames,
            ),
        )
        given: dict[str, Any] = {"warmup": warmup, "last": last, "max_run": max_run}
        with progress() as notify:
            found = run_calibration(
                pipeline,
                method,
                target_speedup,
                sampling,
                base=base,
                guard=replace(chosen.guard, **{name: value for name, value in given.items() if value is not None}),
                predictor=None if predictor is None else PREDICTORS[predictor](),
                model=pipe if pipe.startswith("zoo:") else Path(pipe).name,
                notify=notify,
            )
        folder = output_folder(out, "calibrate")
        found.save_pretrained(folder)
        cache = found.accelerators[-1]
        assert isinstance(cache, FeatureCache) and cache.calibration is not None
        calibration = cache.calibration
        result = {"out": str(folder), "recipe": found.to_dict(), "calibration": asdict(calibration)}
        emit(result, as_json, lambda: _say(calibration, cache, folder))


def _steps(pipeline: Any, base: Recipe, given: int | None) -> int:
    if given is not None:
        return given
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    found = base.num_inference_steps or (None if parameter is None else parameter.default)
    if not isinstance(found, int):
        raise ValueError(f"{type(pipeline).__name__} has no default number of steps; give --steps")
    return found


def _say(calibration: Calibration, cache: FeatureCache, folder: Path) -> None:
    steps = calibration.steps
    if calibration.r_squared is not None:
        say(f"fit: R^2 {calibration.r_squared:.3f}")
    if calibration.fitted_range is not None:
        low, high = calibration.fitted_range
        say(f"signal seen: {low:.4g} to {high:.4g}")
    threshold = getattr(cache.gate, "threshold", None)
    if threshold is not None:
        say(f"threshold: {threshold:.4g}")
    for word, speedup in (("predicted", calibration.predicted_speedup), ("measured", calibration.measured_speedup)):
        assert speedup is not None
        say(
            f"{word}: {steps / speedup:.1f} of {steps} evaluations computed per image ({1 / speedup:.0%}), "
            f"{speedup:.2f} times fewer"
        )
    say(f"relative L2 error against the untouched images: {calibration.rel_l2:.4g} (mean of {calibration.images})")
    say(f"wrote the recipe to {folder}; use it with --recipe {folder}, and see what it costs with `flowaccel evaluate`")
