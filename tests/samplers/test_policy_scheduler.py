"""Noise levels of its own for every image."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from flowaccel.samplers import FlowAdamsBashforthScheduler, FlowRungeKuttaScheduler, FlowSampler, PolicyScheduler


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


def end_of(scheduler: FlowSampler, state: Tensor, steps: int) -> Tensor:
    """Where a walk ends in which the velocity is the sine of the state."""
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        state = scheduler.step(state.sin(), timestep, state, return_dict=False)[0]
    return state


@pytest.mark.parametrize(("order", "usual"), [(1, FlowRungeKuttaScheduler), (2, FlowAdamsBashforthScheduler)])
def test_without_a_policy_it_is_the_usual_method(order: Literal[1, 2], usual: type[FlowSampler]) -> None:
    options = {"solver": "euler"} if order == 1 else {}
    start = torch.linspace(-1, 1, 8).view(2, 1, 2, 2)
    wanted = end_of(usual(shift=2.0, **options), start, 5)
    torch.testing.assert_close(
        end_of(PolicyScheduler(shift=2.0, solver_order=order), start, 5), wanted, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "mu"),
    [
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 0.7),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.7),
    ],
)
def test_the_usual_grid_is_that_of_a_run_without_a_policy(options: dict[str, Any], mu: float | None) -> None:
    plain, deciding = PolicyScheduler(**options), PolicyScheduler(**options, max_steps=7)
    plain.set_timesteps(5, mu=mu)
    deciding.decide = lambda velocity, levels: [0.0] * len(levels)
    deciding.set_timesteps(9, mu=mu)
    assert deciding.usual_grid(5) == plain.grid
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        deciding.usual_grid(0)


def test_second_order_is_of_every_image_alone() -> None:
    paths = {1.0: (0.6, 0.9), 0.6: (0.0,), 0.9: (0.7,), 0.7: (0.2,), 0.2: (0.0,)}

    def sent(*images: int) -> Tensor:
        scheduler = PolicyScheduler(solver_order=2)
        scheduler.decide = lambda velocity, levels: [
            0.0 if level == 0 else paths[level][image if len(paths[level]) > 1 else 0]
            for image, level in zip(images, levels, strict=True)
        ]
        return end_of(scheduler, torch.linspace(-1, 1, 8).view(2, 1, 2, 2)[list(images)], 6)

    together = sent(0, 1)
    torch.testing.assert_close(together, torch.cat([sent(0), sent(1)]), atol=0, rtol=0)
    for image, grid in ((0, [1.0, 0.6, 0.0]), (1, [1.0, 0.9, 0.7, 0.2, 0.0])):
        fixed = FlowAdamsBashforthScheduler(grid=grid)
        wanted = end_of(fixed, torch.linspace(-1, 1, 8).view(2, 1, 2, 2)[[image]], len(grid) - 1)
        torch.testing.assert_close(together[[image]], wanted, atol=1e-6, rtol=1e-6)


def test_orders_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="solver_order must be 1"):
        PolicyScheduler(solver_order=3)  # type: ignore[arg-type]


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
