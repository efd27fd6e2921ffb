"""Policies are trained on a flow whose best number of steps is known: a line, Euler's method, and the discount."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.methods.policy.heads import JUMP_MARGIN, jump_mode
from flowaccel.methods.policy.network import COUNT, STEP, AccelerationPolicy, Choices
from flowaccel.methods.policy.train.objective import (
    PolicyStats,
    advantages,
    discounted_reward,
    early_limits,
    equivalent_steps,
    log_probs,
    policy_loss,
)

# dx/dt = POWER x / t from START to END, solved by x(t) = x(START) (t / START)^POWER. An Euler step that leaves the
# share a of the time multiplies x by 1 - POWER (1 - a) where a^POWER is right. Its logarithmic error is convex in
# log a, so of all ways to take N steps equal shares are best.
POWER, START, END = 0.5, 1000.0, 10.0
HARM, DISCOUNT = 1.2, 0.8
GROUPS, SIZE = 4, 16
COUNTS, HARMS = (2, 4, 8, 16, 28), (HARM / 2, 2 * HARM)
"""To choose from at once; the second kind of images is harder."""


def log_error(share: Tensor) -> Tensor:
    return (1 - POWER * (1 - share)).log() - POWER * share.log()


def best_reward(steps: int, harm: float = HARM) -> float:
    share = torch.tensor((END / START) ** (1 / steps), dtype=torch.float64)
    literal = sum(DISCOUNT ** (steps - k) for k in range(1, steps + 1)) / steps
    return math.exp(-harm * steps * float(log_error(share))) * literal


OPTIMUM = max(range(1, 60), key=best_reward)
BEST_COUNTS = tuple(max(COUNTS, key=lambda count: best_reward(count, harm)) for harm in HARMS)


def small_policy(**config: Any) -> AccelerationPolicy:
    torch.manual_seed(0)
    return AccelerationPolicy(in_channels=1, condition_dim=2, width=8, **{"levels": (STEP,), **config})


@torch.no_grad()
def rollout(
    actor: AccelerationPolicy, images: int, limits: tuple[float, float] | None = None
) -> tuple[dict[str, Choices], Tensor, Tensor]:
    """What was chosen, the quality and the steps (images,) of each; without limits, what is likeliest is chosen."""
    time, x, error = torch.full((images,), START), torch.ones(images), torch.zeros(images)
    seen: list[Choices] = []
    while bool((time > END).any()):
        rows = (time > END).nonzero().flatten()
        now = time[rows]
        features = (POWER * x[rows] * START / now).reshape(-1, 1, 1, 1)
        condition = torch.stack([(now / START).log(), torch.ones_like(now)], dim=1)
        if limits is None:
            action = jump_mode(actor(STEP, features, condition))
        else:
            action = actor.distribution(STEP, features, condition).sample().clamp(JUMP_MARGIN, 1 - JUMP_MARGIN)
        low, high = limits or (0.0, 1.0)
        following = (now * action).floor().maximum(low * now).minimum(high * now)
        share = following.clamp_min(END) / now
        error[rows] += log_error(share)
        x[rows] *= 1 - POWER * (1 - share)
        time[rows] = following
        seen.append(Choices(rows, features, condition, action))
    chosen = Choices(*(torch.cat([getattr(s, name) for s in seen]) for name in Choices.__dataclass_fields__))
    rows = chosen.image
    computed = equivalent_steps(rows, torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows), images, None)
    torch.testing.assert_close((x / (END / START) ** POWER).log(), error, rtol=1e-3, atol=1e-4)
    return {STEP: chosen}, (-HARM * error).exp(), computed


@torch.no_grad()
def one_shot(
    actor: AccelerationPolicy, images: int, limits: tuple[float, float] | None = None
) -> tuple[dict[str, Choices], Tensor, Tensor]:
    """As `rollout`, in as many equal shares as are chosen at first; the groups are of the one kind and the other."""
    kind = torch.arange(images) // SIZE % len(HARMS)
    features, condition = torch.full((images, 1, 1, 1), POWER), torch.stack([kind, 1 - kind], dim=1).float()
    likely = actor.distribution(COUNT, features, condition)
    action = likely.logits.argmax(dim=1) if limits is None else likely.sample()
    steps = torch.tensor(COUNTS)[action]
    error = steps * log_error((END / START) ** (1 / steps))
    chosen = Choices(torch.arange(images), features, condition, action)
    return {COUNT: chosen}, (-torch.tensor(HARMS)[kind] * error).exp(), steps.float()


Play = Callable[[AccelerationPolicy, int, tuple[float, float] | None], tuple[dict[str, Choices], Tensor, Tensor]]


def trained(
    estimator: str, per_decision: bool, updates: int, actor: AccelerationPolicy, play: Play
) -> tuple[AccelerationPolicy, list[PolicyStats]]:
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-5, weight_decay=0)
    watched = []
    for update in range(updates):
        choices, quality, steps = play(actor, GROUPS * SIZE, early_limits(update / updates))
        rewards = discounted_reward(quality, steps, DISCOUNT).reshape(GROUPS, SIZE)
        worth = advantages(rewards, estimator)  # type: ignore[arg-type]
        with torch.no_grad():
            old = log_probs(actor, choices)
        for _ in range(2):
            loss, stats = policy_loss(actor, choices, old, worth, per_decision=per_decision)
            watched.append(stats)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
    return actor, watched


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "per_decision"), [("grpo", False), ("grpo", True), ("rloo", False)])
def test_the_known_optimum_is_found(estimator: str, per_decision: bool) -> None:
    at_first = float(rollout(small_policy(), 1)[2])
    assert at_first > OPTIMUM + 3
    actor, watched = trained(estimator, per_decision, 150, small_policy(), rollout)
    _, quality, steps = rollout(actor, 1)
    assert abs(float(steps) - OPTIMUM) <= 1
    reached = float(discounted_reward(quality, steps, DISCOUNT))
    assert 0.93 * best_reward(OPTIMUM) < reached <= best_reward(OPTIMUM) * (1 + 1e-5)
    for fresh in watched[::2]:
        assert fresh.ratio == 1 and fresh.clip_fraction == 0 and fresh.kl == 0
    # so that this is no property of the numbers watched; once the optimum is found, nothing moves
    assert all(second.kl > 0 for second in watched[1:20:2])


@pytest.mark.slow
def test_the_best_number_of_steps_of_every_kind_is_found() -> None:
    actor, _ = trained("grpo", False, 150, small_policy(levels=(COUNT,), counts=COUNTS), one_shot)
    _, _, steps = one_shot(actor, len(HARMS) * SIZE)
    assert steps[::SIZE].tolist() == list(BEST_COUNTS)


def test_the_best_numbers_of_steps_are_inside() -> None:
    """So that neither the fewest nor the most pass for them, nor one number for all; and so that they stand out."""
    for best, harm in zip(BEST_COUNTS, HARMS, strict=True):
        place = COUNTS.index(best)
        assert 0 < place < len(COUNTS) - 1
        assert best_reward(best, harm) > 1.02 * max(best_reward(COUNTS[place + side], harm) for side in (-1, 1))
    assert len(set(BEST_COUNTS)) == len(HARMS)


def test_the_optimum_is_inside() -> None:
    """So that neither the fewest nor the most steps pass for it, nor what a policy does untrained."""
    assert 4 <= OPTIMUM <= 10
    assert best_reward(OPTIMUM) > 1.02 * max(best_reward(OPTIMUM - 2), best_reward(OPTIMUM + 2))


def test_equal_shares_are_best() -> None:
    shares = torch.rand(5000, OPTIMUM, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    logs = math.log(END / START) * shares / shares.sum(dim=1, keepdim=True)
    equal = torch.full((OPTIMUM,), math.log(END / START) / OPTIMUM, dtype=torch.float64)
    assert (log_error(logs.exp()).sum(dim=1) >= log_error(equal.exp()).sum() - 1e-12).all()
