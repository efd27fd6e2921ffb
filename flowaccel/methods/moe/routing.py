"""Routers: pure functions from a gate's logits to an expert plan.

DiffMoE (arXiv 2503.14487), token choice with a balance loss (arXiv 2407.11633), expert choice (arXiv 2410.02098),
Expert Race (arXiv 2503.16057), the sigmoid router with selection biases of DSMoE (arXiv 2512.01252), and thresholds
without a predictor.

Shapes: S tokens in a pool of B samples, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowaccel.methods.moe.plans import (
    ExpertPlan,
    best_experts,
    best_pairs,
    best_tokens,
    best_tokens_per_sample,
    chosen_pairs,
    most_tokens,
    within_budget,
)
from flowaccel.methods.moe.settings import MoESettings

PREDICTOR, GATE, LOAD = "predictor", "gate", "load"
"""Observations in training: thresholds of the capacity predictor's and of the gate's scores, and tokens per expert."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Inputs of a router."""

    settings: MoESettings
    logits: Tensor
    """(S, E), of the gate, float32 or float64."""
    samples: int
    """B."""
    capacity: float
    training: bool
    """Choose as in training; else as in use."""
    valid: Tensor | None = None
    """bool (S,): the tokens that exist; None for all."""
    predicted: Tensor | None = None
    """(S, E): logits of the capacity predictor, where they are read."""
    threshold: Tensor | None = None
    """(E,): above which a score of `selection`'s kind is chosen."""
    selection: str = "predictor_mask"
    bias: Tensor | None = None
    """(E,): added to the scores for the choice, not for the weights."""
    budget: int | None = None
    """Largest number of tokens of a sample that an expert takes in inference; shapes are then static."""

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding; waits for the device where there is padding."""
        return len(self.logits) if self.valid is None else int(self.valid.sum())

    @property
    def each(self) -> int:
        """Number of tokens that an expert takes of the whole pool: the capacity's share, at least 1."""
        share = int(self.tokens * self.capacity / self.settings.num_experts + 1e-9)
        return min(max(1, share), self.tokens)

    def scores(self) -> Tensor:
        """Return the scores (S, E) of the gate's logits."""
        kind = self.settings.scores
        if kind == "softmax":
            return self.logits.softmax(-1)
        return self.logits.sigmoid() if kind == "sigmoid" else self.logits

    def existing(self, rank: Tensor) -> Tensor:
        """Return `rank` (S, E) with padding tokens ranked lowest."""
        return rank if self.valid is None else rank.masked_fill(~self.valid.unsqueeze(1), -torch.inf)


