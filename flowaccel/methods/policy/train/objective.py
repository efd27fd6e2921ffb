"""Objective of a learned acceleration policy: compute, rewards, advantages and the clipped loss (RAPID3).

RAPID3 is arXiv 2509.22323; its discount is that of TPDM, arXiv 2412.01243.

P prompts, G images of each (a group), B = P * G images of a rollout in the order of their groups, R pairs of an image
and a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowaccel.methods.policy.network import STEP, AccelerationPolicy, Choices

ESTIMATORS = ("grpo", "rloo")
MOST_CLIPPED = 0.3
"""Share of clipped trajectories above which ratios of single decisions are the better choice."""
_STD_EPS, _LARGEST = 1e-4, 5.0
_EARLY = 1 / 3
_NO_LIMITS, _EARLY_LIMITS = (0.0, 1.0), (0.3, 0.97)


# --- compute


def equivalent_steps(
    image: Tensor, reused: Tensor, level: Tensor, images: int, costs: Mapping[str, Any] | None
) -> Tensor:
    """Return the compute of every image in dense steps: K = sum (1 - C_cache)(1 - C_sparse).

    All executed steps count, also those where the decision was forced.

    Args:
        image: (R,) which image, from 0.
        reused: (R,) booleans: the blocks were not computed; nothing can be left out of them then.
        level: (R,) 0 for dense attention, else the number of the level.
        images: B.
        costs: the policy's, what a step costs in dense ones: `reuse`, and `sparse` with one number per level. Above 1
            is what costs more than it saves.

    Returns:
        (B,) float32.

    Raises:
        ValueError: costs are missing or negative, or there is no such level.
    """
    of_reuse = _costs(costs, "reuse", 1) if bool(reused.any()) else [0.0]
    deepest = int(level.max()) if len(level) else 0
    of_level = [1.0, *(_costs(costs, "sparse", deepest) if deepest else ())]
    computed = torch.tensor(of_level, device=level.device)[level]
    return by_image(torch.where(reused, of_reuse[0], computed), image, images)


def _costs(costs: Mapping[str, Any] | None, name: str, wanted: int) -> list[float]:
    found = (costs or {}).get(name)
    numbers = [float(cost) for cost in (found if isinstance(found, (list, tuple)) else [found]) if cost is not None]
    if len(numbers) < wanted or any(not 0 <= cost < math.inf for cost in numbers):
        raise ValueError(
            f"costs[{name!r}] must give what such a step costs in dense ones, 0 or more (needed: {wanted}), got "
            f"{found!r}; measure it on the hardware of use, with `measured_costs`"
        )
    return numbers


def by_image(values: Tensor, image: Tensor, images: int) -> Tensor:
    """Sum (R,) values by the image that they belong to: (B,)."""
    return torch.zeros(images, dtype=values.dtype, device=values.device).index_add(0, image, values)


# --- rewards


def positive(quality: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Shift a reward's values so that none is negative, as the discount needs (else it would pay for more steps).

    What has a lower bound below 0 is shifted by it; what has none, such as ImageReward's about normal values, becomes
    its sigmoid.

    Args:
        quality: (B,).
        bounds: the lowest and the highest value that the reward declares.
    """
    lowest = bounds[0]
    return quality.sigmoid() if lowest == -math.inf else quality - min(lowest, 0.0)


def discounted_reward(score: Tensor, steps: Tensor, discount: float = 0.97) -> Tensor:
    """Compute r = score (1 - lambda^K) / (K (1 - lambda)); for whole K, the mean of lambda^(K - k) over k = 1 .. K.

    Args:
        score: (B,) of at least 0: quality and how unaccelerated the image looks, together.
        steps: (B,) K above 0, from `equivalent_steps`.
        discount: lambda in (0, 1); lower makes faster. .97 is the paper's for about 2.9 times on SD3, .9 is faster.

    Raises:
        ValueError: a negative score, K of 0 or less, lambda out of range.
    """
    check_discount(discount)
    _check_steps(score, steps)
    if bool((score < 0).any()):
        raise ValueError(
            f"score must not be negative, got {float(score.min()):.4g}: the discount would reward more steps; shift it "
            "with `positive`, or take `additive_reward`"
        )
    return score * -torch.expm1(steps * math.log(discount)) / (steps * (1 - discount))


