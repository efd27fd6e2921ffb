"""What holds for every sampler: order of convergence, the grid, wrong use, no trace of a run, save and load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowaccel.samplers import (
    FlowAdamsBashforthScheduler,
    FlowRungeKuttaScheduler,
    FlowSampler,
    FlowSDEScheduler,
    FlowTurboScheduler,
)
from helpers import ALL_SAMPLERS, Velocity, assert_close, walk

EVERY = pytest.mark.parametrize("name", ALL_SAMPLERS)
DETERMINISTIC = pytest.mark.parametrize("name", [name for name in ALL_SAMPLERS if not name.startswith("sde")])
# those that begin every step with an evaluation at its start
STARTING = pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "rk4", "ab2", "flowturbo-h"])
CLASSES = (FlowTurboScheduler, FlowRungeKuttaScheduler, FlowAdamsBashforthScheduler, FlowSDEScheduler)
STEPS = 4


def make(name: str, steps: int = STEPS, **grid: Any) -> FlowSampler:
    return ALL_SAMPLERS[name][0](steps, **grid)


def ready(name: str, steps: int = STEPS) -> FlowSampler:
    scheduler = make(name, steps)
    scheduler.set_timesteps(steps)
    return scheduler


def start_of_step(scheduler: FlowSampler, step: int) -> int:
    return next(i for i, e in enumerate(scheduler.evaluations) if e.step == step and e.stage == 0)


def prepared(scheduler: FlowSampler, sample: Tensor, generator: torch.Generator) -> Tensor:
    """What the first evaluation sees; the stochastic Heun adds noise before it."""
    return scheduler.prepare_sample(sample, generator) if isinstance(scheduler, FlowSDEScheduler) else sample


def run(scheduler: FlowSampler, velocity: Velocity, sample: Tensor, steps: int = STEPS) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    scheduler.set_timesteps(steps)
    return walk(scheduler, velocity, prepared(scheduler, sample, generator), generator=generator)[-1]


def waves(sample: Tensor, sigma: float) -> Tensor:
    return torch.sin(3 * sample) + sigma


# --- order of convergence, on dx/dsigma = A x + B sigma

A, B = -1.5, 2.0


def linear(sample: Tensor, sigma: float) -> Tensor:
    return A * sample + B * sigma


def solution(start: Tensor) -> Tensor:
    """x(0) for x(1) = start."""
    return (start + B / A + B / A**2) * math.exp(-A) - B / A**2


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", [name for name, (_, order) in ALL_SAMPLERS.items() if order is not None])
def test_order_of_convergence(name: str, shift: float) -> None:
    """Regression of the logarithm of the error on that of the step."""
    order = ALL_SAMPLERS[name][1]
    start = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    counts = [8, 16, 32, 64] if order == 4 else [16, 32, 64, 128]
    errors = []
    for steps in counts:
        scheduler = make(name, steps, shift=shift)
        scheduler.set_timesteps(steps)
        errors.append((walk(scheduler, linear, start)[-1] - solution(start)).abs().max().log().item())
    steps_log = torch.tensor([-math.log(count) for count in counts], dtype=torch.float64)
    design = torch.stack([steps_log, torch.ones_like(steps_log)], dim=1)
    slope = torch.linalg.lstsq(design, torch.tensor(errors, dtype=torch.float64)[:, None]).solution[0].item()
    assert abs(slope - order) < 0.25


def test_explicit_methods_on_one_step() -> None:
    """One step of each on v = x, from 1: the truncated exponential series of -1."""
    expected = {"euler": 0.0, "heun": 0.5, "midpoint": 0.5, "rk4": 0.375, "ab2": 0.0}
    for name, value in expected.items():
        scheduler = ready(name, 1)
        final = walk(scheduler, lambda sample, sigma: sample, torch.ones(1, dtype=torch.float64))[-1]
        assert_close(final, torch.tensor([value], dtype=torch.float64), 1e-12)


def test_adams_bashforth_weighs_unequal_steps() -> None:
    """After its first step, which is Euler's, it is exact for a velocity that is linear in sigma, on any grid."""
    scheduler = FlowAdamsBashforthScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.6, 0.1])
    final = walk(scheduler, lambda sample, sigma: torch.full_like(sample, sigma), torch.zeros(1, dtype=torch.float64))
    assert_close(final[-1], torch.tensor([-0.3 * 1.0 - 0.7**2 / 2], dtype=torch.float64), 1e-12)


