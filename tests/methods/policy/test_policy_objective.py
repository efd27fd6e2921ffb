"""What policies are trained for: compute, rewards, advantages and the clipped objective, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.methods.policy.network import CACHE, REUSE, SPARSE, STEP, AccelerationPolicy, Choices
from flowaccel.methods.policy.train.objective import (
    MOST_CLIPPED,
    PolicyStats,
    additive_reward,
    advantages,
    by_image,
    discounted_reward,
    early_entropy,
    early_limits,
    equivalent_steps,
    log_probs,
    policy_loss,
    positive,
)

COSTS = {"reuse": 0.125, "sparse": [0.75, 0.5]}
GROUPS, SIZE = 3, 4
IMAGES = GROUPS * SIZE


def policy(seed: int = 0) -> AccelerationPolicy:
    torch.manual_seed(seed)
    return AccelerationPolicy(
        in_channels=2, condition_dim=3, levels=(STEP, CACHE, SPARSE), sparsity=(0.75, 0.5), width=8
    )


def rollout(actor: AccelerationPolicy, seed: int = 0) -> dict[str, Choices]:
    """Decisions of random images about random features; those of images 2 and 5 were all forced."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for level, rows in {STEP: 40, CACHE: 30, SPARSE: 20}.items():
        image = torch.randint(IMAGES, (rows,), generator=generator)
        image[(image == 2) | (image == 5)] = 0
        features = torch.randn(rows, 2, 4, 4, generator=generator)
        condition = torch.randn(rows, 3 + (level == CACHE), generator=generator)
        torch.manual_seed(seed)
        with torch.no_grad():
            action = actor.distribution(level, features, condition).sample()
        found[level] = Choices(image, features, condition, action)
    return found


def moved(actor: AccelerationPolicy, by: float, seed: int = 3) -> AccelerationPolicy:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return actor


def gradients(actor: AccelerationPolicy, loss: Tensor) -> Tensor:
    actor.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None])


# compute


def test_equivalent_steps_count_what_was_left_out() -> None:
    image = torch.tensor([0, 1, 0, 0, 1, 0])
    reused = torch.tensor([False, False, True, False, True, True])
    level = torch.tensor([0, 2, 0, 1, 2, 0])  # where blocks are reused, the level does nothing
    steps = equivalent_steps(image, reused, level, 3, COSTS)
    assert steps.tolist() == [1 + 0.125 + 0.75 + 0.125, 0.5 + 0.125, 0]
    nothing_saved = equivalent_steps(image, torch.zeros(6, dtype=torch.bool), torch.zeros_like(level), 2, None)
    assert nothing_saved.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("costs", "name"),
    [
        (None, "reuse"),
        ({"sparse": [0.5]}, "reuse"),
        ({"reuse": 0.1, "sparse": [0.5]}, "sparse"),
        ({"reuse": float("inf"), "sparse": [0.5, 0.4]}, "reuse"),
        ({"reuse": 0.1, "sparse": [0.5, -0.1]}, "sparse"),
    ],
)
def test_costs_must_be_known(costs: Any, name: str) -> None:
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"costs\['{name}'\].*measure"):
        equivalent_steps(0 * one, one == 1, 2 * one, 1, costs)


def test_sums_by_image_have_gradients() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = by_image(values, torch.tensor([1, 0, 1]), 3)
    assert sums.tolist() == [2, 5, 0]
    sums[1].backward()
    assert values.grad is not None and values.grad.tolist() == [1, 0, 1]


# rewards


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.97, 0.999])
def test_the_closed_form_is_the_sum(discount: float) -> None:
    whole = range(1, 41)
    score = torch.linspace(0.1, 2, len(whole), dtype=torch.float64)
    literal = torch.tensor([sum(discount ** (last - k) for k in range(1, last + 1)) / last for last in whole])
    found = discounted_reward(score, torch.tensor(whole, dtype=torch.float64), discount)
    torch.testing.assert_close(found, score * literal.double(), rtol=1e-6, atol=0)


