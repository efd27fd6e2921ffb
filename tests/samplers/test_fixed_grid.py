"""Schedulers that are made with a grid of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from flowaccel import Recipe, Sampler, accelerated
from flowaccel.samplers import FlowAdamsBashforthScheduler, FlowRungeKuttaScheduler, FlowTurboScheduler
from helpers import walk
from tiny import latent_sit_pipeline

GRID = [1.0, 0.7, 0.2, 0.0]
STEPS = len(GRID) - 1
MAKERS: dict[str, Any] = {
    "euler": lambda **options: FlowRungeKuttaScheduler("euler", **options),
    "heun": lambda **options: FlowRungeKuttaScheduler("heun", **options),
    "ab2": FlowAdamsBashforthScheduler,
    "flowturbo": lambda **options: FlowTurboScheduler("H1P1R1", **options),
}
EVERY = pytest.mark.parametrize("name", MAKERS)
EVEN = [1.0, 2 / 3, 1 / 3]


@EVERY
@pytest.mark.parametrize("asked", [{}, {"num_inference_steps": STEPS}, {"sigmas": EVEN}, {"sigmas": EVEN, "mu": 0.7}])
def test_it_is_taken_as_it_is(name: str, asked: dict[str, Any]) -> None:
    """Whatever the shift, and whatever even levels a pipeline hands over."""
    scheduler = MAKERS[name](grid=GRID, shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(**asked)
    assert scheduler.grid == GRID
    assert (scheduler.num_inference_steps, scheduler.default_num_inference_steps) == (STEPS, STEPS)
    assert scheduler.timesteps[0] == 1000


def test_euler_steps_over_it() -> None:
    scheduler = MAKERS["euler"](grid=GRID)
    scheduler.set_timesteps()
    sample = torch.ones(1, dtype=torch.float64)
    assert float(walk(scheduler, lambda state, sigma: state, sample)[-1]) == pytest.approx(0.7 * 0.5 * 0.8)


@EVERY
def test_another_number_of_steps_is_refused(name: str) -> None:
    scheduler = MAKERS[name](grid=GRID)
    with pytest.raises(ValueError, match=r"grid of 3 steps, but num_inference_steps is 28; .* =?num_inference_steps=3"):
        scheduler.set_timesteps(28)
    with pytest.raises(ValueError, match="but num_inference_steps is 2"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])


@EVERY
def test_other_levels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a grid of its own, .* leave sigmas out, got \[1.0, 0.9, 0.1\]"):
        MAKERS[name](grid=GRID).set_timesteps(sigmas=[1.0, 0.9, 0.1])


BAD: list[Any] = [
    [],
    [1.0],
    [0.9, 0.5, 0.2, 0.0],
    [1.0, 0.5, 0.2, 0.1],
    [1.0, 0.5, 0.5, 0.0],
    [1.0, 0.2, 0.5, 0.0],
    [1.0, float("nan"), 0.5, 0.0],
    [1.0, "0.5", 0.2, 0.0],
    [True, 0.5, 0.2, False],
]


@EVERY
@pytest.mark.parametrize("grid", [grid for grid in BAD if len(grid) == STEPS + 1], ids=str)
def test_a_bad_grid_is_refused_when_it_is_made(name: str, grid: Any) -> None:
    with pytest.raises(ValueError, match=r"decrease from exactly 1 \(noise\) to exactly 0 \(data\)"):
        MAKERS[name](grid=grid)
    options = {"blocks": "H1P1R1"} if name == "flowturbo" else {}
    with pytest.raises(ValueError, match=r"decrease from exactly 1 \(noise\) to exactly 0 \(data\)"):
        Sampler(name, {**options, "grid": grid})


@pytest.mark.parametrize("grid", [*(grid for grid in BAD if len(grid) < 2), 3, "1, 0"], ids=str)
def test_what_is_no_grid_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match="grid must be a list of noise levels"):
        Sampler("euler", {"grid": grid})


def test_blocks_and_grid_agree() -> None:
    with pytest.raises(ValueError, match="grid must have 5 levels for the 4 steps of 'H2P2', got 4"):
        FlowTurboScheduler("H2P2", grid=GRID)


def test_sde_has_none() -> None:
    with pytest.raises(ValueError, match=r"options of sampler 'sde': .*'grid'"):
        Sampler("sde", {"grid": GRID})


def test_round_trips(tmp_path: Path) -> None:
    recipe = Recipe([Sampler("euler", {"grid": GRID})])
    assert recipe.num_inference_steps == STEPS
    recipe.save_pretrained(tmp_path / "recipe")
    assert Recipe.from_pretrained(tmp_path / "recipe") == recipe
    MAKERS["euler"](grid=GRID).save_pretrained(tmp_path / "scheduler")
    read = FlowRungeKuttaScheduler.from_pretrained(tmp_path / "scheduler")
    read.set_timesteps()
    assert read.grid == GRID
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["grid"] == GRID


def test_a_recipe_that_contradicts_it_is_refused() -> None:
    with pytest.raises(ValueError, match="different numbers of steps"):
        Recipe([Sampler("euler", {"grid": GRID})], num_inference_steps=5)


@pytest.mark.parametrize("case", ["sit", "sd3", "flux", "auraflow"])
def test_pipelines_run_over_it(case: str) -> None:
    chosen = families.CASES[case]
    pipe = chosen.make()
    shown: list[float] = []

    def seen(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        shown.append(float(timestep) / 1000)
        return {}

    extra = {} if case == "auraflow" else {"callback_on_step_end": seen}
    with accelerated(pipe, Sampler("euler", {"grid": GRID})):
        pipe(**{**chosen.arguments(steps=STEPS), **extra})
        assert pipe.scheduler.grid == GRID
        with pytest.raises(ValueError, match="grid of 3 steps, but num_inference_steps is 5"):
            pipe(**chosen.arguments(steps=5))
    if extra:
        assert shown == pytest.approx(GRID[:-1])


def test_image_to_image_begins_midway() -> None:
    """Half of four steps: the last two intervals of the grid."""
    chosen = families.CASES["flux_img2img"]
    pipe = chosen.make()
    grid = [1.0, 0.9, 0.6, 0.2, 0.0]
    shown: list[float] = []

    def seen(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        shown.append(float(timestep) / 1000)
        return {}

    with accelerated(pipe, Sampler("euler", {"grid": grid})):
        pipe(**{**chosen.arguments(steps=4), "callback_on_step_end": seen})
    assert shown == pytest.approx([0.6, 0.2])


def test_sit_takes_its_steps_by_itself() -> None:
    pipe = latent_sit_pipeline(MAKERS["euler"](grid=GRID))
    pipe(1, output_type="latent")
    assert pipe.scheduler.num_inference_steps == STEPS