# --- the grid


@DETERMINISTIC
def test_default_grid_is_uniform_with_both_ends(name: str) -> None:
    scheduler = ready(name)
    assert scheduler.grid == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert scheduler.num_inference_steps == STEPS
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], 1e-6)
    assert scheduler.sigmas[-1] == 0
    assert [scheduler.width(step) for step in range(STEPS)] == [-0.25] * STEPS
    assert sum(scheduler.width(step) for step in range(STEPS)) == -1


def test_shifted_grid_is_that_of_the_stock_scheduler() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    scheduler = make("euler", shift=3.0)
    scheduler.set_timesteps(STEPS)
    assert_close(scheduler.sigmas, stock.sigmas, 1e-6)
    assert_close(scheduler.timesteps, stock.timesteps, 1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_that_of_the_stock_scheduler(kind: Any) -> None:
    options: dict[str, Any] = {"use_dynamic_shifting": True, "time_shift_type": kind}
    stock = FlowMatchEulerDiscreteScheduler(**options)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    scheduler = FlowTurboScheduler("P4", **options)
    scheduler.set_timesteps(STEPS, mu=0.8)
    assert_close(torch.tensor([*scheduler.grid]), stock.sigmas, 1e-6)


@DETERMINISTIC
def test_dynamic_shift_needs_mu(name: str) -> None:
    with pytest.raises(ValueError, match="mu must be given to set_timesteps"):
        make(name, use_dynamic_shifting=True).set_timesteps(STEPS)


@DETERMINISTIC
def test_custom_sigmas(name: str) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.3, 0.1])
    assert scheduler.num_inference_steps == STEPS
    assert scheduler.grid == [0.9, 0.6, 0.3, 0.1, 0.0]
    assert scheduler.timesteps[0] == 900


@DETERMINISTIC
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": [0.9, 0.9, 0.3, 0.1]}, r"sigmas must decrease, got \[0\.9, 0\.9"),
        ({"sigmas": [0.1, 0.3, 0.6, 0.9]}, "sigmas must decrease"),
        ({"sigmas": [1.1, 0.6, 0.3, 0.1]}, r"sigmas must lie in \(0, 1\], got \[1\.1"),
        ({"sigmas": [0.9, 0.6, 0.3, 0.0]}, r"sigmas must lie in \(0, 1\]"),
        ({"sigmas": [0.9, math.nan, 0.3, 0.1]}, r"sigmas must lie in \(0, 1\]"),
        ({"sigmas": []}, r"sigmas must lie in \(0, 1\]"),
        ({"sigmas": [0.9, 0.3], "num_inference_steps": 4}, "must have num_inference_steps = 4 entries, got 2"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({}, "num_inference_steps must be at least 1, got None"),
    ],
    ids=str,
)
def test_wrong_grids(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name).set_timesteps(**options)


