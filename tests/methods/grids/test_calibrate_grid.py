"""Searched step grids from start to finish, on class-conditional and text-to-image pipelines."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import families
import tiny
from flowaccel import FeatureCache, Recipe, Sampler, accelerated, is_accelerated
from flowaccel.errors import RecipeConflictError, UnsupportedModelError
from flowaccel.evaluation import Classes
from flowaccel.hooks import Identity
from flowaccel.methods.grids.fit import calibrate_grid, search_grids, velocities_at, watch_fine_runs, with_grid
from flowaccel.methods.grids.search import GRID_METHODS, Trajectory
from flowaccel.recipe.calibration import GridCalibration
from flowaccel.training.sampling import Sampling

FINE, STEPS = 7, 3
EULER = Recipe([Sampler("euler")])
METHODS = pytest.mark.parametrize("method", GRID_METHODS)
CASES = pytest.mark.parametrize("case", ["sit", "sd3", "flux"])


def sampling(case: str = "sit", batch_size: int = 2, **options: Any) -> Sampling:
    conditions = Classes((0, 1, 2)) if case == "sit" else families.Embedded(families.CASES[case])
    options = {"steps": FINE, "num_samples": 3, **options}
    return Sampling(conditions=conditions, batch_size=batch_size, **options)


def trajectories(pipe: Any, chosen: Sampling, base: Recipe | None = None) -> list[Trajectory]:
    found: list[Trajectory] = []
    watch_fine_runs(pipe, base or Recipe(), chosen, found.append)
    return found


def grid_of(recipe: Recipe) -> tuple[list[float], GridCalibration]:
    sampler = recipe.accelerators[-1]
    assert isinstance(sampler, Sampler) and sampler.calibration is not None
    return sampler.options["grid"], sampler.calibration


# -- what is seen of a run


@CASES
def test_a_fine_run_is_seen_whole(case: str) -> None:
    """Its steps are Euler's over the scheduler's own levels, and its images are those of the pipeline."""
    chosen = sampling(case)
    pipe = families.CASES[case].make()
    first, second = trajectories(pipe, chosen)
    assert (first.images, second.images) == (2, 1)
    assert first.times == (*pipe.scheduler.sigmas[:-1].tolist(), 0.0)
    for node, (start, end) in enumerate(itertools.pairwise(first.times)):
        ahead = first.states[node] + (end - start) * first.velocities[node]
        torch.testing.assert_close(ahead, first.states[node + 1], rtol=1e-4, atol=1e-5)
    latents = torch.as_tensor(next(chosen.outputs(pipe, lambda *_: None, "", output_type="latent")).images)
    torch.testing.assert_close(first.states[-1], latents.float())


@CASES
def test_the_network_is_asked_as_the_pipeline_asks_it(case: str) -> None:
    """At the fine run's own states it says what it said there: batches, guidance and packing are those of the runs."""
    pipe, chosen = families.CASES[case].make(), sampling(case)
    seen = trajectories(pipe, chosen)
    states = torch.cat([one.states for one in seen], dim=1)
    said = torch.cat([one.velocities for one in seen], dim=1)
    asked = [1, 3, 4, 6]
    times = [seen[0].times[node] for node in asked]
    torch.testing.assert_close(velocities_at(pipe, Recipe(), chosen, states[asked], times), said[asked])
    others = velocities_at(pipe, Recipe(), chosen, states[asked] + 0.5, times)
    assert ((others - said[asked]).flatten(2).norm(dim=2) > 1e-3).all()


