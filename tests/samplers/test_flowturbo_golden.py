"""FlowTurbo's blocks, block by block, as the published code computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel import FlowTurboScheduler, SiTPipeline, SiTTransformer2DModel, VelocityRefiner, accelerate, restore
from flowaccel.pipelines.sit_blocks import guide
from helpers import assert_close, counted, golden

FILE = golden("flowturbo_hpr")
CASES = sorted({key.split("/")[1] for key in FILE.tensors if key.startswith("out/")})
ALTERNATIVES = sorted({key.split("/")[1] for key in FILE.tensors if key.startswith("alt/")})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def parse(case: str) -> tuple[str, float]:
    blocks, _, scale = case.partition("_cfg")
    return blocks, float(scale)


def pipeline(blocks: str, mode: Any = "released", dtype: torch.dtype = torch.float32) -> SiTPipeline:
    pipe = SiTPipeline(FILE.network("base/", dtype), FlowTurboScheduler(blocks, mode))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refiner() -> SiTTransformer2DModel:
    """It computes 8 channels and returns 4, from 8 input channels."""
    network = FILE.network("refiner/", out_channels=FILE.config["in_channels"])
    assert network.config.in_channels == 8 and network.config.learn_sigma and network.config.num_layers == 1
    return network


def attach(pipe: SiTPipeline) -> None:
    if pipe.scheduler.blocks.refine:
        accelerate(pipe, VelocityRefiner(refiner()))


@torch.no_grad()
def states_and_caches(pipe: SiTPipeline, scale: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """State and carried velocity after each block, and the final state; both halves of the doubled batch.

    As in the published code the first half replaces the second in front of the network only.
    """
    scheduler, sample = pipe.scheduler, FILE["in/z_cfg"].to(pipe.transformer.dtype)
    scheduler.set_timesteps(scheduler.default_num_inference_steps)
    states, caches = [], []
    for index, timestep in enumerate(scheduler.timesteps):
        evaluation = scheduler.evaluations[index]
        seen = sample.chunk(2)[0].repeat(2, 1, 1, 1)
        output = pipe.transformer(seen, 1 - evaluation.sigma, FILE["in/y_cfg"]).sample
        sample = scheduler.step(-guide(output, scale, 3), timestep, sample, return_dict=False)[0]
        ended = index + 1 == len(scheduler.timesteps) or scheduler.evaluations[index + 1].step > evaluation.step
        if ended and scheduler.state is not None:
            states.append(scheduler.state)
            caches.append(-scheduler.velocity_cache)
    return [*states, sample], caches, sample


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_every_block(case: str, dtype: torch.dtype) -> None:
    """The last carried velocity is not compared: the scheduler frees it with the run."""
    blocks, scale = parse(case)
    pipe = pipeline(blocks, dtype=dtype)
    attach(pipe)
    states, caches, final = states_and_caches(pipe, scale)
    assert_close(torch.stack(states), FILE[f"out/{case}/x_after_block"], 1e-5)
    assert_close(torch.stack(caches), FILE[f"out/{case}/cache_after_block"][:-1], 2e-5 if scale == 4 else 1e-5)
    if dtype == torch.float64:
        assert_close(final, FILE[f"out64/{case}/latents"], 1e-6)
    else:
        assert_close(final, FILE[f"out/{case}/latents"], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_pipeline_and_evaluation_counts(case: str) -> None:
    blocks, scale = parse(case)
    pipe = pipeline(blocks)
    small = refiner()
    with counted(pipe.transformer) as base_calls, counted(small) as refiner_calls:
        accelerate(pipe, [VelocityRefiner(small)] if pipe.scheduler.blocks.refine else [])
        labels = FILE["in/y"].tolist()
        final = pipe(labels, guidance_scale=scale, latents=FILE["in/z"], output_type="latent").images
        restore(pipe)
    assert_close(final, FILE[f"out/{case}/final"], 1e-5)
    assert {"base": len(base_calls), "refiner": len(refiner_calls)} == FILE.notes["evals"][case]
    assert set(base_calls) == {4 if scale > 1 else 2}


@DTYPES
@pytest.mark.parametrize("blocks", ALTERNATIVES)
def test_consistent_refiner_mode(blocks: str, dtype: torch.dtype) -> None:
    """The repository's other sampler: H hands over the velocity at its start, and R feeds d to its second call."""
    pipe = pipeline(blocks, "consistent", dtype)
    attach(pipe)
    states, _, _ = states_and_caches(pipe, 1.5)
    group, tolerance = ("alt", 1e-5) if dtype == torch.float32 else ("alt64", 1e-6)
    trajectory = FILE[f"{group}/{blocks}/traj"]
    assert_close(torch.stack([FILE["in/z_cfg"].to(dtype), *states]), trajectory, tolerance)
