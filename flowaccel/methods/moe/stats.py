"""Statistics of the experts' load in a network call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowaccel.hooks import CallStats


@dataclass(frozen=True)
class Given:
    """Numbers of tokens and of token-expert pairs that a layer's experts received.

    Places that a budget reserves and that hold no token count as pairs: they are computed.
    """

    tokens: int
    pairs: int

    def __add__(self, other: Given) -> Given:
        return Given(self.tokens + other.tokens, self.pairs + other.pairs)


@dataclass
class ExpertStats(CallStats):
    """Statistics of the experts' load in a network call."""

    given: dict[str, Given] = field(default_factory=dict)
    """Load by layer; layers that did not run are missing."""
    overflow: int | None = None
    """Pairs of a token and an expert that were chosen and left out for a budget, counted when the run has ended; None
    without a budget."""
    compared = "at the capacity of the training"

    @property
    def capacity(self) -> float | None:
        """Experts per token on average; None where none ran."""
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
        """Return the pairs that exceeded the budget, in words."""
        overflow = total_overflow(stats)
        return [] if overflow is None else [f"Left out for the budget: {overflow} pairs of a token and an expert."]


def mean_capacity(stats: Sequence[ExpertStats]) -> float | None:
    """Return the number of experts per token on average in these calls; None where none ran."""
    given = [layer for found in stats for layer in found.given.values()]
    return sum(layer.pairs for layer in given) / sum(layer.tokens for layer in given) if given else None


def total_overflow(stats: Sequence[ExpertStats]) -> int | None:
    """Return the number of chosen pairs that did not fit the budget; None without one."""
    found = [each.overflow for each in stats if each.overflow is not None]
    return sum(found) if found else None


def _experts(capacity: float, overflow: int | None) -> str:
    """Return the number of pairs that were computed; with a budget, unused places count, too."""
    return f"{'' if overflow is None else 'room for '}{capacity:.2f} experts a token"
