"""Calibration from start to finish, on class-conditional, text-to-image and video pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import families
import tiny
from flowaccel import FeatureCache, Recipe, Sampler, accelerated, is_accelerated
from flowaccel.caching.fit.calibrate import calibrate, find_method
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Newton
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.errors import RecipeConflictError
from flowaccel.evaluation import Classes
from flowaccel.training.sampling import Sampling

METHODS = {name: find_method(name) for name, preset in CACHE_PRESETS.items() if preset.fit}


def sampling(steps: int = 8, **options: Any) -> Sampling:
    return Sampling(conditions=Classes((0, 1)), steps=steps, num_samples=2, **options)


def cache_of(recipe: Recipe) -> FeatureCache:
    cache = recipe.accelerators[-1]
    assert isinstance(cache, FeatureCache)
    return cache


@pytest.mark.parametrize("method", list(METHODS))
def test_the_recipe_carries_its_calibration(method: str, tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    recipe = calibrate(pipe, method, 1.3, sampling(), base=Recipe([Sampler("euler")]), model="tiny")
    assert not is_accelerated(pipe)
    assert (recipe.name, recipe.num_inference_steps) == (f"{method}-1.3x", 8)
    assert [accelerator.name for accelerator in recipe.accelerators] == ["sampler", "feature_cache"]
    found = cache_of(recipe).calibration
    assert found is not None
    assert (found.method, found.network, found.steps, found.model) == (method, "SiTTransformer2DModel", 8, "tiny")
    assert (found.conditions, found.images, found.target_speedup) == (2, 2, 1.3)
    assert found.guidance_scale is not None
    assert found.measured_speedup is not None and found.measured_speedup > 1
    assert found.rel_l2 is not None and found.rel_l2 >= 0
    recipe.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == recipe
    with accelerated(pipe, recipe):  # a warning would be an error
        pipe(class_labels=[3], num_inference_steps=8)


@pytest.mark.parametrize("method", ["teacache", "magcache", "adacache", "easycache"])
@pytest.mark.parametrize("case", ["sd3", "flux", "wan22"])
def test_stock_pipelines(method: str, case: str) -> None:
    chosen = families.CASES[case]
    pipe = chosen.make()
    own = Sampling(conditions=families.Embedded(chosen), steps=6, num_samples=2, batch_size=1)
    found = cache_of(calibrate(pipe, method, 1.2, own, guard=Guard(warmup=1, last=0))).calibration
    assert found is not None and found.measured_speedup is not None and found.measured_speedup > 1


def test_guard_predictor_and_guidance_are_taken() -> None:
    guard = Guard(warmup=2, last=2, max_run=2)
    cache = cache_of(
        calibrate(
            tiny.sit_pipeline(),
            "easycache",
            1.3,
            sampling(arguments={"guidance_scale": 2.0}),
            guard=guard,
            predictor=Newton(order=1),
        )
    )
    assert (cache.guard, cache.predictor) == (guard, Newton(order=1))
    assert cache.calibration is not None and cache.calibration.guidance_scale == 2.0


def test_batches_do_not_matter() -> None:
    one, two = (calibrate(tiny.sit_pipeline(), "adacache", 1.3, sampling(batch_size=size)) for size in (1, 2))
    a, b = cache_of(one).gate, cache_of(two).gate
    torch.testing.assert_close(torch.tensor(a.pairs), torch.tensor(b.pairs), rtol=1e-2, atol=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teacash", 1.5), "method must be one of ab_cache, .* got 'teacash'; did you mean 'teacache'"),
        (("teacache", 1.0), "must be a number above 1, got 1"),
        (("teacache", float("nan")), "must be a number above 1, got nan"),
    ],
)
def test_wrong_use(arguments: tuple[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(tiny.sit_pipeline(), *arguments, sampling())


def test_a_cache_needs_steps_to_reuse() -> None:
    with pytest.raises(ValueError, match="steps must be at least 3, got 2: with fewer there is nothing to reuse"):
        calibrate(tiny.sit_pipeline(), "teacache", 1.3, sampling(steps=2))


def test_a_method_for_grids_is_not_one_for_caches() -> None:
    with pytest.raises(ValueError, match="'boss' searches a step grid, not a cache; call calibrate_grid"):
        calibrate(tiny.sit_pipeline(), "boss", 1.3, sampling())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"first": -1}, "first must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling(**options)


def test_a_second_cache_is_refused_before_anything_runs() -> None:
    with pytest.raises(RecipeConflictError, match="twice"):
        calibrate(tiny.sit_pipeline(), "teacache", 1.3, sampling(), base=Recipe([FeatureCache()]))
