"""What experts were given in a network call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowaccel.hooks import CallStats


@dataclass(frozen=True)
class Given:
    """Tokens that came to the experts of a layer, and pairs of a token and an expert. Places that a budget keeps for
    them and that hold no token count as pairs: they are computed."""

    tokens: int
    pairs: int

    def __add__(self, other: Given) -> Given:
        return Given(self.tokens + other.tokens, self.pairs + other.pairs)


@dataclass
class ExpertStats(CallStats):
    """What experts were given in a network call."""

    given: dict[str, Given] = field(default_factory=dict)
    """By layer; those that did not run are not there."""
    overflow: int | None = None
    """Pairs of a token and an expert that were chosen and left out for a budget, counted when the run has ended; None
    without a budget."""
    compared = "at the capacity of the training"

    @property
    def capacity(self) -> float | None:
        """Experts that a token was given on average; None where none ran."""
        return mean_capacity([self])

    def __str__(self) -> str:
        return "" if self.capacity is None else f", {_experts(self.capacity, self.overflow)}"

    @classmethod
    def summary(cls, stats: Sequence[ExpertStats], calls: int, macs: str) -> str | None:
        """Return the mean capacity."""
        capacity = mean_capacity(stats)
        if capacity is None:
            return None
        experts = _experts(capacity, total_overflow(stats))
        return f"{experts[0].upper()}{experts[1:]} on average{f', {macs}' if macs else ''}."

    @classmethod
    def notes(cls, stats: Sequence[ExpertStats]) -> list[str]:
        """Return what did not fit the budget."""
        overflow = total_overflow(stats)
        return [] if overflow is None else [f"Left out for the budget: {overflow} pairs of a token and an expert."]


def mean_capacity(stats: Sequence[ExpertStats]) -> float | None:
    """Return how many experts a token was given on average in these calls; None where none ran."""
    given = [layer for found in stats for layer in found.given.values()]
    return sum(layer.pairs for layer in given) / sum(layer.tokens for layer in given) if given else None


def total_overflow(stats: Sequence[ExpertStats]) -> int | None:
    """Return the pairs that were chosen and did not fit the budget; None without one."""
    found = [each.overflow for each in stats if each.overflow is not None]
    return sum(found) if found else None


def _experts(capacity: float, overflow: int | None) -> str:
    """Return what was computed: with a budget, that is room for as many, whether it was taken or not."""
    return f"{'' if overflow is None else 'room for '}{capacity:.2f} experts a token"