def additive_reward(score: Tensor, steps: Tensor, price: float) -> Tensor:
    """Compute r = score - mu K, which takes scores of any sign; not the paper's.

    Args:
        score: (B,).
        steps: (B,) K above 0.
        price: mu of at least 0, of one dense step.

    Raises:
        ValueError: K of 0 or less, a negative price.
    """
    check_price(price)
    _check_steps(score, steps)
    return score - price * steps


def check_discount(discount: float) -> None:
    """Raise a ValueError unless it lies in (0, 1)."""
    if not 0 < discount < 1:
        raise ValueError(f"discount must lie in (0, 1), got {discount}")


def check_price(price: float) -> None:
    """Raise a ValueError unless it is at least 0."""
    if not price >= 0:
        raise ValueError(f"price must be at least 0, got {price}")


def _check_steps(score: Tensor, steps: Tensor) -> None:
    if score.shape != steps.shape:
        raise ValueError(
            f"score and steps must have one number per image, got {tuple(score.shape)} and {tuple(steps.shape)}"
        )
    if not bool((steps > 0).all()):
        raise ValueError(f"steps must be positive, got {float(steps.min()):.4g}; did a rollout compute nothing?")


def advantages(rewards: Tensor, estimator: Literal["grpo", "rloo"] = "grpo") -> Tensor:
    """Return the advantage of each image over its group, (P, G) -> (P, G).

    - `grpo` (arXiv 2402.03300): (r - mean) / (standard deviation + 1e-4), within +-5.
    - `rloo` (arXiv 2402.14740): r - the mean of the others.

    Where all rewards of a group are equal, exactly 0; `policy_loss` skips such a group.

    Raises:
        ValueError: groups of one image, another shape, an unknown estimator.
    """
    check_estimator(estimator)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (groups, images of a group) with at least 2 images, got shape {tuple(rewards.shape)}: "
            "an image alone is not better than its group"
        )
    size = rewards.shape[1]
    above = rewards - rewards.mean(dim=1, keepdim=True)
    if estimator == "grpo":
        deviation = rewards.std(dim=1, correction=0, keepdim=True)
        found = (above / (deviation + _STD_EPS)).clamp(-_LARGEST, _LARGEST)
    else:
        found = above * size / (size - 1)
    # a mean of equal numbers is not always that number
    return torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, found)


def check_estimator(estimator: str) -> None:
    """Raise a ValueError unless it is known."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")


# --- the objective


@dataclass(frozen=True, kw_only=True)
class PolicyStats:
    """Statistics of one evaluation of the objective.

    Ratios are new to old likelihoods, of trajectories or decisions.
    """

    clip_fraction: float
    """Share of ratios out of the clip's range."""
    ratio: float
    """Their mean."""
    entropy: float
    """Mean of the choices that are not jumps, in nats; 0 without any."""
    kl: float
    """Estimate of the divergence from the old policy: the mean of ratio - 1 - log ratio."""
    skipped: int
    """Groups in which all images were equally good."""

    @property
    def drifts(self) -> bool:
        """Whether so many ratios are clipped that those of decisions would serve better."""
        return self.clip_fraction > MOST_CLIPPED


NO_STATS = PolicyStats(clip_fraction=0.0, ratio=1.0, entropy=0.0, kl=0.0, skipped=0)
"""Before any evaluation."""


def log_probs(policy: AccelerationPolicy, choices: Mapping[str, Choices]) -> dict[str, Tensor]:
    """Return (R,) log-likelihoods of each level's choices.

    Taken without gradients before an update, they are its old ones. Forced decisions are not in `choices`, so they are
    in neither.
    """
    return {level: policy.weigh(level, chosen)[0] for level, chosen in choices.items()}


