"""Runs that leave out first steps, and states that are changed at the end of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowaccel.samplers import FlowTurboScheduler
from helpers import ALL_SAMPLERS, assert_close, walk

STEPS = 6


def decay(sample: Tensor, sigma: float) -> Tensor:
    return (1 + sigma) * sample


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "rk4", "ab2", "flowturbo-h", "flowturbo-hp"])
def test_the_rest_of_the_steps_is_a_run_over_the_rest_of_the_grid(name: str) -> None:
    """Two of six steps left out: what a run of four steps over the same noise levels gives."""
    made = ALL_SAMPLERS[name][0](STEPS)
    made.set_timesteps(STEPS, first_step=2)
    grid = made.grid[2:-1]
    shorter = FlowTurboScheduler("H1P3") if name == "flowturbo-hp" else ALL_SAMPLERS[name][0](4)
    shorter.set_timesteps(sigmas=grid)
    sample = torch.randn(2, 3)
    # flowturbo-hp is H3P3: its rest H P P P has the same kinds as H1P3
    assert_close(made.timesteps, shorter.timesteps, 1e-3)
    assert_close(walk(made, decay, sample)[-1], walk(shorter, decay, sample)[-1], 1e-5)


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_projection_once_a_step_at_its_end(name: str) -> None:
    made = ALL_SAMPLERS[name][0](STEPS)
    made.set_timesteps(STEPS, first_step=2)
    levels: list[float] = []

    def project(state: Tensor, sigma: float) -> Tensor:
        levels.append(sigma)
        return torch.full_like(state, 7.0) if sigma == 0 else state

    sample = torch.randn(2, 3)
    if hasattr(made, "prepare_sample"):
        sample = made.prepare_sample(sample)
    samples = walk(made, lambda x, sigma: torch.zeros_like(x), sample, project=project)
    assert levels == made.grid[3:]
    assert (samples[-1] == 7).all()


def test_projected_state_is_what_the_predictor_starts_from() -> None:
    """A P step's first sample is the projected state moved by the carried velocity."""
    made = FlowTurboScheduler("H1P1")
    made.set_timesteps(2)
    samples = walk(made, lambda x, sigma: torch.ones_like(x), torch.randn(1, 3), project=lambda x, _: 0 * x)
    assert_close(samples[1], torch.full((1, 3), -0.5), 1e-6)
    assert not samples[-1].any()


@pytest.mark.parametrize(("blocks", "first", "last"), [("H2P4R2", 6, 5), ("H1R1", 1, 0), ("H3", 3, 2), ("H3", -1, 2)])
def test_first_step_out_of_range(blocks: str, first: int, last: int) -> None:
    made = FlowTurboScheduler(blocks)
    with pytest.raises(ValueError, match=rf"first_step must be in 0 .. {last} for {made.blocks.total} steps, got"):
        made.set_timesteps(made.blocks.total, first_step=first)


def test_fused_steps() -> None:
    made = FlowTurboScheduler("H1P2R1", "consistent")
    made.set_timesteps(4, first_step=1)
    assert [(fused.kind, fused.step, fused.carries_start) for fused in made.fused_steps] == [
        ("H", 1, False),
        ("P", 2, True),
        ("R", 3, True),
    ]
