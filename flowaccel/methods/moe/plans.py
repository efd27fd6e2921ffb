"""Expert plans, the assignment of tokens to experts, and functions that create them.

Shapes: S tokens in a pool of B samples of L tokens, E experts, P pairs of a token and an expert. Scores are float32, or
float64 for inputs of float64. Ties are broken arbitrarily.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertPlan:
    """Pairs of tokens and experts, sorted by expert."""

    tokens: Tensor
    """(P,) int64: the pair's token, an index into the pool."""
    experts: Tensor
    """(P,) int64, ascending: the pair's expert."""
    weights: Tensor
    """(P,): what the expert's output is multiplied by before the outputs of a token are summed."""
    counts: Tensor
    """(E,) int32: pairs of every expert."""
    each: int | None = None
    """Number of pairs of every expert, where it is the same for all and known without asking the device."""

    @property
    def pairs(self) -> int:
        """Number of pairs P."""
        return len(self.tokens)

    @property
    def ends(self) -> Tensor:
        """(E,) int32: end index of every expert's pairs."""
        return self.counts.cumsum(0).to(torch.int32)

    def sizes(self) -> list[int]:
        """Return `counts` on the host, which waits for the device unless `each` is known.

        Meta tensors are taken to be shared out evenly.
        """
        if self.each is not None:
            return [self.each] * len(self.counts)
        if self.counts.is_meta:
            share, rest = divmod(self.pairs, len(self.counts))
            return [share + (expert < rest) for expert in range(len(self.counts))]
        found: list[int] = self.counts.tolist()
        return found

    def mask(self, pool: int) -> Tensor:
        """Return a mask of the pairs, bool (S, E), for a pool of S tokens."""
        chosen = torch.zeros(pool, len(self.counts), dtype=torch.bool, device=self.tokens.device)
        chosen[self.tokens, self.experts] = True
        return chosen


def _even(weights: Tensor, tokens: Tensor) -> ExpertPlan:
    """Return a plan of `tokens` (E, k) for every expert, with weights from `weights` (S, E)."""
    experts, each = tokens.shape
    ids = torch.arange(experts, device=tokens.device)
    return ExpertPlan(
        tokens=tokens.flatten(),
        experts=ids.repeat_interleave(each, output_size=experts * each),
        weights=weights.t().gather(1, tokens).flatten(),
        counts=torch.full_like(ids, each, dtype=torch.int32),
        each=each,
    )


def _sorted(tokens: Tensor, experts: Tensor, weights: Tensor, count: int) -> ExpertPlan:
    """Return a plan of any pairs, sorted stably, so that tokens are gathered in the same order every time."""
    order = experts.argsort(stable=True)
    experts = experts[order]
    counts = torch.zeros(count, dtype=torch.int32, device=experts.device)
    counts = counts.index_add(0, experts, torch.ones_like(experts, dtype=torch.int32))
    return ExpertPlan(tokens[order], experts, weights[order], counts)


def best_tokens(weights: Tensor, rank: Tensor, each: int) -> ExpertPlan:
    """Assign to every expert the `each` tokens of the pool that rank highest.

    Args:
        weights: (S, E).
        rank: (S, E); -inf leaves a token out.
        each: from 0 to S.
    """
    return _even(weights, rank.t().topk(each, dim=1, sorted=False).indices)


def best_tokens_per_sample(weights: Tensor, rank: Tensor, samples: int, each: int) -> ExpertPlan:
    """Assign to every expert the `each` tokens of every sample that rank highest.

    Args:
        weights: (S, E).
        rank: (S, E).
        samples: B, whose tokens lie one sample after the other.
        each: from 0 to L.
    """
    length = len(rank) // samples
    places = rank.view(samples, length, -1).transpose(1, 2).topk(each, dim=2, sorted=False).indices  # (B, E, each)
    first = torch.arange(samples, device=rank.device).view(-1, 1, 1) * length
    return _even(weights, (places + first).transpose(0, 1).flatten(1))


def best_experts(
    weights: Tensor, rank: Tensor, each: int, valid: Tensor | None = None, *, normalised: bool = False
) -> ExpertPlan:
    """Assign to every token the `each` experts that rank highest.

    Args:
        weights: (S, E).
        rank: (S, E).
        each: from 1 to E.
        valid: bool (S,), the tokens that take any; None for all.
        normalised: scale the weights of a token so that they sum to 1.
    """
    experts = rank.topk(each, dim=1).indices
    taken = weights.gather(1, experts)
    if normalised:
        taken = taken / (taken.sum(1, keepdim=True) + 1e-20)
    tokens = torch.arange(len(rank), device=rank.device)
    if valid is not None:
        tokens, experts, taken = tokens[valid], experts[valid], taken[valid]
    pairs = tokens.repeat_interleave(each, output_size=len(tokens) * each)
    return _sorted(pairs, experts.flatten(), taken.flatten(), rank.shape[1])


def best_pairs(weights: Tensor, rank: Tensor, pairs: int) -> ExpertPlan:
    """Select the `pairs` pairs of the whole pool that rank highest.

    Args:
        weights: (S, E).
        rank: (S, E); -inf leaves a token out.
        pairs: from 0 to S * E.
    """
    flat = rank.flatten().topk(pairs, sorted=False).indices
    tokens, experts = flat // rank.shape[1], flat % rank.shape[1]
    return _sorted(tokens, experts, weights[tokens, experts], rank.shape[1])


def most_tokens(weights: Tensor, rank: Tensor, counts: Tensor) -> ExpertPlan:
    """Assign to every expert the highest-ranked tokens of every sample, as many as `counts` (B, E) says.

    Args:
        weights: (S, E).
        rank: (S, E); the samples' tokens lie one sample after the other.
        counts: (B, E), from 0 to L.
    """
    order = rank.view(len(counts), -1, rank.shape[1]).argsort(dim=1, descending=True)
    numbers = torch.arange(order.shape[1], device=rank.device).view(1, -1, 1).expand_as(order)
    place = torch.empty_like(order).scatter_(1, order, numbers)
    return chosen_pairs(weights, (place < counts.unsqueeze(1)).flatten(0, 1))


def chosen_pairs(weights: Tensor, chosen: Tensor) -> ExpertPlan:
    """Return a plan of the pairs in `chosen`, bool (S, E); `weights` are (S, E).

    Waits for the device to learn how many there are.
    """
    experts, tokens = chosen.t().nonzero(as_tuple=True)
    return ExpertPlan(tokens, experts, weights[tokens, experts], chosen.sum(0, dtype=torch.int32))


def within_budget(weights: Tensor, rank: Tensor, chosen: Tensor, samples: int, each: int) -> tuple[ExpertPlan, Tensor]:
    """Return a plan of the pairs in `chosen`, with at most `each` tokens of a sample per expert.

    Shapes are known beforehand, so nothing waits for the device: places that are left over hold tokens of weight 0.
    What an expert does not get depends on the sample alone.

    Args:
        weights: (S, E).
        rank: (S, E): where there are too many, those that rank lowest are left out.
        chosen: bool (S, E).
        samples: B.
        each: from 1 to L.

    Returns:
        The plan, and how many chosen pairs it leaves out, an int64 scalar.
    """
    lowest = torch.finfo(rank.dtype).min
    plan = best_tokens_per_sample(weights * chosen, rank.masked_fill(~chosen, lowest), samples, each)
    per_sample = chosen.view(samples, -1, chosen.shape[1]).sum(1)
    return plan, (per_sample - each).clamp_min(0).sum()
