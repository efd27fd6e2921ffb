"""Decisions of a cache at a step, from the gate's scores and the guard, per image, row or batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowaccel.caching.gates import Gate, Step
from flowaccel.caching.gates.base import State
from flowaccel.caching.guard import Guard

Unit = Literal["image", "row", "batch"]
UNITS: tuple[Unit, ...] = ("image", "row", "batch")
NEAR = 0.01
"""Scores within this distance of 1 are near-ties, which rounding errors may decide otherwise."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Decision of which units are computed at one step."""

    compute: tuple[bool, ...]
    """Per unit, or a single entry if all units agree."""
    near_ties: int = 0
    """Number of units whose score was within 1% of the threshold."""
    host_reads: int = 0
    """Number of times the host waited for a value from the device."""
    not_finite: tuple[int, ...] = ()
    """Indices of the units that are computed because a value computed for them earlier was not finite."""

    @property
    def mask(self) -> Tensor:
        """The decision as a tensor (units,) bool, on the CPU."""
        return torch.tensor(self.compute)


@dataclass(kw_only=True)
class Decider:
    """Decisions of one run for the units of one network (and branch, if branches decide separately)."""

    gate: Gate
    guard: Guard
    state: State = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    """Per unit, the number of steps since the last computed one."""
    spent: list[float] = field(default_factory=list)
    """Per unit, sum of the scores at reused steps."""
    finite: Tensor | None = None
    """Whether all values computed since the last decision are finite, (units,) on the device; None if none were
    computed."""
    _chosen: tuple[bool, ...] = ()
    """Decision of gate and guard; a single entry for all units if the gate is a schedule."""

    def decide(self, units: int, signal: Tensor | None, step: Step) -> Decision:
        """Decide which units are computed at a step; `update` must follow."""
        units = 1 if self.gate.static else units
        if not self.skipped:
            self.skipped, self.spent = [0] * units, [0.0] * units
        score: Tensor | None = None
        self._chosen = (True,) * units
        if self.state:
            score, self.state = self.gate.score(self.state, signal, step)
        if score is None or self.guard.forces(step.index, step.count):
            return self._counted([0.0] * units)
        reads = 0 if self.gate.static and self.finite is None else 1
        scores, finite = self._read(score)
        self._chosen = tuple(not value < 1.0 or self._exhausted(unit, value) for unit, value in enumerate(scores))
        return self._counted(
            scores,
            finite,
            near_ties=sum(abs(value - 1.0) < NEAR for value in scores),
            host_reads=reads,
        )

    def update(self, signal: Tensor | None, feedback: Tensor | None, decision: Decision, step: Step) -> None:
        """Update the gate's state after the step."""
        computed = decision.mask if len(decision.compute) == len(self._chosen) else torch.tensor(self._chosen)
        self.state = self.gate.update(self.state, signal, feedback, computed, step)

    def _read(self, score: Tensor) -> tuple[list[float], list[bool]]:
        """Return the scores, and which units are finite, with a single device synchronisation."""
        if self.finite is None:
            return score.tolist(), []
        both = torch.cat([score.to(self.finite.device, torch.float32), self.finite.float()]).tolist()
        self.finite = None
        return both[: len(score)], [bool(value) for value in both[len(score) :]]

    def _exhausted(self, unit: int, score: float) -> bool:
        over_run = self.guard.max_run is not None and self.skipped[unit] >= self.guard.max_run
        return over_run or (self.guard.budget is not None and self.spent[unit] + score > self.guard.budget)

    def _counted(self, scores: Sequence[float], finite: Sequence[bool] = (), **more: int) -> Decision:
        compute, broken = self._chosen, tuple(unit for unit, number in enumerate(finite) if not number)
        if broken:
            chosen = compute if len(compute) == len(finite) else compute * len(finite)
            compute = tuple(own or unit in broken for unit, own in enumerate(chosen))
            if len(compute) == len(self._chosen):
                self._chosen = compute
        for unit, computed in enumerate(self._chosen):
            self.skipped[unit] = 0 if computed else self.skipped[unit] + 1
            self.spent[unit] += 0.0 if computed else scores[unit]
        return Decision(compute=compute, not_finite=broken, **more)


def all_compute(units: int) -> Decision:
    """Return the decision to compute every unit."""
    return Decision(compute=(True,) * units)
