"""`flowaccel calibrate`: a cache or a step grid fitted to the user's own pipeline, prompts and number of steps."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flowaccel.caching.feature_cache import FeatureCache
from flowaccel.caching.fit.calibrate import calibrate as run_calibration
from flowaccel.caching.fit.calibrate import find_method
from flowaccel.caching.predictors import PREDICTORS
from flowaccel.cli.common import (
    ArgumentOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    emit,
    friendly_errors,
    output_folder,
    progress,
    say,
)
from flowaccel.cli.generate import call_arguments, parse_conditions
from flowaccel.cli.loading import PromptsOption, open_pipeline, resolve_device
from flowaccel.hooks import Pipeline
from flowaccel.methods.grids.fit import calibrate_grid
from flowaccel.methods.grids.search import GRID_METHODS, METRICS
from flowaccel.recipe import Recipe, registry, resolve
from flowaccel.recipe.calibration import Calibration, GridCalibration
from flowaccel.recipe.sampler import Sampler
from flowaccel.training.sampling import Sampling

FINE_STEPS = 60
CACHE_METHODS = [name for name in registry.entries("fit") if name not in GRID_METHODS]
_CACHES_ALONE = ("target_speedup", "predictor", "warmup", "last", "max_run")
_GRIDS_ALONE = ("fine_steps", "held_out", "metric")


def calibrate(
    pipe: PipeArgument,
    method: Annotated[
        str,
        typer.Option(help=f"Of a cache: {', '.join(CACHE_METHODS)}; of a step grid: {', '.join(GRID_METHODS)}."),
    ],
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="Caches, needed: network calls over computed network calls, above 1; seconds follow less than fully."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="What lies under the cache or grid, such as heun: a preset, a file or a folder.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class ids, separated by commas; ranges such as 0-9.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: PromptsOption = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Images or videos; default one per class or prompt.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Caches: steps of the run, at least 3; default the recipe's or pipeline's. Grids, needed: steps of "
            "the grid, at least 1."
        ),
    ] = None,
    fine_steps: Annotated[
        int | None, typer.Option(help=f"Grids: steps of the run that they are searched in; default {FINE_STEPS}.")
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Grids: how many more images the grid is measured on, with other seeds, and the prompts or classes "
            "that follow; default as many as it was searched on.",
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help=f"Grids: what the search compares, {' or '.join(METRICS)}; default state.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video; default the pipeline's.")] = None,
    argument: ArgumentOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or videos per call.")] = 8,
    predictor: Annotated[
        str | None, typer.Option(help=f"Caches: what stands in: {', '.join(PREDICTORS)}; default the method's.")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Caches: first steps, always computed; below 1 a part of the run. Default the method's."),
    ] = None,
    last: Annotated[int | None, typer.Option(help="Caches: last steps, always computed; default the method's.")] = None,
    max_run: Annotated[
        int | None, typer.Option(help="Caches: most steps reused in a row; default the method's.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Folder for the recipe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a cache, or search a step grid, for your own prompts, write it as a recipe, and say what it costs.

    A cache is aimed at a speed-up (--target-speedup) for a run of --steps; a grid has --steps of its own.

    Example: flowaccel calibrate zoo:sit-digits --method teacache --target-speedup 1.8 --steps 25 --out my-cache

    Example: flowaccel calibrate zoo:sit-digits --method oss --recipe euler --steps 8 --out my-grid
    """
    with friendly_errors():
        given: dict[str, Any] = {
            name: value
            for name, value in (
                ("target_speedup", target_speedup),
                ("predictor", predictor),
                ("warmup", warmup),
                ("last", last),
                ("max_run", max_run),
                ("fine_steps", fine_steps),
                ("held_out", held_out),
                ("metric", metric),
            )
            if value is not None
        }
        _check_kind(method, steps, given)
        pipeline = open_pipeline(pipe, resolve_device(device), dtype)
        pipeline.set_progress_bar_config(disable=True)
        base = Recipe() if recipe is None else resolve(recipe)
        conditions = parse_conditions(pipeline, classes, prompt, prompts)
        sampling = Sampling(
            conditions=conditions,
            steps=given.get("fine_steps", FINE_STEPS) if method in GRID_METHODS else _steps(pipeline, base, steps),
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
        model = pipe if pipe.startswith("zoo:") else Path(pipe).name
        with progress() as notify:
            common: dict[str, Any] = {"base": base, "model": model, "notify": notify}
            if method in GRID_METHODS:
                options = {name: given[name] for name in ("held_out", "metric") if name in given}
                found = calibrate_grid(pipeline, method, steps or 0, sampling, **options, **common)
            else:
                found = run_calibration(
                    pipeline, method, given["target_speedup"], sampling, **_parts(method, given), **common
                )
        folder = output_folder(out, "calibrate")
        found.save_pretrained(folder)
        fitted = found.accelerators[-1]
        assert isinstance(fitted, (FeatureCache, Sampler)) and fitted.calibration is not None
        calibration = fitted.calibration
        result = {"out": str(folder), "recipe": found.to_dict(), "calibration": asdict(calibration)}
        emit(result, as_json, lambda: _say(fitted, folder))


def _check_kind(method: str, steps: int | None, given: dict[str, Any]) -> None:
    """Refuse the options of a cache for a grid, those of a grid for a cache, and what is missing."""
    grid = method in GRID_METHODS
    if not grid:
        find_method(method)
    kind, missing = ("a step grid", "--steps") if grid else ("a cache", "--target-speedup")
    for name in _CACHES_ALONE if grid else _GRIDS_ALONE:
        if name in given:
            raise ValueError(
                f"--{name.replace('_', '-')} is not for --method {method}, which makes {kind}; leave it out"
                + (" (a grid is aimed at by --steps)" if name == "target_speedup" else "")
            )
    if (steps if grid else given.get("target_speedup")) is None:
        raise ValueError(f"--method {method} makes {kind} and needs {missing}")
    if given.get("predictor") not in (None, *PREDICTORS):
        raise ValueError(f"--predictor must be one of {', '.join(PREDICTORS)}, got {given['predictor']!r}")


def _parts(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the guard and the predictor of a cache."""
    bounds = {name: given[name] for name in ("warmup", "last", "max_run") if name in given}
    return {
        "guard": replace(find_method(method).guard, **bounds),
        "predictor": PREDICTORS[given["predictor"]]() if "predictor" in given else None,
    }


def _steps(pipeline: Pipeline, base: Recipe, given: int | None) -> int:
    if given is not None:
        return given
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    found = base.num_inference_steps or (None if parameter is None else parameter.default)
    if not isinstance(found, int):
        raise ValueError(f"{type(pipeline).__name__} has no default number of steps; give --steps")
    return found


def _say(fitted: FeatureCache | Sampler, folder: Path) -> None:
    assert fitted.calibration is not None
    if isinstance(fitted, FeatureCache):
        _say_cache(fitted.calibration, fitted)
    else:
        _say_grid(fitted.calibration, fitted.options["grid"])
    say(f"wrote the recipe to {folder}; use it with --recipe {folder}, and see what it costs with `flowaccel evaluate`")


def _say_grid(calibration: GridCalibration, grid: list[float]) -> None:
    say(f"grid: {', '.join(f'{level:.4g}' for level in grid)}")
    images = f"mean of {calibration.held_out} held-out images"
    say(f"relative L2 error against {calibration.fine_steps} steps, {images}:")
    say(f"  searched grid of {calibration.steps} steps: {calibration.rel_l2:.4g}")
    say(f"  the pipeline's own {calibration.steps} steps: {calibration.default_rel_l2:.4g}")
    low, high = calibration.difference_ci95 or (-math.inf, math.inf)
    interval = f"difference {low:+.4g} to {high:+.4g}, 95% interval" if calibration.difference_ci95 else "one image"
    if high < 0:
        say(f"the searched grid is better ({interval})")
    elif low > 0:
        say(f"the searched grid is WORSE than the pipeline's own ({interval}); do not use it")
    else:
        say(f"the searched grid is not shown to be better than the pipeline's own ({interval})")


def _say_cache(calibration: Calibration, cache: FeatureCache) -> None:
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