@CASES
def test_a_grid_of_all_levels_is_the_fine_run(case: str) -> None:
    pipe, chosen = families.CASES[case].make(), sampling(case)
    grids = search_grids(pipe, "boss", FINE, chosen)
    fine = list(chosen.run(pipe, lambda *_: None, ""))
    with accelerated(pipe, with_grid(Recipe(), grids[-1])):
        searched = list(chosen.run(pipe, lambda *_: None, ""))
    for one, other in zip(fine, searched, strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


# -- from start to finish


@METHODS
@CASES
def test_the_recipe_carries_its_grid_and_what_it_does(method: str, case: str, tmp_path: Path) -> None:
    pipe, chosen = families.CASES[case].make(), sampling(case)
    levels = trajectories(pipe, chosen)[0].times
    recipe = calibrate_grid(pipe, method, STEPS, chosen, held_out=2, model="tiny")
    assert not is_accelerated(pipe)
    assert (recipe.name, recipe.num_inference_steps) == (f"{method}-{STEPS}", STEPS)
    grid, found = grid_of(recipe)
    assert (grid[0], grid[-1], len(grid)) == (1.0, 0.0, STEPS + 1)
    assert set(torch.tensor(grid).tolist()) <= set(levels)
    assert (found.method, found.fine_steps, found.metric, found.steps) == (method, FINE, "state", STEPS)
    assert (found.images, found.held_out, found.model) == (3, 2, "tiny")
    network = Identity.of(pipe.transformer)
    assert (found.network, found.network_config) == (network.kind, network.config)
    assert found.guidance_scale == chosen.guidance_scale(pipe)
    recipe.save_pretrained(tmp_path)
    loaded = Recipe.from_pretrained(tmp_path)
    assert loaded == recipe
    changes = {"num_inference_steps": STEPS, "guidance_scale": found.guidance_scale}
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing differs from where it was searched
        for one in (recipe, loaded):
            with accelerated(pipe, one):
                made.append(torch.as_tensor(pipe(**{**families.CASES[case].arguments(), **changes}).images))
    assert torch.equal(*made)


def test_the_errors_are_those_of_other_images() -> None:
    """Recomputed by hand, on the samples that follow those of the search."""
    pipe, chosen = families.CASES["sit"].make(), sampling()
    grid, found = grid_of(calibrate_grid(pipe, "boss", STEPS, chosen, held_out=4))
    held = replace(chosen, first=3, num_samples=4)
    assert [sample_id for batch in held.batches for sample_id in batch] == [3, 4, 5, 6]

    def images(steps: int, recipe: Recipe) -> torch.Tensor:
        with accelerated(pipe, recipe):
            return torch.cat(list(replace(held, steps=steps).run(pipe, lambda *_: None, ""))).double()

    fine, default = images(FINE, Recipe()), images(STEPS, Recipe())
    searched = images(STEPS, Recipe([Sampler("euler", {"grid": grid})]))
    errors, others = (
        (made - fine).flatten(1).norm(dim=1) / fine.flatten(1).norm(dim=1) for made in (searched, default)
    )
    assert found.rel_l2 == pytest.approx(float(errors.mean()), rel=1e-3)
    assert found.default_rel_l2 == pytest.approx(float(others.mean()), rel=1e-3)
    assert found.difference_ci95 is not None
    low, high = found.difference_ci95
    assert (low + high) / 2 == pytest.approx(float((errors - others).mean()), rel=1e-2, abs=1e-5)


@METHODS
def test_batches_do_not_matter(method: str) -> None:
    pipe = families.CASES["sit"].make()
    one, two = (search_grids(pipe, method, 4, sampling(batch_size=size)) for size in (1, 3))
    assert one == two


def test_a_sampler_under_it_is_replaced() -> None:
    """A pipeline whose own sampler is Heun's, with Euler's put under the grid; its time shift stays that of the run."""
    shifted = Recipe([Sampler("euler", {"shift": 3.0})])
    pipe = tiny.sit_pipeline()
    recipe = calibrate_grid(pipe, "boss", STEPS, sampling(), base=shifted)
    assert [accelerator.name for accelerator in recipe.accelerators] == ["sampler"]
    grid, _ = grid_of(recipe)
    levels = [3 * (k / FINE) / (1 + 2 * k / FINE) for k in range(FINE + 1)]
    assert all(min(abs(level - other) for other in levels) < 1e-6 for level in grid)


def test_a_cache_goes_on_top() -> None:
    pipe = families.CASES["sit"].make()
    recipe = calibrate_grid(pipe, "boss", 4, sampling())
    with accelerated(pipe, Recipe([*recipe.accelerators, FeatureCache("interval")])):
        images = pipe([1], num_inference_steps=4, output_type="pt").images
    assert torch.isfinite(images).all()


# -- refusals


@METHODS
@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        ("heun", r"FlowRungeKuttaScheduler \(heun\) evaluates the network 2 times a step"),
        ("rk4", r"\(rk4\) evaluates the network 4 times a step"),
        ("ab2", "FlowAdamsBashforthScheduler goes by more than the velocity at the start of a step"),
        ("sde", "FlowSDEScheduler draws noise"),
    ],
)
def test_other_samplers_are_refused(method: str, scheduler: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*recipe 'euler' under it"):
        search_grids(families.CASES["sit"].make(), method, STEPS, sampling(), base=Recipe([Sampler(scheduler)]))


def test_stock_solvers_are_refused() -> None:
    pipe = families.CASES["sit"].make()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler evaluates the network more than once a step"):
        search_grids(pipe, "boss", STEPS, sampling())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling set"):
        search_grids(pipe, "boss", STEPS, sampling())


@pytest.mark.parametrize("case", ["dit", "cogview4", "wan21"])
def test_pipelines_that_are_refused(case: str) -> None:
    message = {
        "dit": "works on flow models",
        "cogview4": "other timesteps than its noise levels",
        "wan21": "UniPCMultistepScheduler goes by more than the velocity",
    }[case]
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        search_grids(families.CASES[case].make(), "boss", STEPS, sampling(case))


def test_runs_that_begin_midway_are_refused() -> None:
    with pytest.raises(ValueError, match="begin with pure noise"):
        search_grids(families.CASES["flux_img2img"].make(), "boss", STEPS, sampling("flux_img2img", steps=8))


def test_a_hook_under_it_is_refused() -> None:
    with pytest.raises(RecipeConflictError, match="holds 'feature_cache'; search first, and put 'feature_cache' on"):
        search_grids(tiny.sit_pipeline(), "boss", STEPS, sampling(), base=Recipe([FeatureCache()]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bos"}, "method must be one of boss, oss, got 'bos'"),
        ({"metric": "lpips"}, "metric must be one of state, x0, got 'lpips'"),
        ({"steps": FINE + 1}, r"steps must be a whole number in 1 \.\. 7 \(the fine run's steps\), got 8"),
        ({"steps": 0}, "got 0"),
        ({"held_out": 0}, "held_out must be at least 1, got 0"),
    ],
)
def test_wrong_use(changes: dict[str, Any], message: str) -> None:
    given = {"method": "boss", "steps": STEPS, **changes}
    with pytest.raises(ValueError, match=message):
        calibrate_grid(tiny.sit_pipeline(), sampling=sampling(), base=EULER, **given)


# -- used elsewhere


@pytest.mark.parametrize(
    ("changes", "scale", "said"),
    [
        ({"network_config": "0"}, 1.5, "the network is SiTTransformer2DModel"),
        ({"scheduler_config": "0"}, 1.5, "the scheduler is FlowRungeKuttaScheduler"),
        ({}, 4.0, "the guidance scale is 4.0, not 1.5"),
    ],
)
def test_used_elsewhere_it_warns_once(changes: dict[str, Any], scale: float, said: str) -> None:
    pipe = families.CASES["sit"].make()
    recipe = calibrate_grid(pipe, "boss", STEPS, sampling())
    grid, found = grid_of(recipe)
    elsewhere = Sampler("euler", {"grid": grid}, replace(found, **changes))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with accelerated(pipe, elsewhere):
            for _ in range(2):
                pipe([1], num_inference_steps=STEPS, guidance_scale=scale, output_type="latent")
    (message,) = [str(warning.message) for warning in heard if "calibrated" in str(warning.message)]
    assert "the step grid was calibrated for something else" in message
    assert said in message
    assert f"flowaccel calibrate PIPE --method boss --steps {STEPS}" in message


def test_only_its_own_kind_of_calibration_is_accepted() -> None:
    with pytest.raises(TypeError, match="calibration must be a GridCalibration or None, got 'boss'"):
        Sampler("euler", {"grid": [1.0, 0.0]}, "boss")  # type: ignore[arg-type]
