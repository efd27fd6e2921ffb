"""Policies are trained on a flow whose best number of steps is known: a line, Euler's method, and the discount."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowaccel.models.policy import STEP, AccelerationPolicy, Choices
from flowaccel.modules.policy_heads import JUMP_MARGIN, jump_mode
from flowaccel.training.policy_objective import (
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


def log_error(share: Tensor) -> Tensor:
    return (1 - POWER * (1 - share)).log() - POWER * share.log()


def best_reward(steps: int) -> float:
    share = torch.tensor((END / START) ** (1 / steps), dtype=torch.float64)
    literal = sum(DISCOUNT ** (steps - k) for k in range(1, steps + 1)) / steps
    return math.exp(-HARM * steps * float(log_error(share))) * literal


OPTIMUM = max(range(1, 60), key=best_reward)


def small_policy() -> AccelerationPolicy:
    torch.manual_seed(0)
    return AccelerationPolicy(in_channels=1, condition_dim=2, levels=(STEP,), width=8)


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


def trained(estimator: str, per_decision: bool, updates: int) -> tuple[AccelerationPolicy, list[PolicyStats]]:
    actor = small_policy()
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-5, weight_decay=0)
    watched = []
    for update in range(updates):
        choices, quality, steps = rollout(actor, GROUPS * SIZE, early_limits(update / updates))
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
    actor, watched = trained(estimator, per_decision, updates=150)
    _, quality, steps = rollout(actor, 1)
    assert abs(float(steps) - OPTIMUM) <= 1
    reached = float(discounted_reward(quality, steps, DISCOUNT))
    assert 0.93 * best_reward(OPTIMUM) < reached <= best_reward(OPTIMUM) * (1 + 1e-5)
    for fresh in watched[::2]:
        assert fresh.ratio == 1 and fresh.clip_fraction == 0 and fresh.kl == 0
    # so that this is no property of the numbers watched; a step can be too small to be seen
    assert sum(second.kl > 0 for second in watched[1::2]) > len(watched) / 4


def test_the_optimum_is_inside() -> None:
    """So that neither the fewest nor the most steps pass for it, nor what a policy does untrained."""
    assert 4 <= OPTIMUM <= 10
    assert best_reward(OPTIMUM) > 1.02 * max(best_reward(OPTIMUM - 2), best_reward(OPTIMUM + 2))


def test_equal_shares_are_best() -> None:
    shares = torch.rand(5000, OPTIMUM, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.05
    logs = math.log(END / START) * shares / shares.sum(dim=1, keepdim=True)
    equal = torch.full((OPTIMUM,), math.log(END / START) / OPTIMUM, dtype=torch.float64)
    assert (log_error(logs.exp()).sum(dim=1) >= log_error(equal.exp()).sum() - 1e-12).all()
