"""Options of the refiner's training loss beside the published ones."""

from __future__ import annotations

import torch

from flowaccel.methods.flowturbo.accelerator import new_refiner
from flowaccel.methods.flowturbo.train import refiner_terms
from helpers import assert_close
from tiny import latent_sit

TEACHER = latent_sit()
REFINER = new_refiner(TEACHER)
STATE = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS, TIMES = torch.tensor([3, 1, 4, 9]), torch.tensor([0.0, 0.42, 0.7, 0.985])
NOBODY = torch.zeros(4, dtype=torch.bool)


@torch.no_grad()
def test_teacher_sees_the_label_unless_both_are_dropped() -> None:
    """The published code keeps the label for the velocity that is fed; `drop_both` is the paper's text."""
    dropped, delta = torch.tensor([True, False, True, False]), torch.tensor([0.05])
    kept = refiner_terms(REFINER, TEACHER, STATE, TIMES, delta, LABELS, dropped, null_label=10)
    both = refiner_terms(REFINER, TEACHER, STATE, TIMES, delta, LABELS, dropped, null_label=10, drop_both=True)
    null = TEACHER(STATE, TIMES, torch.full_like(LABELS, 10)).sample
    conditional = TEACHER(STATE, TIMES, LABELS).sample
    assert_close(kept.velocity, conditional, 1e-6)
    assert_close(both.velocity[dropped], null[dropped], 1e-6)
    assert_close(both.velocity[~dropped], conditional[~dropped], 1e-6)
    assert (conditional - null).abs().max() > 1e-2


@torch.no_grad()
def test_clamp_keeps_the_time_at_or_below_one() -> None:
    found = refiner_terms(
        REFINER, TEACHER, STATE, TIMES, torch.tensor([0.1]), LABELS, NOBODY, null_label=10, clamp=True
    )
    assert_close(found.next_time, torch.tensor([0.1, 0.52, 0.8, 1.0]), 1e-6)
    widths = (found.next_time - TIMES).reshape(-1, 1, 1, 1)
    assert_close(found.next_state, STATE + widths * found.velocity, 1e-6)


@torch.no_grad()
def test_guided_velocity_is_fed() -> None:
    found = refiner_terms(
        REFINER, TEACHER, STATE, TIMES, torch.tensor([0.1]), LABELS, NOBODY, null_label=10, guidance_scale=3.0
    )
    null = TEACHER(STATE, TIMES, torch.full_like(LABELS, 10)).sample
    conditional = TEACHER(STATE, TIMES, LABELS).sample
    assert_close(found.velocity, null + 3 * (conditional - null), 1e-5)
    assert_close(found.target, TEACHER(found.next_state, found.next_time, LABELS).sample, 1e-6)


@torch.no_grad()
def test_step_length_may_differ_per_image() -> None:
    delta = torch.tensor([0.01, 0.02, 0.03, 0.04])
    found = refiner_terms(REFINER, TEACHER, STATE, TIMES, delta, LABELS, NOBODY, null_label=10)
    assert_close(found.next_time, TIMES + delta, 1e-6)
    assert_close(found.next_state, STATE + delta.reshape(-1, 1, 1, 1) * found.velocity, 1e-6)


def test_fresh_refiner_says_that_the_velocity_stays() -> None:
    found = refiner_terms(REFINER, TEACHER, STATE, TIMES, torch.tensor([0.1]), LABELS, NOBODY, null_label=10)
    assert not found.offset.any()
    assert not found.target.requires_grad
    assert not found.next_state.requires_grad
    assert_close(found.loss.detach(), (found.velocity - found.target).square().flatten(1).mean(1), 1e-6)
