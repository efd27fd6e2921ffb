"""FlowTurbo's blocks: the string, the counts, the identities, the refiner modes and where a run may begin.

Velocities are noise - data and widths negative, as in diffusers. The golden tests compare with the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel import FlowRungeKuttaScheduler, FlowTurboScheduler, VelocityRefiner, accelerate, restore
from flowaccel.methods.flowturbo.accelerator import new_refiner
from flowaccel.samplers import Blocks
from helpers import assert_close, counted, walk
from tiny import latent_sit_pipeline

MODES = ("released", "consistent", "single")


def scheduler(blocks: str, mode: Any = "released", **grid: Any) -> FlowTurboScheduler:
    made = FlowTurboScheduler(blocks, mode, **grid)
    made.set_timesteps(made.default_num_inference_steps)
    return made


def waves(sample: Tensor, sigma: float) -> Tensor:
    return torch.sin(3 * sample) + sigma


# --- the string


@pytest.mark.parametrize(
    ("text", "counts", "kinds"),
    [
        ("H2P4R2", (2, 4, 2), "HHPPPPRR"),
        ("H3R2", (3, 0, 2), "HHHRR"),
        ("P3", (0, 3, 0), "PPP"),
        ("H1", (1, 0, 0), "H"),
        ("P2R1", (0, 2, 1), "PPR"),
        ("H0P3R0", (0, 3, 0), "PPP"),
        ("H10P0R05", (10, 0, 5), "H" * 10 + "R" * 5),
    ],
)
def test_strings(text: str, counts: tuple[int, int, int], kinds: str) -> None:
    blocks = Blocks.parse(text)
    assert (blocks.heun, blocks.pseudo, blocks.refine) == counts
    assert blocks.total == len(kinds)
    assert blocks.kinds == kinds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must look like 'H2P4R2'"),
        ("H", "must look like 'H2P4R2'"),
        ("P2H1", "must look like 'H2P4R2'"),
        ("h2", "must look like 'H2P4R2'"),
        ("H2 P4", "must look like 'H2P4R2'"),
        ("H2P4R2\n", "must look like 'H2P4R2'"),
        ("H-1P4", "must look like 'H2P4R2'"),
        ("H2H2", "must look like 'H2P4R2'"),
        ("8", "must look like 'H2P4R2'"),
        ("R3", "put at least one H or P step first, got 'R3'"),
        ("H0P0R2", "put at least one H or P step first, got 'H0P0R2'"),
        ("H0P0R0", "must hold at least one step, got 'H0P0R0'"),
    ],
)
def test_wrong_strings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blocks.parse(text)
    with pytest.raises(ValueError, match=message):
        FlowTurboScheduler(text)


@pytest.mark.parametrize("steps", [7, 9])
def test_step_count_must_fit(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_inference_steps must be 8 for blocks 'H2P4R2' .* got {steps}"):
        FlowTurboScheduler("H2P4R2").set_timesteps(steps)


# --- counts


COUNTS = ["H4", "H1", "P1", "P5", "H2P3", "H1P5R3", "H2P4R2", "H3R2", "P3R2", "H1P1R1", "H5P7R3", "H8P9R5", "P1R4"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", COUNTS)
def test_evaluation_counts(text: str, mode: str) -> None:
    """2 H + P, one more where P comes first; two refiner calls a step, or one."""
    made = scheduler(text, mode)
    blocks, base, refiner = made.blocks, 0, 0
    sample = torch.ones(1, 1)
    for evaluation, timestep in zip(made.evaluations, made.timesteps, strict=True):
        refinement = made.refinement
        base, refiner = base + (refinement is None), refiner + (refinement is not None)
        output = waves(sample, evaluation.sigma) if refinement is None else refinement.base
        sample = made.step(output, timestep, sample, return_dict=False)[0]
    assert base == 2 * blocks.heun + blocks.pseudo + (blocks.heun == 0 and blocks.pseudo > 0)
    assert refiner == blocks.refine * (1 if mode == "single" else 2)


@pytest.mark.parametrize("mode", MODES)
def test_evaluations_of_the_networks(mode: str) -> None:
    """With guidance every call holds both halves."""
    pipe = latent_sit_pipeline(FlowTurboScheduler("H1P2R2", mode))
    refiner = new_refiner(pipe.transformer)
    with counted(pipe.transformer) as base, counted(refiner) as refined:
        accelerate(pipe, VelocityRefiner(refiner))
        pipe([1, 2, 3], output_type="latent")
        restore(pipe)
    assert base == [6] * 4
    assert refined == [6] * (2 if mode == "single" else 4)


# --- identities


@pytest.mark.parametrize("count", [1, 2, 5])
def test_first_pseudo_step_is_a_heun_step(count: int) -> None:
    start = torch.randn(2, 3)
    one, other = scheduler(f"H1P{count}"), scheduler(f"P{count + 1}")
    assert torch.equal(one.timesteps, other.timesteps)
    for left, right in zip(walk(one, waves, start), walk(other, waves, start), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_alone_is_the_runge_kutta_sampler(shift: float) -> None:
    start = torch.randn(2, 3, dtype=torch.float64)
    other = FlowRungeKuttaScheduler("heun", shift=shift)
    other.set_timesteps(5)
    one = scheduler("H5", shift=shift)
    assert torch.equal(one.timesteps, other.timesteps)
    for left, right in zip(walk(one, waves, start), walk(other, waves, start), strict=True):
        assert_close(left, right, 1e-13)


def test_heun_alone_is_the_runge_kutta_sampler_in_the_pipeline() -> None:
    latents = torch.randn(2, 4, 8, 8)
    images = [
        latent_sit_pipeline(made)([1, 2], num_inference_steps=3, latents=latents, output_type="latent").images
        for made in (FlowTurboScheduler("H3"), FlowRungeKuttaScheduler("heun"))
    ]
    assert_close(images[0], images[1], 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ["H1R3", "H1P2R3", "P1R2"])
def test_zero_refiner_keeps_the_velocity(text: str, mode: str) -> None:
    """Every R step is x + width * c; a fresh refiner returns 0."""
    pipe = latent_sit_pipeline(FlowTurboScheduler(text, mode))
    made = pipe.scheduler
    ends: list[tuple[int, Tensor, Tensor | None, Tensor | None]] = []

    def record(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append((made.evaluations[index].step, tensors["latents"], made.state, made.velocity_cache))
        return {}

    accelerate(pipe, VelocityRefiner(new_refiner(pipe.transformer)))
    pipe([3, 4], output_type="latent", guidance_channels="all", callback_on_step_end=record)
    restore(pipe)
    first = made.blocks.heun + made.blocks.pseudo
    _, _, state, velocity = [end for end in ends if end[0] == first - 1][-1]
    assert state is not None and velocity is not None
    for step in range(first, made.blocks.total):
        state = state + made.width(step) * velocity
        _, latents, reached, carried = [end for end in ends if end[0] == step][-1]
        assert_close(latents, state[:2], 1e-5)
        if reached is not None and carried is not None:  # freed after the last step
            assert_close(reached[:2], state[:2], 1e-5)
            assert_close(carried, velocity, 1e-5)


# --- the refiner step, worked by hand on scalars


def refined_walk(made: FlowTurboScheduler, offset: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """States after each step for v(x) = x from x = 1."""
    sample, ends = torch.ones(1, dtype=torch.float64), []
    for index, timestep in enumerate(made.timesteps):
        refinement = made.refinement
        output = sample if refinement is None else refinement.base + offset(sample, refinement.feed)
        sample = made.step(output, timestep, sample, return_dict=False)[0]
        following = made.evaluations[index + 1].step if index + 1 < len(made.evaluations) else None
        if following != made.evaluations[index].step:
            ends.append(sample.item())
    return ends


@pytest.mark.parametrize(
    ("mode", "states"),
    [
        # Width -1/3, r(x; v) = v / 10 + x / 5. H: d = 1, e = 2/3, x = 13/18 in every mode.
        # released: c = 2/3. R: d = c + c/10 + x/5 = 79/90, e = d + c/10 + (x - d/3)/5, carries d; and so on.
        ("released", [13 / 18, 1637 / 4050, 70937 / 1822500]),
        # consistent: c = 1 (H hands over d). R: d = 56/45, e = d + d/10 + (x - d/3)/5.
        ("consistent", [13 / 18, 2239 / 8100, -1570489 / 7290000]),
        # single: c = 2/3. R: d = 79/90, x - d/3.
        ("single", [13 / 18, 58 / 135, 641 / 8100]),
    ],
)
def test_refiner_step_by_hand(mode: str, states: list[float]) -> None:
    found = refined_walk(scheduler("H1R2", mode), lambda sample, feed: feed / 10 + sample / 5)
    assert found == pytest.approx(states, abs=1e-12)


def test_what_the_refiner_is_fed() -> None:
    """`released` feeds c twice, `consistent` feeds the second call d."""
    feeds: dict[str, list[float]] = {}
    for mode in MODES:
        seen: list[float] = []

        def offset(sample: Tensor, feed: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(feed.item())
            return torch.ones_like(feed)

        refined_walk(scheduler("H1R1", mode), offset)
        feeds[mode] = seen
    assert feeds["released"] == pytest.approx([0.5, 0.5])  # e of the Heun step: 1 - 1/2
    assert feeds["consistent"] == pytest.approx([1.0, 2.0])  # d of the Heun step, then d + 1
    assert feeds["single"] == pytest.approx([0.5])


def test_consistent_mode_only_changes_what_the_first_refiner_step_gets() -> None:
    """H and P still carry e to a P step."""
    start = torch.randn(3, dtype=torch.float64)
    one, other = scheduler("H2P3", "consistent"), scheduler("H2P3", "released")
    assert torch.equal(walk(one, waves, start)[-1], walk(other, waves, start)[-1])


# --- beginning midway


def v(x: float) -> float:
    return 2 * x


def midway(made: FlowTurboScheduler, begin: int, x: float) -> tuple[list[float], list[bool]]:
    """Samples after each evaluation from `begin` on for v(x) = 2x, and where the refiner was due (its offset is 0)."""
    made.set_begin_index(begin)
    sample, samples, refined = torch.tensor([x], dtype=torch.float64), [], []
    for timestep in made.timesteps[begin:]:
        refinement = made.refinement
        refined.append(refinement is not None)
        output = 2 * sample if refinement is None else refinement.base
        sample = made.step(output, timestep, sample, return_dict=False)[0]
        samples.append(sample.item())
    return samples, refined


def test_corrector_entry_before_a_pseudo_step_uses_its_velocity() -> None:
    """H1P1 from the corrector at 1/2: the state is taken as it is, and P starts from v there."""
    samples, refined = midway(scheduler("H1P1"), 1, 1.0)
    ahead = 1 - v(1) / 2
    assert samples == pytest.approx([ahead, 1 - (v(1) + v(ahead)) / 4])
    assert refined == [False, False]


def test_corrector_entry_before_a_heun_step_computes_anew() -> None:
    samples, _ = midway(scheduler("H2"), 1, 1.0)
    ahead = 1 - v(1) / 2
    assert samples == pytest.approx([1.0, ahead, 1 - (v(1) + v(ahead)) / 4])


def test_corrector_entry_before_a_refiner_step_is_refined() -> None:
    """The velocity found there is at the time of the R step: it is what the refiner gets."""
    samples, refined = midway(scheduler("H1R1"), 1, 1.0)
    assert refined == [False, True, True]
    assert samples == pytest.approx([1.0, 1 - v(1) / 2, 1 - v(1) / 2])


def test_refiner_entry_first_evaluates_the_base() -> None:
    """Nothing is carried yet: the first evaluation of the R step is the network's own."""
    made = scheduler("H1R2")
    samples, refined = midway(made, 2, 1.0)
    assert refined == [False, True, True, True]
    assert samples[1] == pytest.approx(1 - v(1) / 3)
    single = scheduler("H1R2", "single")
    assert midway(single, 2, 1.0)[1] == [False, True]


