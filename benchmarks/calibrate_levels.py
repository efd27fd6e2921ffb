"""Rebuild `flowaccel/caching/calibrated.json`, the caches behind the presets `safe`, `balanced` and `fast`.

For each model of the zoo, sampler and number of evaluations, and for each level, every method is calibrated to the
level's speed-up. Of those that reach it in a run, the one with the least relative L2 error against the untouched images
is shipped; the errors of all are recorded beside it. The thresholds that EasyCache needs are printed: those of the
generic cache are chosen by them.

    python benchmarks/calibrate_levels.py --record
    python benchmarks/calibrate_levels.py --record --models zoo:t2i-shapes   # the entries of other models stay
    python benchmarks/calibrate_levels.py --generic --record   # what the generic cache does, and fewer steps instead
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowaccel import FeatureCache, Recipe, Sampler, __version__, accelerated, zoo
from flowaccel.caching.fit.calibrate import Observation, find_method, fitted, observe_methods, verified
from flowaccel.caching.level_cache import CALIBRATED, GENERIC, LEVELS
from flowaccel.caching.predictors import Hold, Newton, Predictor
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.evaluation import Classes, Prompts, environment
from flowaccel.evaluation.metrics.pixel_metrics import rel_l2
from flowaccel.pipelines import load_pipeline
from flowaccel.training.sampling import Sampling

METHODS = {name: find_method(name) for name, preset in CACHE_PRESETS.items() if preset.fit}

DIGITS, SHAPES = "zoo:sit-digits", "zoo:t2i-shapes"
OWN = "own"  # the pipeline's own sampler
RUNS = {
    DIGITS: (("euler", 20), ("euler", 30), ("euler", 50), ("heun", 10), ("heun", 25)),  # Heun evaluates twice a step
    SHAPES: ((OWN, 28),),
}
IMAGES = 20
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.98  # of the speed-up aimed at: reuse changes what follows, and with it the decisions
PREDICTORS: dict[str, Predictor] = {"hold": Hold(), "newton": Newton(order=1)}


def main() -> None:
    """Print what was found, and with --record write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generic", action="store_true", help="measure the generic cache and fewer steps instead")
    parser.add_argument("--models", nargs="+", choices=RUNS, default=[DIGITS], help="which to calibrate")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for model, sampler, steps in ((name, *run) for name in arguments.models for run in RUNS[name]):
        pipe = load_pipeline(zoo.folder(model))
        pipe.set_progress_bar_config(disable=True)
        base = Recipe() if sampler == OWN else Recipe([Sampler(sampler)])
        sampling = sampling_of(model, steps)
        observation = observe_methods(pipe, sampling, list(METHODS.values()), base=base, model=model)
        for level, target in LEVELS.items():
            if arguments.generic:
                found = generic(pipe, observation, sampling, base, level)
                rows.append({"model": model, "run": f"{sampler} {steps}", "level": level, **found})
                print(rows[-1], flush=True)
            else:
                tried = candidates(pipe, observation, sampling, base, target)
                rows.append(entry(level, target, tried))
                report(f"{sampler} {steps}", level, tried)
    if not arguments.record:
        return
    protocol = {"images": IMAGES, "seed": 0}
    if arguments.generic:
        for name in arguments.models:
            found = [row for row in rows if row["model"] == name]
            about = {"protocol": {"model": name, **protocol}, "environment": environment("cpu"), "rows": found}
            write(RESULTS / f"generic_cache_{name.removeprefix(zoo.PREFIX)}_cpu.json", about)
    else:
        made = {"made_by": "benchmarks/calibrate_levels.py", "flowaccel": __version__}
        kept = [row for row in json.loads(CALIBRATED.read_text())["entries"] if model_of(row) not in arguments.models]
        write(CALIBRATED, {"schema": 1, **made, "protocol": protocol, "entries": kept + rows})


def sampling_of(model: str, steps: int) -> Sampling:
    """The runs: classes in turn, or the first prompts, called as the zoo has it."""
    about = zoo.entry(model)
    arguments = dict(about.arguments)
    if about.guidance_scale is not None:
        arguments["guidance_scale"] = about.guidance_scale
    conditions = Classes(tuple(range(10))) if about.prompts is None else Prompts.from_zoo(about.prompts)
    return Sampling(conditions=conditions, steps=steps, num_samples=IMAGES, batch_size=IMAGES, arguments=arguments)


def model_of(row: dict[str, Any]) -> str:
    """The model that an entry of the file was calibrated on."""
    return str(row["recipe"]["accelerators"][0]["calibration"]["model"])


def write(path: Path, data: dict[str, Any]) -> None:
    """As JSON."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def candidates(
    pipe: Any, observation: Observation, sampling: Sampling, base: Recipe, target: float
) -> dict[str, FeatureCache]:
    """Every method that can reach the target, calibrated and measured."""
    found = {}
    for method in METHODS.values():
        for name, predictor in PREDICTORS.items():
            if method.fit is None and isinstance(predictor, Hold):
                continue
            try:
                cache = fitted(method, observation, target, predictor=predictor)
            except ValueError as error:
                print(f"  {method.name}: {error}", file=sys.stderr)
                break
            recipe = verified(pipe, cache, observation, sampling, base=base)
            found[f"{method.name}, {name}"] = recipe.accelerators[-1]
    return found


def generic(
    pipe: Any, observation: Observation, sampling: Sampling, base: Recipe, level: str
) -> dict[str, float | int]:
    """The generic cache of a level, and its competitor: as many steps as the level's speed-up leaves."""
    about = fitted(METHODS["easycache"], observation, LEVELS[level]).calibration
    cache = replace(GENERIC[level], calibration=about)
    speedup, error = measured(verified(pipe, cache, observation, sampling, base=base).accelerators[-1])
    fewer = round(sampling.steps / LEVELS[level])
    with accelerated(pipe, base):
        images = torch.cat(list(replace(sampling, steps=fewer).run(pipe, lambda *_: None, "")))
    competitor = float(f"{rel_l2(images, observation.images).mean():.4g}")
    return {"measured_speedup": speedup, "rel_l2": error, "fewer_steps": fewer, "fewer_steps_rel_l2": competitor}


def entry(level: str, target: float, tried: dict[str, FeatureCache]) -> dict[str, Any]:
    """The best candidate as a recipe, and what the others did."""
    reached = {name: cache for name, cache in tried.items() if measured(cache)[0] >= TOLERANCE * target}
    best = min(reached, key=lambda name: measured(reached[name])[1])
    recipe = Recipe([reached[best]], name=f"{level}: {best}")
    return {
        "level": level,
        "recipe": recipe.to_dict(),
        "candidates": {
            name: dict(zip(("measured_speedup", "rel_l2"), measured(cache), strict=True))
            for name, cache in tried.items()
        },
    }


def measured(cache: FeatureCache) -> tuple[float, float]:
    """Speed-up in computed network calls, and error."""
    assert cache.calibration is not None
    speedup, error = cache.calibration.measured_speedup, cache.calibration.rel_l2
    assert speedup is not None and error is not None
    return speedup, error


def report(run: str, level: str, tried: dict[str, FeatureCache]) -> None:
    """A line per candidate."""
    for name, cache in tried.items():
        speedup, error = measured(cache)
        threshold = getattr(cache.gate, "threshold", float("nan"))
        print(f"{run:<9} {level:<9} {name:<17} {speedup:5.2f}x  rel_l2 {error:.4f}  threshold {threshold:.4g}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
