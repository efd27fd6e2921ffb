"""`flowaccel.report`: what the last run did, and why nothing was saved."""

from __future__ import annotations

from typing import Any

import pytest

import families
import tiny
from flowaccel import Recipe, Sampler, accelerate, report, restore
from flowaccel.hooks import session_of


@pytest.fixture
def refined() -> Any:
    pipe = tiny.sit_pipeline()
    return accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), "H1P1R2", refiner_mode="single"))


def test_refined_calls_are_told_from_computed_ones(refined: Any) -> None:
    refined([1, 2, 3])
    found = report(refined)
    assert (found.pipeline, found.recipe, found.families) == ("SiTPipeline", "flowturbo-H1P1R2", ("sit",))
    assert (found.images, found.num_steps, len(found.steps)) == (3, 5, 5)
    assert [call.what for call in found.calls] == ["computed"] * 3 + ["refined"] * 2
    assert (found.count("computed"), found.rows("computed"), found.rows("refined")) == (3, 18, 12)
    assert found.unsaved is None and not found.failed
    assert [step.timestep for step in found.steps] == pytest.approx(refined.scheduler.timesteps.tolist())
    assert found.seconds >= sum(step.seconds for step in found.steps) > 0


def test_as_text(refined: Any) -> None:
    refined([1])
    lines = str(report(refined)).splitlines()
    assert lines[0].startswith("SiTPipeline, recipe 'flowturbo-H1P1R2': 1 images, 5 evaluations in ")
    assert lines[0].endswith("; 5 network calls (3 computed, 2 refined)")
    assert len(lines) == 2 + 5
    assert lines[2].endswith("cond+uncond computed") and lines[6].endswith("cond+uncond refined")


def test_split_guidance_and_two_networks() -> None:
    case = families.CASES["wan22"]
    pipe = accelerate(case.make(), [])
    case(pipe)
    found = report(pipe)
    assert all(len(step.calls) == 2 for step in found.steps)
    assert {call.network for call in found.calls} == {"transformer", "transformer_2"}
    assert "cond computed on transformer_2, uncond computed on transformer_2" in str(found)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(), "the recipe is empty"),
        (Recipe([Sampler("ab2")]), "the recipe saves steps or the work within a call, not calls"),
    ],
)
def test_says_why_nothing_was_saved(recipe: Recipe, reason: str) -> None:
    pipe = accelerate(tiny.sit_pipeline(), recipe)
    pipe([1], num_inference_steps=3)
    assert report(pipe).unsaved == reason
    assert f"No network call was saved: {reason}." in str(report(pipe))


def test_a_refiner_without_its_scheduler_is_named(refined: Any) -> None:
    refined.scheduler = tiny.sit_pipeline().scheduler  # exchanged by the user
    refined([1], num_inference_steps=2)
    assert report(refined).unsaved == "'sampler', 'velocity_refiner' had every call computed"


@pytest.mark.slow
def test_compiled_blocks_are_not_observed() -> None:
    pipe = accelerate(tiny.sit_pipeline(), [])
    pipe.compile_blocks(backend="eager")
    pipe([1], num_inference_steps=2)
    assert "compiled blocks" in str(report(pipe).unsaved)
    assert report(pipe).calls == []


def test_a_run_that_ended_early() -> None:
    pipe = accelerate(tiny.sd3_pipeline(), [])

    def stop(pipe: Any, step: int, *_: Any) -> dict:
        pipe._interrupt = step == 1
        return {}

    pipe(**families.sd3_arguments(), callback_on_step_end=stop)
    assert report(pipe).failed
    assert "The run ended early, after 2 of 4 evaluations." in str(report(pipe))


def test_errors_say_what_to_do() -> None:
    pipe = tiny.sit_pipeline()
    with pytest.raises(ValueError, match=r"SiTPipeline is not accelerated; call flowaccel\.accelerate"):
        report(pipe)
    accelerate(pipe, [])
    with pytest.raises(ValueError, match=r"has not run since flowaccel\.accelerate; call it first"):
        report(pipe)
    restore(pipe)
    with pytest.raises(ValueError, match="not accelerated"):
        session_of(pipe)