def test_more_steps_pay_less() -> None:
    steps = torch.linspace(0.1, 50, 400, dtype=torch.float64)
    for discount in (0.9, 0.97):
        assert (discounted_reward(torch.full_like(steps, 0.7), steps, discount).diff() < 0).all()
    torch.testing.assert_close(additive_reward(-steps, steps, 0.25), -1.25 * steps)


def test_a_negative_score_is_refused() -> None:
    steps = torch.tensor([4.0, 8.0])
    with pytest.raises(ValueError, match=r"score must not be negative, got -0\.5.*`positive`"):
        discounted_reward(torch.tensor([1.0, -0.5]), steps)
    assert discounted_reward(torch.zeros(2), steps).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("bounds", "values"),
    [((-1.0, 1.0), [0.0, 0.75, 2.0]), ((0.0, 1.0), [-1.0, -0.25, 1.0]), ((0.5, 2.0), [-1.0, -0.25, 1.0])],
)
def test_declared_bounds_shift(bounds: tuple[float, float], values: list[float]) -> None:
    assert positive(torch.tensor([-1.0, -0.25, 1.0]), bounds).tolist() == values


def test_what_has_no_lower_bound_becomes_positive_in_its_order() -> None:
    quality = torch.linspace(-6, 6, 50)
    found = positive(quality, (-math.inf, math.inf))
    assert (found > 0).all() and (found < 1).all() and (found.diff() > 0).all()


@pytest.mark.parametrize("steps", [0.0, -1.0, math.nan])
def test_steps_must_be_positive(steps: float) -> None:
    for reward in (lambda s, k: discounted_reward(s, k), lambda s, k: additive_reward(s, k, 0.1)):
        with pytest.raises(ValueError, match="steps must be positive"):
            reward(torch.ones(2), torch.tensor([3.0, steps]))
        with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
            reward(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("discount", [0.0, 1.0, 1.2])
def test_numbers_out_of_range(discount: float) -> None:
    with pytest.raises(ValueError, match=r"discount must lie in \(0, 1\)"):
        discounted_reward(torch.ones(1), torch.ones(1), discount)
    with pytest.raises(ValueError, match="price must be at least 0"):
        additive_reward(torch.ones(1), torch.ones(1), -0.1)


# advantages

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1]])


def test_grpo_standardises_groups() -> None:
    found = advantages(REWARDS)
    deviation = math.sqrt(sum((r - 3) ** 2 for r in (1, 2, 3, 6)) / 4)
    torch.testing.assert_close(found[0], (REWARDS[0] - 3) / (deviation + 1e-4))
    assert (found[1] == 0).all()


def test_rloo_compares_with_the_others() -> None:
    found = advantages(REWARDS, "rloo")
    expected = [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]
    torch.testing.assert_close(found[0], torch.tensor(expected))
    assert (found[1] == 0).all()


def test_equal_rewards_give_no_advantage_whatever_rounding_does() -> None:
    values = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 7)
    assert ((values - values.mean(dim=1, keepdim=True)) != 0).any()
    for estimator in ("grpo", "rloo"):
        assert (advantages(values, estimator) == 0).all()  # type: ignore[arg-type]


def test_advantages_are_bounded() -> None:
    rewards = torch.zeros(1, 400)
    rewards[0, 0] = 1
    assert float(advantages(rewards).max()) == 5


@pytest.mark.parametrize("shape", [(6, 1), (6,), (2, 3, 4)])
def test_a_group_of_one_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        advantages(torch.rand(shape))


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match=r"grpo, rloo.*'ppo'"):
        advantages(REWARDS, "ppo")  # type: ignore[arg-type]


# the objective


def setting(seed: int = 0) -> tuple[AccelerationPolicy, dict[str, Choices], dict[str, Tensor], Tensor]:
    actor = policy()
    choices = rollout(actor, seed)
    with torch.no_grad():
        old = log_probs(actor, choices)
    generator = torch.Generator().manual_seed(9)
    return actor, choices, old, advantages(torch.rand(GROUPS, SIZE, generator=generator))


