"""The official step-wise choice among three networks with 1, 4 and 16 mediators, and the same with one network."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from flowaccel import Mediators, MediatorSchedule, SiTPipeline, accelerated, report
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.mediators.schedule import Switching, measured
from flowaccel.samplers import FlowSDEScheduler
from helpers import assert_close, golden

FILE = golden("mediator_switch")
CASES: dict[str, Any] = FILE.notes["cases"]
COUNTS: list[int] = FILE.notes["mediator_num"]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}
CASE = pytest.mark.parametrize("case", CASES)


def schedule(case: str, **options: Any) -> MediatorSchedule:
    pairs = tuple(zip(CASES[case]["rho"], COUNTS[1:], strict=True))
    first = FILE.notes["first_several"]
    return MediatorSchedule(
        start=COUNTS[0], distance=pairs, first=first, metric=CASES[case]["dist"], **{"decide": "batch", **options}
    )


def states(case: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise, and what every step came to."""
    name = "traj" if dtype == torch.float32 else "traj64"
    return torch.cat([FILE["in/z"].to(dtype)[None], FILE[f"{case}/{name}"]])


def numbers(case: str) -> list[int]:
    """Of mediators at every step."""
    return [COUNTS[place - 1] for place in FILE[f"{case}/active_network"].tolist()]


@CASE
def test_distances(case: str) -> None:
    path = states(case)
    found = [measured(a[None], b[None], CASES[case]["dist"])[0] for a, b in itertools.pairwise(path[1:-1])]
    assert_close(torch.stack(found), FILE[f"{case}/distance"], 1e-6)


@CASE
def test_the_rule(case: str) -> None:
    switching, path, used = Switching(schedule(case)), states(case), []
    for before, after in itertools.pairwise(path):
        used.append(switching.counts[0])
        switching.observe(after, before, after)
    assert used == numbers(case)


def test_the_cases_differ() -> None:
    """They switch at different steps, one of them over a network, and one never."""
    assert len({tuple(numbers(case)) for case in CASES}) == len(CASES)
    assert set(numbers("never")) == {COUNTS[0]} and COUNTS[1] not in numbers("mae_double")
    assert set(numbers("mae_a")) == set(COUNTS)


def networks(dtype: torch.dtype) -> dict[int, Any]:
    heads = FILE.config["num_heads"]
    return {
        count: MediatorSiTTransformer2DModel.from_official(
            FILE.group(f"net{place}/"), num_attention_heads=heads, sample_size=FILE.config["input_size"]
        ).to(dtype=dtype)
        for place, count in enumerate(COUNTS, 1)
    }


@CASE
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
@torch.no_grad()
def test_trajectories_of_three_networks(case: str, dtype: torch.dtype) -> None:
    choice, switching = networks(dtype), Switching(schedule(case))
    scheduler = FlowSDEScheduler("euler", "sigma", last_step="mean", last_step_size=0.04)
    scheduler.set_timesteps(FILE.notes["num_steps"])
    sample, reached, used = FILE["in/z"].to(dtype), [], []
    noises = [*FILE["in/noise"].to(dtype), None]
    for evaluation, timestep, noise in zip(scheduler.evaluations, scheduler.timesteps, noises, strict=True):
        used.append(switching.counts[0])
        velocity = -choice[used[-1]](sample, 1 - evaluation.sigma, FILE["in/y"]).sample
        result = scheduler.step(velocity, timestep, sample, variance_noise=noise, return_dict=False)[0]
        switching.observe(velocity, sample, result)
        sample = result
        reached.append(sample)
    assert used == numbers(case)
    assert_close(torch.stack(reached), states(case, dtype)[1:], TOLERANCES[dtype])


class Replay(FlowSDEScheduler):
    """Comes to the states that it is told, whatever the network says."""

    path: Tensor

    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        super()._advance(index, velocity, sample)
        return self.path[index + 1].to(sample)


def replayed(case: str, batch: slice = slice(None), **options: Any) -> list[tuple[int, ...]]:
    """The mediators of every step of a pipeline with one network, led along the official states."""
    torch.manual_seed(0)
    base = tiny.sit_network(in_channels=4)
    pipe = SiTPipeline(base, Replay())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.path = states(case)[:, batch]
    network = MediatorSiTTransformer2DModel.from_base(base, {"counts": tuple(COUNTS)})
    with accelerated(pipe, Mediators(network, schedule=schedule(case, **options))):
        labels = FILE["in/y"][batch].clamp(max=9).tolist()
        pipe(labels, num_inference_steps=FILE.notes["num_steps"], guidance_scale=1.0, output_type="latent")
        return [found.counts for found in report(pipe).stats("mediators")]


@CASE
def test_a_pipeline_switches_at_the_same_steps(case: str) -> None:
    assert replayed(case) == [(number,) * 2 for number in numbers(case)]


def test_alone_an_image_decides_as_the_official_rule_with_a_batch_of_one() -> None:
    together = replayed("mae_a", decide="image")
    alone = [replayed("mae_a", slice(row, row + 1), decide="batch") for row in range(2)]
    assert together == [first + second for first, second in zip(*alone, strict=True)]
    assert {len(set(images)) for images in together} == {1, 2}, "they switch at different steps"
