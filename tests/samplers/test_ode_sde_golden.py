"""Trajectories of SiT's deterministic and stochastic samplers.

One official case is left out: `ode_euler_n6_reverse` runs from data to noise, and a diffusers scheduler only goes the
other way (`set_timesteps` refuses noise levels that rise).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel import SiTPipeline
from flowaccel.pipelines.sit_blocks import guide
from flowaccel.samplers import FlowRungeKuttaScheduler, FlowSDEScheduler
from helpers import Velocity, assert_close, golden, walk

FILE = golden("sit_ode_sde")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}
GROUPS = {torch.float32: "out", torch.float64: "out64"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SOLVERS = {"euler": "euler", "heun2": "heun", "midpoint": "midpoint", "rk4": "rk4"}


def velocity(dtype: torch.dtype, suffix: str) -> Velocity:
    """noise - data; with guidance of a doubled batch whose second half the network does not get to see."""
    network = golden("sit_tiny").network(dtype=dtype)
    labels = FILE[f"in/y{suffix}"]

    @torch.no_grad()
    def call(sample: Tensor, sigma: float) -> Tensor:
        if suffix:
            sample = sample.chunk(2)[0].repeat(2, 1, 1, 1)
        output = network(sample, 1 - sigma, labels).sample
        return -(guide(output, FILE.notes["cfg_scale"], 3) if suffix else output)

    return call


def trajectory(case: str, dtype: torch.dtype) -> Tensor:
    return FILE[f"{GROUPS[dtype]}/{case}/traj"]


ODE_CASES = {
    f"{case}{suffix}": (options, suffix)
    for case, options in FILE.notes["ode_cases"].items()
    for suffix in ("", "_cfg")
    if f"out/{case}{suffix}/traj" in FILE and options["sampling_method"] in SOLVERS and "reverse" not in options
}


def test_no_case_is_lost() -> None:
    stored = {key.split("/")[1] for key in FILE.tensors if key.startswith("out/ode")}
    assert stored - set(ODE_CASES) == {"ode_euler_n6_reverse", "ode_dopri5_n3"}
    assert {key.split("/")[1] for key in FILE.tensors if key.startswith("out/sde")} == set(SDE_CASES)


@DTYPES
@pytest.mark.parametrize("case", ODE_CASES)
def test_ode(case: str, dtype: torch.dtype) -> None:
    options, suffix = ODE_CASES[case]
    scheduler = FlowRungeKuttaScheduler(SOLVERS[options["sampling_method"]])
    scheduler.set_timesteps(options["num_steps"] - 1)  # the official count is of grid points
    stages = len(scheduler.tableau.c)
    start = FILE[f"in/z{suffix}"].to(dtype)
    samples = walk(scheduler, velocity(dtype, suffix), start)
    assert_close(torch.stack([start, *samples[stages - 1 :: stages]]), trajectory(case, dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("case", [case for case in ODE_CASES if case.endswith("_cfg")])
def test_ode_through_the_pipeline(case: str) -> None:
    solver = SOLVERS[ODE_CASES[case][0]["sampling_method"]]
    pipe = SiTPipeline(golden("sit_tiny").network(), FlowRungeKuttaScheduler(solver))
    pipe.set_progress_bar_config(disable=True)
    final = pipe(
        FILE["in/y_cfg"][:2].tolist(),
        num_inference_steps=5,
        guidance_scale=FILE.notes["cfg_scale"],
        latents=FILE["in/z_cfg"][:2],
        output_type="latent",
    ).images
    assert_close(final, trajectory(case, torch.float32)[-1][:2], 1e-5)


def test_adaptive_solution_is_met_by_fine_steps() -> None:
    """dopri5 with rtol 1e-3 against 50 steps of a fourth-order method."""
    scheduler = FlowRungeKuttaScheduler("rk4")
    scheduler.set_timesteps(50)
    final = walk(scheduler, velocity(torch.float64, ""), FILE["in/z"].double())[-1]
    expected = trajectory("ode_dopri5_n3", torch.float64)[-1]
    assert (final - expected).abs().max() < 1e-3 * expected.abs().max()


SDE_CASES = {
    f"{case}{suffix}": (options, suffix)
    for case, options in FILE.notes["sde_cases"].items()
    for suffix in ("", "_cfg")
    if f"out/{case}{suffix}/traj" in FILE
}


def sde(options: dict[str, Any]) -> FlowSDEScheduler:
    last = (options["last_step"] or "none").lower()
    scheduler = FlowSDEScheduler(
        options["sampling_method"].lower(),
        options["diffusion_form"],
        options["diffusion_norm"],
        last,
        options.get("last_step_size", 0.04),
    )
    # 6 official points are 5 stochastic updates and then the last step, where there is one
    scheduler.set_timesteps(options["num_steps"] - (last == "none"))
    return scheduler


@DTYPES
@pytest.mark.parametrize("case", SDE_CASES)
def test_sde(case: str, dtype: torch.dtype) -> None:
    options, suffix = SDE_CASES[case]
    scheduler, call, noises = sde(options), velocity(dtype, suffix), FILE[f"in/sde_noise{suffix}"].to(dtype)
    heun = options["sampling_method"] == "Heun"
    sample = FILE[f"in/z{suffix}"].to(dtype)
    if heun:
        sample = scheduler.prepare_sample(sample, variance_noise=noises[0])
    reached = []
    for evaluation, timestep in zip(scheduler.evaluations, scheduler.timesteps, strict=True):
        update = evaluation.step + (1 if heun else 0)  # Heun adds the noise of the update after
        noise = noises[update] if update < len(noises) else None
        output = call(sample, evaluation.sigma)
        sample = scheduler.step(output, timestep, sample, variance_noise=noise, return_dict=False)[0]
        if not heun:
            reached.append(sample)
        elif evaluation.stage == 1:
            t, width = 1 - scheduler.grid[update], -scheduler.width(update)
            added = noise * math.sqrt(2 * options["diffusion_norm"] * (1 - t) * width) if noise is not None else 0
            reached.append(sample - added)
        elif evaluation is scheduler.evaluations[-1]:
            reached.append(sample)
    if options["last_step"] is None:
        reached.append(reached[-1])  # the official trajectory repeats the state
    assert_close(torch.stack(reached), trajectory(case, dtype), TOLERANCES[dtype])