def test_pseudo_entry() -> None:
    """A P step has one entry, at its end; the next starts there with the velocity found."""
    samples, _ = midway(scheduler("P3"), 2, 1.0)
    ahead = 1 - v(1) / 3
    assert samples == pytest.approx([ahead, 1 - (v(1) + v(ahead)) / 6])


def test_last_corrector_entry_returns_the_sample() -> None:
    assert midway(scheduler("H2"), 3, 1.0)[0] == [1.0]


def test_heun_entry_starts_afresh() -> None:
    samples, _ = midway(scheduler("H2"), 2, 1.0)
    ahead = 1 - v(1) / 2
    assert samples == pytest.approx([ahead, 1 - (v(1) + v(ahead)) / 4])


# --- state


def test_state_is_freed_after_the_run() -> None:
    made = scheduler("H1P1R1")
    assert made.state is None and made.velocity_cache is None and made.refinement is None
    sample, filled = torch.ones(1), []
    for timestep in made.timesteps:
        sample = made.step(sample, timestep, sample, return_dict=False)[0]
        filled.append(made.state is not None and made.velocity_cache is not None)
    assert filled == [True] * (len(made.timesteps) - 1) + [False]
    assert made.state is None and made.velocity_cache is None and made.refinement is None


def test_state_and_cache_of_a_heun_step() -> None:
    made = scheduler("H1P1")
    sample = made.step(torch.tensor([2.0]), made.timesteps[0], torch.tensor([1.0]), return_dict=False)[0]
    assert sample.item() == 0.0  # 1 - 2 / 2
    assert made.state is not None and made.state.item() == 1.0
    sample = made.step(torch.tensor([3.0]), made.timesteps[1], sample, return_dict=False)[0]
    assert made.state.item() == pytest.approx(-0.25)  # 1 - (2 + 3) / 4
    assert made.velocity_cache is not None and made.velocity_cache.item() == 3.0
    assert sample.item() == pytest.approx(-0.25 - 3 / 2)  # what the P step's one evaluation sees


def test_new_timesteps_clear_the_state() -> None:
    made = scheduler("H1P1R1")
    made.step(torch.ones(1), made.timesteps[0], torch.ones(1))
    assert made.state is not None
    made.set_timesteps(3)
    assert made.state is None and made.velocity_cache is None and made.step_index is None
