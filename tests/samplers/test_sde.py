"""The stochastic sampler: noise per image, wrong use. The golden tests compare its numbers with the official ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.samplers import FlowSDEScheduler
from helpers import assert_close
from tiny import generators, latent_sit_pipeline

SOLVERS = pytest.mark.parametrize("solver", ["euler", "heun"])
STEPS = 4


def sample(solver: Any, seeds: list[int], start: Tensor, **options: Any) -> Tensor:
    scheduler = FlowSDEScheduler(solver, **options)
    scheduler.set_timesteps(STEPS)
    chances = generators(*seeds)
    state = scheduler.prepare_sample(start, chances)
    for timestep in scheduler.timesteps:
        state = scheduler.step(torch.tanh(state), timestep, state, chances, return_dict=False)[0]
    return state


@SOLVERS
def test_images_do_not_depend_on_their_batch(solver: str) -> None:
    start = torch.randn(2, 3, 4, 4)
    together = sample(solver, [11, 12], start)
    singly = torch.cat([sample(solver, [seed], start[i : i + 1]) for i, seed in enumerate([11, 12])])
    assert_close(together, singly, 1e-6)
    assert (together - sample(solver, [11, 13], start)).abs().amax(dim=(1, 2, 3)).gt(1e-2).tolist() == [False, True]


@SOLVERS
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_images_do_not_depend_on_their_batch_in_the_pipeline(solver: Any, scale: float) -> None:
    """Guidance doubles the batch, and must not change which noise an image gets."""
    pipe = latent_sit_pipeline(FlowSDEScheduler(solver))
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "latent"}
    together = pipe([1, 2], generator=generators(11, 12), **options).images
    singly = [pipe(label, generator=generators(10 + label), **options).images for label in (1, 2)]
    assert_close(together, torch.cat(singly), 1e-4)
    unlisted = [pipe(label, generator=generators(10 + label)[0], **options).images for label in (1, 2)]
    assert_close(torch.cat(unlisted), torch.cat(singly), 1e-6)


def test_both_halves_of_a_doubled_batch_get_the_same_noise() -> None:
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(STEPS)
    zeros = torch.zeros(4, 3)
    noised = scheduler.step(zeros, scheduler.timesteps[0], zeros, generators(1, 2), return_dict=False)[0]
    assert torch.equal(noised[:2], noised[2:])
    assert not torch.equal(noised[0], noised[1])


@SOLVERS
@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie", "none"])
def test_evaluations(solver: str, last_step: str) -> None:
    """N steps, of which the last is deterministic and one evaluation, unless there is none such."""
    scheduler = FlowSDEScheduler(solver, last_step=last_step, last_step_size=0.1)  # type: ignore[arg-type]
    scheduler.set_timesteps(STEPS)
    stages = 2 if solver == "heun" else 1
    assert len(scheduler.timesteps) == (STEPS * stages if last_step == "none" else (STEPS - 1) * stages + 1)
    grid = [1.0, 0.75, 0.5, 0.25, 0.0] if last_step == "none" else [1.0, 0.7, 0.4, 0.1, 0.0]
    assert scheduler.grid == pytest.approx(grid)


def test_no_noise_without_diffusion() -> None:
    """With norm 0 and Euler's last step it is Euler's method on the same grid."""
    scheduler = FlowSDEScheduler(diffusion_norm=0.0, last_step="euler", last_step_size=0.25)
    scheduler.set_timesteps(STEPS)
    state = expected = torch.randn(2, 3)
    for timestep in scheduler.timesteps:
        state = scheduler.step(torch.tanh(state), timestep, state, return_dict=False)[0]
        expected = expected - torch.tanh(expected) / 4
    assert_close(state, expected, 1e-6)


def test_gaussian_data_are_sampled_with_their_variance() -> None:
    """Data N(0, s^2) have a known velocity; 100 steps must give their spread back."""
    spread, steps = 0.5, 100
    scheduler = FlowSDEScheduler(last_step_size=0.01)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(20_000, 1, generator=generator)
    for evaluation, timestep in zip(scheduler.evaluations, scheduler.timesteps, strict=True):
        t, sigma = 1 - evaluation.sigma, evaluation.sigma
        variance = t**2 * spread**2 + sigma**2
        velocity = (t * spread**2 - sigma) / variance * state
        state = scheduler.step(-velocity, timestep, state, generator, return_dict=False)[0]
    assert state.std().item() == pytest.approx(spread, rel=0.03)


def test_heun_needs_its_first_noise() -> None:
    scheduler = FlowSDEScheduler("heun")
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="adds noise before the first evaluation: use SiTPipeline, or solver='euler'"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))


def test_heun_needs_it_again_in_the_next_run() -> None:
    sample("heun", [1], torch.zeros(1, 2))
    scheduler = FlowSDEScheduler("heun")
    scheduler.set_timesteps(STEPS)
    scheduler.prepare_sample(torch.zeros(1, 2))
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="adds noise before the first evaluation"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))


def test_euler_needs_no_preparation() -> None:
    scheduler = FlowSDEScheduler("euler")
    scheduler.set_timesteps(STEPS)
    start = torch.randn(1, 2)
    assert scheduler.prepare_sample(start) is start


def test_a_run_begins_where_a_step_starts() -> None:
    scheduler = FlowSDEScheduler("heun")
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"FlowSDEScheduler can only begin where a step starts, at \[0, 2, 4, 6\]"):
        scheduler.set_begin_index(1)
