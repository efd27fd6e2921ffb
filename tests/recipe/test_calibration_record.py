"""What a calibrated cache says about where it was fitted, and the warning where it is used elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from flowaccel import FeatureCache, Recipe, accelerate, accelerated, restore
from flowaccel.caching.guard import Guard
from flowaccel.hooks import Identity
from flowaccel.recipe import Base
from flowaccel.recipe.calibration import Calibration
from flowaccel.samplers import FlowRungeKuttaScheduler

STEPS = 6


def calibration(pipe: Any, **changes: Any) -> Calibration:
    network, scheduler = Identity.of(pipe.transformer), Identity.of(pipe.scheduler)
    made = Calibration(
        method="teacache",
        network=network.kind,
        network_config=network.config,
        scheduler=scheduler.kind,
        scheduler_config=scheduler.config,
        steps=len(pipe.scheduler.timesteps),
        conditions=2,
        images=4,
        target_speedup=1.5,
        predicted_speedup=1.6,
        fitted_range=(0.1, 0.2),
    )
    return replace(made, **changes)


def pipeline(steps: int = STEPS) -> Any:
    pipe = tiny.sit_pipeline()
    pipe.scheduler = FlowRungeKuttaScheduler("euler")
    pipe.scheduler.set_timesteps(steps)
    return pipe


def run(pipe: Any, steps: int = STEPS) -> None:
    pipe(class_labels=[1], num_inference_steps=steps, output_type="np")


def warned(pipe: Any, steps: int = STEPS) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run(pipe, steps)
    return [str(warning.message) for warning in found if "calibrat" in str(warning.message)]


def cache(made: Calibration) -> FeatureCache:
    return FeatureCache("interval", guard=Guard(warmup=1, last=0), calibration=made)


def test_json_round_trip(tmp_path: Path) -> None:
    recipe = Recipe([cache(calibration(pipeline()))])
    recipe.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == recipe


def test_no_calibration_is_the_default() -> None:
    assert FeatureCache().calibration is None


def test_only_a_calibration_is_accepted() -> None:
    with pytest.raises(TypeError, match="calibration must be a Calibration or None, got 'teacache'"):
        FeatureCache(calibration="teacache")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        calibration(pipeline(), steps=0)


def test_silent_where_it_was_made() -> None:
    pipe = pipeline()
    accelerate(pipe, cache(calibration(pipe)))
    assert warned(pipe) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network_config": "0"}, "the network is SiTTransformer2DModel"),
        ({"network": "FluxTransformer2DModel"}, "not FluxTransformer2DModel"),
        ({"scheduler": "FlowMatchHeunDiscreteScheduler"}, "the scheduler is FlowRungeKuttaScheduler"),
        ({"steps": 28}, "the number of evaluations is 6, not 28"),
    ],
)
def test_a_mismatch_warns_once_per_pipeline_and_runs(changes: dict[str, Any], said: str) -> None:
    pipe = pipeline()
    recipe = cache(calibration(pipe, **changes))
    accelerate(pipe, recipe)
    (message,) = warned(pipe)
    assert said in message
    assert "flowaccel calibrate PIPE --method teacache --steps 6" in message
    assert warned(pipe) == []
    restore(pipe)
    accelerate(pipe, recipe)
    assert warned(pipe) == []
    other = pipeline()
    with accelerated(other, recipe):
        assert len(warned(other)) == 1


def test_the_command_names_steps_rather_than_evaluations() -> None:
    pipe = pipeline()
    made = calibration(pipe)
    pipe.scheduler = FlowRungeKuttaScheduler("heun")
    accelerate(pipe, cache(made))
    (message,) = warned(pipe, 5)
    assert "the number of evaluations is 10, not 6" in message
    assert "--steps 5" in message


def test_base_has_the_same_hash() -> None:
    pipe = pipeline()
    base, identity = Base.of(pipe), Identity.of(pipe.transformer)
    assert (base.network, base.config) == (identity.kind, identity.config)


def test_identity_forgets_defaults_but_not_choices() -> None:
    assert Identity.of(FlowRungeKuttaScheduler()) == Identity.of(FlowRungeKuttaScheduler("heun", shift=1.0))
    assert Identity.of(FlowRungeKuttaScheduler()) != Identity.of(FlowRungeKuttaScheduler(shift=3.0))