def policy_loss(
    policy: AccelerationPolicy,
    choices: Mapping[str, Choices],
    old: Mapping[str, Tensor],
    advantages: Tensor,
    *,
    clip: float = 0.2,
    per_decision: bool = False,
    entropy: float = 0.0,
) -> tuple[Tensor, PolicyStats]:
    """Return the negated clipped objective: - mean over images of min(ratio A, clip(ratio) A), without a KL term.

    Args:
        policy: the policy whose heads are trained.
        choices: inputs and choices of the heads, by level; images are numbered in the order of `advantages`.
        old: `log_probs` of the policy that chose, for the same choices.
        advantages: (P, G).
        clip: ratios count within 1 +- this.
        per_decision: clip the ratio of every decision and sum over the decisions of an image, in place of the ratio of
            the whole trajectory, a product of dozens that soon leaves the range. Right after a rollout both have the
            same gradient.
        entropy: weight of the mean entropy of the choices that are not jumps, see `early_entropy`.

    Returns:
        A scalar, and what to watch.

    Raises:
        ValueError: images of `choices` without an advantage, levels that differ, `clip` out of range.
    """
    check_clip(clip)
    if set(old) != set(choices) or not choices:
        raise ValueError(f"old must be of the levels of choices, {sorted(choices)}, got {sorted(old)}")
    advantages = advantages.to(policy.device)
    images, worth = advantages.numel(), advantages.flatten()
    image = torch.cat([chosen.image for chosen in choices.values()]).to(policy.device)
    if len(image) and int(image.max()) >= images:
        raise ValueError(f"choices are of at least {int(image.max()) + 1} images, advantages of {images}")
    new = {level: policy.weigh(level, chosen) for level, chosen in choices.items()}
    change = torch.cat([new[level][0] - old[level] for level in choices])
    if not per_decision:
        change, image = by_image(change, image, images), torch.arange(images, device=worth.device)
    informative = (advantages != 0).any(dim=1)
    counts = informative.repeat_interleave(advantages.shape[1])
    ratio, gain = change.exp(), worth[image]
    terms = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    bonus = _entropy(new, policy.device)
    loss = -terms.sum() / max(1, int(counts.sum())) - entropy * bonus
    return loss, _stats(change.detach()[counts[image]], clip, bonus, int((~informative).sum()))


def check_clip(clip: float) -> None:
    """Raise a ValueError unless it lies in (0, 1)."""
    if not 0 < clip < 1:
        raise ValueError(f"clip must lie in (0, 1), got {clip}")


def _entropy(weighed: Mapping[str, tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    found = [entropy for level, (_, entropy) in weighed.items() if level != STEP and len(entropy)]
    return torch.cat(found).mean() if found else torch.zeros((), device=device)


def _stats(change: Tensor, clip: float, entropy: Tensor, skipped: int) -> PolicyStats:
    change = change if len(change) else change.new_zeros(1)
    ratio = change.exp()
    return PolicyStats(
        clip_fraction=float(((ratio < 1 - clip) | (ratio > 1 + clip)).float().mean()),
        ratio=float(ratio.mean()),
        entropy=float(entropy.detach()),
        kl=float((ratio - 1 - change).mean()),
        skipped=skipped,
    )


# --- guards of the first third of a training


def early_entropy(progress: float, weight: float = 1e-3) -> float:
    """Return the weight of entropy at a progress in [0, 1]: it keeps choices from settling early, then it is 0.

    Early is the first third.

    Raises:
        ValueError: `progress` out of range.
    """
    return weight if _is_early(progress) else 0.0


def early_limits(progress: float) -> tuple[float, float]:
    """Return the limits of the share of the present time that a jump leaves, at a progress in [0, 1].

    They are [.3, .97] in the first third, which keeps a policy from jumping to the end at once before a discriminator
    has learnt to see it; then [0, 1].

    Raises:
        ValueError: `progress` out of range.
    """
    return _EARLY_LIMITS if _is_early(progress) else _NO_LIMITS


def _is_early(progress: float) -> bool:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    return progress < _EARLY