@pytest.mark.parametrize("per_decision", [False, True])
def test_right_after_a_rollout(per_decision: bool) -> None:
    actor, choices, old, worth = setting()
    loss, stats = policy_loss(actor, choices, old, worth, per_decision=per_decision)
    assert (stats.clip_fraction, stats.ratio, stats.kl, stats.skipped) == (0, 1, 0, 0)
    assert not stats.drifts
    # the plain policy gradient: - mean over images of A times the gradient of its log-probability
    found = gradients(actor, loss)
    whole = sum(by_image(value, choices[level].image, IMAGES) for level, value in log_probs(actor, choices).items())
    torch.testing.assert_close(found, gradients(actor, -(worth.flatten() * whole).mean()))
    assert found.abs().max() > 1e-4


def test_trajectories_clip_the_product() -> None:
    actor, choices, old, worth = setting()
    moved(actor, 0.05)
    _, stats = policy_loss(actor, choices, old, worth, clip=0.1)
    loss, _ = policy_loss(actor, choices, old, worth, clip=0.1)
    ratios, gains = [], []
    new = log_probs(actor, choices)
    for image in range(IMAGES):
        change = sum(
            float((new[level] - old[level])[choices[level].image == image].detach().double().sum()) for level in choices
        )
        ratios.append(math.exp(change))
        bounded = min(max(ratios[-1], 0.9), 1.1)
        gain = float(worth.flatten()[image])
        gains.append(min(ratios[-1] * gain, bounded * gain))
    assert ratios[2] == ratios[5] == 1  # nothing was chosen there
    assert float(loss.detach()) == pytest.approx(-sum(gains) / IMAGES, rel=1e-4)
    assert stats.clip_fraction == pytest.approx(sum(not 0.9 <= r <= 1.1 for r in ratios) / IMAGES)
    assert 0 < stats.clip_fraction < 1
    assert stats.ratio == pytest.approx(sum(ratios) / IMAGES, rel=1e-4)
    assert stats.kl == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / IMAGES, rel=1e-3)


def test_decisions_are_clipped_one_by_one() -> None:
    actor, choices, old, worth = setting()
    moved(actor, 0.05)
    loss, stats = policy_loss(actor, choices, old, worth, clip=0.1, per_decision=True)
    new = log_probs(actor, choices)
    change = torch.cat([(new[level] - old[level]).detach() for level in choices]).double()
    gain = worth.flatten()[torch.cat([choices[level].image for level in choices])]
    ratio = change.exp()
    expected = -torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain).sum() / IMAGES
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    trajectories = policy_loss(actor, choices, old, worth, clip=0.1)[1]
    assert stats.clip_fraction < trajectories.clip_fraction  # what the option is for


def test_clipping_ends_the_pull_of_what_is_likely_enough() -> None:
    actor, choices, old, worth = setting()
    chosen = {STEP: choices[STEP]}
    far_less_likely = {STEP: old[STEP] - 2}  # before: all ratios are huge
    loss, stats = policy_loss(actor, chosen, far_less_likely, torch.ones(GROUPS, SIZE))
    assert (gradients(actor, loss) == 0).all()
    assert stats.drifts and stats.clip_fraction > MOST_CLIPPED
    # the other sign still pulls back
    loss, _ = policy_loss(actor, chosen, far_less_likely, -torch.ones(GROUPS, SIZE))
    assert gradients(actor, loss).abs().max() > 0
    assert worth.shape == (GROUPS, SIZE)


def test_groups_without_advantage_are_skipped() -> None:
    actor, choices, old, worth = setting()
    worth[1] = 0
    loss, stats = policy_loss(actor, choices, old, worth)
    assert stats.skipped == 1
    only = {
        level: chosen.take(((chosen.image < SIZE) | (chosen.image >= 2 * SIZE)).nonzero().flatten())
        for level, chosen in choices.items()
    }
    renumbered = {
        level: Choices(torch.where(c.image >= SIZE, c.image - SIZE, c.image), c.features, c.condition, c.action)
        for level, c in only.items()
    }
    with torch.no_grad():
        theirs = log_probs(actor, renumbered)
    expected, _ = policy_loss(actor, renumbered, theirs, worth[[0, 2]])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(actor, loss), gradients(actor, expected))