def test_step_counts_that_the_stochastic_sampler_refuses() -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be at least 2 with last_step='mean', got 1"):
        FlowSDEScheduler().set_timesteps(1)
    FlowSDEScheduler(last_step="none").set_timesteps(1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FlowRungeKuttaScheduler, {"solver": "dopri5"}, "solver must be one of .* got 'dopri5'"),
        (FlowTurboScheduler, {"refiner_mode": "paper"}, "refiner_mode must be one of .* got 'paper'"),
        (FlowTurboScheduler, {"blocks": "R3"}, "put at least one H or P step first"),
        (FlowSDEScheduler, {"solver": "rk4"}, "solver must be one of .* got 'rk4'"),
        (FlowSDEScheduler, {"diffusion_form": "sbdm"}, "diffusion_form must be one of .* got 'sbdm'"),
        (FlowSDEScheduler, {"last_step": "Mean"}, "last_step must be one of .* got 'Mean'"),
        (FlowSDEScheduler, {"last_step_size": 1.0}, r"last_step_size must lie in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_options(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


# --- step


@EVERY
def test_step_before_set_timesteps(name: str) -> None:
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        make(name).step(torch.zeros(1, 1), 1000.0, torch.zeros(1, 1))


@EVERY
def test_step_too_often(name: str) -> None:
    scheduler = make(name)
    run(scheduler, waves, torch.ones(2, 1))
    count = len(scheduler.timesteps)
    assert scheduler.step_index == count
    with pytest.raises(ValueError, match=f"step was called {count + 1} times for {count} evaluations; call set_"):
        scheduler.step(torch.zeros(2, 1), scheduler.timesteps[-1], torch.zeros(2, 1))


@EVERY
def test_unknown_timestep(name: str) -> None:
    scheduler = ready(name)
    with pytest.raises(ValueError, match=r"timestep 123\.4\d* is not one of this run's timesteps \[1000\.0"):
        scheduler.step(torch.zeros(1, 1), 123.4, torch.zeros(1, 1))


@EVERY
@pytest.mark.parametrize("index", [-1, 100])
def test_begin_index_out_of_range(name: str, index: int) -> None:
    scheduler = ready(name)
    with pytest.raises(ValueError, match=f"begin index must be in 0 .. {len(scheduler.timesteps)}, got {index}"):
        scheduler.set_begin_index(index)


@EVERY
def test_nothing_to_run(name: str) -> None:
    """Image to image of strength 0 asks for it; what it has no use for is a step."""
    scheduler = ready(name)
    scheduler.set_begin_index(len(scheduler.timesteps))
    with pytest.raises(ValueError, match=f"begin index must be in 0 .. {len(scheduler.timesteps) - 1}"):
        scheduler.step(torch.zeros(1, 1), scheduler.timesteps[0], torch.zeros(1, 1))


@pytest.mark.parametrize("name", ["heun", "midpoint", "rk4"])
def test_runge_kutta_begins_at_a_step(name: str) -> None:
    with pytest.raises(ValueError, match=r"FlowRungeKuttaScheduler can only begin where a step starts, at \[0, \d"):
        ready(name).set_begin_index(1)


@STARTING
def test_begin_index_at_a_step_start(name: str) -> None:
    """From the second half of the steps on: the same as a run over that half of the grid alone."""
    scheduler = ready(name)
    begin = start_of_step(scheduler, 2)
    start = torch.randn(3, 2, dtype=torch.float64)
    scheduler.set_begin_index(begin)
    assert scheduler.begin_index == begin and scheduler.step_index is None
    final = walk(scheduler, linear, start, begin=begin)[-1]
    half = make(name, 2)
    half.set_timesteps(sigmas=[0.5, 0.25])
    assert_close(final, walk(half, linear, start)[-1], 1e-12)


@STARTING
def test_timestep_alone_finds_the_beginning(name: str) -> None:
    """As in image to image: without a begin index the timestep says where the run starts."""
    scheduler = ready(name)
    begin = 2 * scheduler.order
    assert begin == start_of_step(scheduler, 2)
    start = torch.randn(3, 2, dtype=torch.float64)
    found = walk(scheduler, linear, start, begin=begin)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(begin)
    for one, other in zip(found, walk(scheduler, linear, start, begin=begin), strict=True):
        assert torch.equal(one, other)


@EVERY
def test_set_timesteps_forgets_the_begin_index(name: str) -> None:
    scheduler = ready(name)
    scheduler.set_begin_index(len(scheduler.timesteps))
    scheduler.set_timesteps(STEPS)
    assert scheduler.begin_index is None


@EVERY
def test_return_dict_and_dtypes(name: str) -> None:
    """The arithmetic is float32 at least; what comes back has the dtype of the network's output."""
    start, output = torch.randn(1, 50), torch.randn(1, 50).bfloat16()
    samples = {}
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = ready(name)
        sample = prepared(scheduler, start, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        stepped = scheduler.step(output.to(dtype), scheduler.timesteps[0], sample, generator).prev_sample
        assert stepped.dtype == dtype
        samples[dtype] = stepped
    assert torch.equal(samples[torch.float32].bfloat16(), samples[torch.bfloat16])


@EVERY
def test_sample_is_not_scaled_and_not_written_to(name: str) -> None:
    scheduler = ready(name)
    sample = torch.randn(2, 3)
    assert scheduler.scale_model_input(sample, 1000.0) is sample
    kept = sample.clone()
    run(scheduler, waves, sample)
    assert torch.equal(sample, kept)


@EVERY
def test_scale_noise(name: str) -> None:
    sample, noise = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    scheduler = ready(name)
    assert_close(scheduler.scale_noise(sample, 250.0, noise), 0.75 * sample + 0.25 * noise, 1e-6)
    noised = scheduler.scale_noise(sample, torch.tensor([1000.0, 500.0, 0.0]), noise)
    assert_close(noised, torch.stack([noise[0], (sample[1] + noise[1]) / 2, sample[2]]), 1e-6)


# --- nothing is left behind


@EVERY
def test_same_run_twice(name: str) -> None:
    scheduler, start = make(name), torch.randn(2, 3)
    assert torch.equal(run(scheduler, waves, start), run(scheduler, waves, start))


@EVERY
@pytest.mark.parametrize("reached", [1, 2, 3])
def test_aborted_run_leaves_nothing_behind(name: str, reached: int) -> None:
    start = torch.randn(2, 3)
    expected = run(make(name), waves, start)
    scheduler = ready(name)
    generator = torch.Generator().manual_seed(9)
    sample = prepared(scheduler, 7 * start, generator)
    for timestep in scheduler.timesteps[:reached]:
        sample = scheduler.step(torch.ones_like(sample), timestep, sample, generator, return_dict=False)[0]
    assert torch.equal(run(scheduler, waves, start), expected)


@EVERY
def test_finished_run_holds_no_tensor_of_the_image(name: str) -> None:
    scheduler, start = make(name), torch.randn(5, 7)
    run(scheduler, waves, start)
    held = [
        key
        for key, value in vars(scheduler).items()
        for part in (value if isinstance(value, list) else [value])
        if isinstance(part, Tensor) and part.shape == start.shape
    ]
    assert held == []


# --- configuration


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowTurboScheduler("H1P5R3", "consistent", shift=2.5),
        FlowTurboScheduler("P4", use_dynamic_shifting=True, time_shift_type="linear"),
        FlowRungeKuttaScheduler("rk4", num_train_timesteps=500),
        FlowAdamsBashforthScheduler(shift=3.0),
        FlowSDEScheduler("heun", "decreasing", 2.0, "tweedie", 0.1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_save_and_load(scheduler: Any, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert public(loaded.config) == public(scheduler.config)
    steps = scheduler.default_num_inference_steps or 3
    for one in (scheduler, loaded):
        one.set_timesteps(steps, mu=0.5)
    assert torch.equal(loaded.timesteps, scheduler.timesteps)
    assert len(loaded) == scheduler.config.num_train_timesteps


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("kind", CLASSES)
def test_from_the_stock_schedulers_configuration(kind: Any) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500, max_shift=1.3)
    scheduler = kind.from_config(stock.config)
    assert scheduler.config.num_train_timesteps == 500
    assert scheduler.config.shift == 3.0
    assert FlowMatchEulerDiscreteScheduler in scheduler.compatibles
    if kind is not FlowSDEScheduler:
        assert scheduler.config.max_shift == 1.3
        back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        assert back.config.shift == 3.0
