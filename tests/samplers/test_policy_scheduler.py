"""Noise levels of its own for every image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowaccel.samplers import FlowRungeKuttaScheduler, PolicyScheduler


def walked(scheduler: PolicyScheduler, state: Tensor, copies: int = 1) -> list[tuple[float, ...]]:
    """The levels of every step of a walk in which the velocity is 1."""
    found = []
    images = len(state) // copies
    for timestep in scheduler.timesteps:
        found.append(scheduler.levels(images))
        state = scheduler.step(torch.ones_like(state), timestep, state, return_dict=False)[0]
        if scheduler.done:
            break
    assert torch.allclose(state, torch.zeros_like(state), atol=1e-6)  # all widths together are -1
    return found


def test_every_image_goes_where_it_is_sent() -> None:
    paths = {1.0: (0.5, 0.8), 0.5: (0.0,), 0.8: (0.1,), 0.1: (0.0,)}
    scheduler = PolicyScheduler()
    scheduler.decide = lambda velocity, levels: [
        0.0 if level == 0 else paths[level][image if len(paths[level]) > 1 else 0] for image, level in enumerate(levels)
    ]
    scheduler.set_timesteps(10)
    assert walked(scheduler, torch.ones(2, 1, 2, 2)) == [(1.0, 1.0), (0.5, 0.8), (0.0, 0.1)]
    scheduler.set_timesteps(10)
    assert walked(scheduler, torch.ones(4, 1, 2, 2), copies=2) != []  # anew, and with a copy for every branch


def test_the_last_entry_goes_to_the_end() -> None:
    scheduler = PolicyScheduler(max_steps=3)
    scheduler.decide = lambda velocity, levels: [0.9 * level for level in levels]
    scheduler.set_timesteps(sigmas=[1 - k / 8 for k in range(8)])
    assert len(scheduler.timesteps) == 3
    assert len(walked(scheduler, torch.ones(1, 1, 2, 2))) == 3


def test_without_a_policy_it_is_eulers_method() -> None:
    torch.manual_seed(0)
    states = []
    for scheduler in (PolicyScheduler(shift=2.0), FlowRungeKuttaScheduler("euler", shift=2.0)):
        scheduler.set_timesteps(5)
        state = torch.linspace(-1, 1, 8).view(2, 1, 2, 2)
        for timestep in scheduler.timesteps:
            state = scheduler.step(state.sin(), timestep, state, return_dict=False)[0]
        states.append(state)
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("levels", [(0.5,), (1.0, 0.5), (1.2, 0.5), (float("nan"), 0.5)])
def test_levels_must_fall(levels: tuple[float, ...]) -> None:
    scheduler = PolicyScheduler()
    scheduler.decide = lambda velocity, now: levels
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="a smaller noise level per image"):
        scheduler.step(torch.ones(2, 1, 2, 2), scheduler.timesteps[0], torch.ones(2, 1, 2, 2))


def test_it_does_not_inpaint() -> None:
    scheduler = PolicyScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="does not inpaint"):
        scheduler.step(
            torch.ones(1, 1, 2, 2), scheduler.timesteps[0], torch.ones(1, 1, 2, 2), project=lambda state, sigma: state
        )
