"""`safe`, `balanced` and `fast`: the calibrated cache where there is one, the generic one and a warning where not."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from flowaccel import FeatureCache, LevelCache, Recipe, Sampler, accelerate, accelerated, report, restore, zoo
from flowaccel.caching.level_cache import CALIBRATED, GENERIC, LEVELS, shipped
from flowaccel.errors import RecipeConflictError
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe.calibration import identities
from flowaccel.samplers import FlowRungeKuttaScheduler


def digits() -> Any:
    pipe = load_pipeline(zoo.folder("zoo:sit-digits"))
    pipe.scheduler = FlowRungeKuttaScheduler("euler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, steps: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    output = pipe(class_labels=[3, 5], num_inference_steps=steps, generator=generators, output_type="np")
    return torch.as_tensor(output.images)


def warned(pipe: Any, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        image(pipe, steps)
    return [str(warning.message) for warning in found if "calibrated" in str(warning.message)]


def test_every_level_is_calibrated_for_the_same_runs() -> None:
    runs = {
        level: {(c.calibration.scheduler_config, c.calibration.steps) for c in caches if c.calibration}
        for level, caches in shipped().items()
    }
    assert list(runs) == list(LEVELS)
    assert len(set(map(frozenset, runs.values()))) == 1
    assert all(sorted(steps for _, steps in found) == [20, 20, 28, 30, 50, 50] for found in runs.values())


def test_shipped_entries_reach_their_level_with_the_least_error() -> None:
    for entry in json.loads(CALIBRATED.read_text(encoding="utf-8"))["entries"]:
        calibration = entry["recipe"]["accelerators"][0]["calibration"]
        bound = 0.98 * LEVELS[entry["level"]]
        reached = [c["rel_l2"] for c in entry["candidates"].values() if c["measured_speedup"] >= bound]
        assert calibration["measured_speedup"] >= bound
        assert calibration["rel_l2"] == min(reached)


@pytest.mark.parametrize("level", list(LEVELS))
def test_a_calibrated_run_is_that_cache_and_silent(level: str) -> None:
    pipe = digits()
    shown = report_of(pipe, level, 20)
    assert "reused" in shown
    (cache,) = [
        found
        for found in shipped()[level]
        if found.calibration is not None and not found.calibration.differences(*identities(pipe), 20)
    ]
    with accelerated(pipe, level):
        found = image(pipe, 20)
    with accelerated(pipe, cache):
        assert torch.equal(image(pipe, 20), found)


def test_another_grid_is_another_run() -> None:
    pipe = digits()
    accelerate(pipe, "balanced")
    pipe.scheduler = FlowRungeKuttaScheduler("euler", shift=3.0)
    assert len(warned(pipe, 20)) == 1


def report_of(pipe: Any, level: str, steps: int) -> str:
    with accelerated(pipe, f"{level}@{steps}"):
        image(pipe, steps)
        return str(report(pipe))


def test_an_uncalibrated_run_is_generic_and_warns_once() -> None:
    pipe = tiny.sit_pipeline()
    with accelerated(pipe, GENERIC["fast"]):
        wanted = image(pipe, 8)
    accelerate(pipe, "fast")
    (message,) = warned(pipe, 8)
    assert "nothing is calibrated for a SiTTransformer2DModel with 16 evaluations of FlowRungeKutta" in message
    assert "--method teacache --steps 8 --target-speedup 2.5 --out FOLDER" in message
    assert warned(pipe, 8) == []
    assert torch.equal(image(pipe, 8), wanted)


@pytest.mark.slow
def test_each_run_chooses_anew() -> None:
    pipe = digits()
    untouched = image(pipe, 20)
    with accelerated(pipe, GENERIC["balanced"]):
        generic = image(pipe, 12)
    accelerate(pipe, LevelCache("balanced"))
    calibrated = image(pipe, 20)
    assert not torch.equal(calibrated, untouched)
    assert len(warned(pipe, 12)) == 1
    assert torch.equal(image(pipe, 12), generic)
    assert torch.equal(image(pipe, 20), calibrated)
    restore(pipe)
    assert torch.equal(image(pipe, 20), untouched)


def test_a_sampler_before_it_is_followed() -> None:
    pipe = digits()
    accelerate(pipe, Recipe([Sampler("heun"), LevelCache("fast")]))
    image(pipe, 10)  # 20 evaluations; a warning would be an error
    assert report(pipe).count("reused")


def test_wrong_level() -> None:
    with pytest.raises(ValueError, match="level must be one of safe, balanced, fast, got 'ultra'"):
        LevelCache("ultra")  # type: ignore[arg-type]


def test_it_is_a_cache() -> None:
    with pytest.raises(RecipeConflictError, match="two caches would forecast"):
        Recipe([LevelCache(), FeatureCache()])