def test_nothing_to_learn_is_no_error() -> None:
    actor, choices, old, worth = setting()
    loss, stats = policy_loss(actor, choices, old, torch.zeros_like(worth))
    assert stats.skipped == GROUPS and stats.clip_fraction == 0 and stats.ratio == 1
    assert (gradients(actor, loss) == 0).all()


def test_entropy_is_of_choices_and_not_of_jumps() -> None:
    actor, choices, old, worth = setting()
    plain, stats = policy_loss(actor, choices, old, worth)
    with_bonus, _ = policy_loss(actor, choices, old, worth, entropy=0.5)
    shares = [
        actor(level, choices[level].features, choices[level].condition).softmax(dim=1) for level in (CACHE, SPARSE)
    ]
    rows = torch.cat([-(share * share.log()).sum(dim=1) for share in shares])
    assert stats.entropy == pytest.approx(float(rows.detach().mean()), rel=1e-5)
    assert float((plain - with_bonus).detach()) == pytest.approx(0.5 * stats.entropy, rel=1e-4)
    jumps, only = policy_loss(actor, {STEP: choices[STEP]}, {STEP: old[STEP]}, worth, entropy=0.5)
    assert only.entropy == 0 and torch.isfinite(jumps)


def test_the_bonus_spreads_choices() -> None:
    actor, choices, old, worth = setting()
    chosen, before = {CACHE: choices[CACHE]}, {CACHE: old[CACHE]}
    start = policy_loss(actor, chosen, before, torch.zeros_like(worth))[1].entropy
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        policy_loss(actor, chosen, before, torch.zeros_like(worth), entropy=1.0)[0].backward()
        optimizer.step()
    assert policy_loss(actor, chosen, before, torch.zeros_like(worth))[1].entropy > start + 0.1


def test_what_is_better_becomes_likelier() -> None:
    actor, choices, old, _ = setting()
    reuses = choices[CACHE].action == REUSE
    assert reuses.any()
    image = torch.arange(len(reuses))
    single = {CACHE: Choices(image, choices[CACHE].features, choices[CACHE].condition, choices[CACHE].action)}
    worth = torch.where(reuses, 1.0, -1.0).unsqueeze(0)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        policy_loss(actor, single, {CACHE: old[CACHE]}, worth)[0].backward()
        optimizer.step()
    change = log_probs(actor, single)[CACHE] - old[CACHE]
    assert (change[reuses] > 0).all() and (change[~reuses] < 0).all()


def test_what_does_not_belong_together() -> None:
    actor, choices, old, worth = setting()
    with pytest.raises(ValueError, match="advantages of 4"):
        policy_loss(actor, choices, old, worth[:1])
    with pytest.raises(ValueError, match=r"levels of choices.*\['step'\]"):
        policy_loss(actor, choices, {STEP: old[STEP]}, worth)
    with pytest.raises(ValueError, match=r"clip must lie in \(0, 1\), got 1"):
        policy_loss(actor, choices, old, worth, clip=1)


# guards


def test_guards_end_after_the_first_third() -> None:
    assert early_limits(0.0) == early_limits(0.33) == (0.3, 0.97)
    assert early_limits(0.34) == early_limits(1.0) == (0.0, 1.0)
    assert early_entropy(0.1) == 1e-3 and early_entropy(0.1, 0.2) == 0.2
    assert early_entropy(0.4, 0.2) == 0
    for guard in (early_limits, early_entropy):
        with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\], got 30"):
            guard(30)  # type: ignore[operator]


def test_stats_are_plain() -> None:
    stats = PolicyStats(clip_fraction=0.31, ratio=1.0, entropy=0.0, kl=0.0, skipped=0)
    assert stats.drifts