@dataclass(frozen=True)
class Routed:
    """Output of a router."""

    plan: ExpertPlan
    loss: Tensor | None = None
    """Its own loss before its weight, a scalar with a gradient."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """(E,) each, by what is observed; without gradient."""
    overflow: Tensor | None = None
    """Number of chosen pairs that did not fit the budget, a scalar."""


def diffmoe(asked: Asked) -> Routed:
    """Give every expert the best tokens of the whole pool in training; use a threshold in inference."""
    scores = asked.scores()
    if not asked.training:
        return _diffmoe_in_use(asked, scores)
    plan = best_tokens(scores, asked.existing(scores), asked.each)
    if asked.predicted is None:  # counted without data, for a selection that does not read it
        return Routed(plan)
    observed = {
        PREDICTOR: lowest_taken(asked.existing(asked.predicted).sigmoid(), asked.each),
        GATE: lowest_taken(asked.existing(scores), asked.each),
    }
    return Routed(plan, predictor_loss(asked.predicted, plan, asked.valid), observed)


def _diffmoe_in_use(asked: Asked, scores: Tensor) -> Routed:
    ranked = scores if asked.predicted is None else asked.predicted.sigmoid()
    if asked.selection != "gate_topk_count":
        return _above(asked, scores, ranked)
    counts = asked.existing(ranked).gt(_threshold(asked)).sum(0, keepdim=True)
    return Routed(most_tokens(scores, asked.existing(scores), counts))


def token_choice(asked: Asked) -> Routed:
    """Give every token its best experts."""
    scores = asked.scores()
    plan = _by_token(scores, scores, asked)
    return Routed(plan, balance_loss(scores, plan, asked) if asked.training else None)


def deepseek(asked: Asked) -> Routed:
    """Give every token its best experts, favouring those with little load."""
    scores = asked.scores()
    rank = scores if asked.bias is None else scores + asked.bias
    groups = asked.settings.expert_groups
    if groups > 1:
        grouped = rank.unflatten(1, (groups, -1))
        strength = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
        kept = torch.zeros_like(strength).scatter(1, strength.topk(asked.settings.top_groups, dim=1).indices, 1.0)
        rank = grouped.masked_fill(kept.unsqueeze(2) == 0, -torch.inf).flatten(1)
    plan = _by_token(scores, rank, asked)
    return Routed(plan, observed={LOAD: plan.counts.to(scores.dtype)} if asked.training else {})


def expert_choice(asked: Asked) -> Routed:
    """Give every expert the best tokens of every sample."""
    scores = asked.scores()
    share = asked.capacity / asked.settings.num_experts
    if asked.valid is None:
        each = max(1, int(len(scores) // asked.samples * share + 1e-9))
        return Routed(best_tokens_per_sample(scores, scores, asked.samples, each))
    lengths = asked.valid.view(asked.samples, -1).sum(1, keepdim=True)
    counts = (lengths * share + 1e-9).long().clamp_min(1).minimum(lengths)
    return Routed(most_tokens(scores, asked.existing(scores), counts.expand(-1, scores.shape[1])))


def expert_race(asked: Asked) -> Routed:
    """Take the best token-expert pairs of the pool in training; use one threshold for all in inference."""
    scores = asked.scores()
    if not asked.training:
        return _above(asked, scores, scores)
    pairs = max(1, int(asked.tokens * asked.capacity + 1e-9))
    plan = best_pairs(scores, asked.existing(scores), pairs)
    threshold = plan.weights.detach().min().expand(asked.settings.num_experts).clone()
    # tensors without data are for counting multiply-adds, and those of the loss are no part of the network
    loss = None if asked.logits.is_meta else similarity_loss(asked.logits, plan, asked.valid)
    return Routed(plan, loss, {GATE: threshold})


def expert_threshold(asked: Asked) -> Routed:
    """Take the scores above a threshold; until there is one, give every expert the best tokens of the pool."""
    scores = asked.scores()
    if not asked.training:
        return _above(asked, scores, scores)
    observed = {GATE: lowest_taken(asked.existing(scores), asked.each)}
    if asked.threshold is None:
        return Routed(best_tokens(scores, asked.existing(scores), asked.each), observed=observed)
    return Routed(chosen_pairs(scores, asked.existing(scores) > asked.threshold), observed=observed)


ROUTING: dict[str, Callable[[Asked], Routed]] = {
    "diffmoe": diffmoe,
    "token_choice": token_choice,
    "dit_moe": token_choice,
    "expert_choice": expert_choice,
    "expert_race": expert_race,
    "deepseek": deepseek,
    "expert_threshold": expert_threshold,
}


def invariance(router: str, selection: str) -> str:
    """Return what a decision depends on in inference: `token`, `sample` or `batch`."""
    if router == "expert_choice":
        return "sample"
    return "batch" if router == "diffmoe" and selection == "gate_topk_count" else "token"


def lowest_taken(scores: Tensor, each: int) -> Tensor:
    """Return (E,) the lowest of each expert's `each` best `scores` (S, E), without gradient."""
    return scores.detach().topk(each, dim=0).values[-1]


def predictor_loss(predicted: Tensor, plan: ExpertPlan, valid: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy between the capacity predictor's logits (S, E) and the pairs taken."""
    target = plan.mask(len(predicted))
    if valid is not None:
        predicted, target = predicted[valid], target[valid]
    return nn.functional.binary_cross_entropy_with_logits(predicted, target.to(predicted.dtype))


def balance_loss(scores: Tensor, plan: ExpertPlan, asked: Asked) -> Tensor:
    """Return the load-balancing loss, which is 1 for an even load; `scores` (S, E) sum to 1 over experts.

    It is the sum over experts of the share of pairs, in units of an even share, times the mean score.
    """
    share = plan.counts.to(scores.dtype) * (len(plan.counts) / max(1, plan.pairs))
    existing = scores if asked.valid is None else scores[asked.valid]
    return (share * existing.mean(0)).sum()


def similarity_loss(logits: Tensor, plan: ExpertPlan, valid: Tensor | None = None) -> Tensor:
    """Return Expert Race's router similarity loss (arXiv 2503.16057); `logits` are (S, E).

    Scores of experts that are chosen for the same tokens should differ.
    """
    scores, chosen = logits.softmax(-1), plan.mask(len(logits)).to(logits.dtype)
    if valid is not None:
        scores, chosen = scores[valid], chosen[valid]
    experts = logits.shape[1]
    together = chosen.t() @ chosen
    own = torch.eye(experts, dtype=torch.bool, device=logits.device)
    alone, apart = together.diagonal().sum().clamp_min(1), together.masked_fill(own, 0).sum().clamp_min(1)
    weights = torch.where(own, experts * together / alone, (experts**2 - experts) * together / apart)
    return (weights * (scores.t() @ scores)).sum() / len(scores)


def _by_token(scores: Tensor, rank: Tensor, asked: Asked) -> ExpertPlan:
    return best_experts(scores, rank, int(asked.capacity), asked.valid, normalised=asked.settings.normalised)


def _threshold(asked: Asked) -> Tensor:
    assert asked.threshold is not None
    return asked.threshold.to(asked.logits.dtype)


def _above(asked: Asked, weights: Tensor, scores: Tensor) -> Routed:
    """Take the pairs whose score (S, E) is above the threshold."""
    chosen = asked.existing(scores) > _threshold(asked)
    if asked.budget is None:
        return Routed(chosen_pairs(weights, chosen))
    plan, overflow = within_budget(weights, scores, chosen, asked.samples, asked.budget)
    return Routed(plan, overflow=overflow)
