"""Width plans: the heads and channels of every step, fixed before sampling because routers read only the time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowaccel.methods.dynamic_width.gated_layers import Bits
from flowaccel.methods.dynamic_width.networks import time_embedding

_CLOSE = 1e-3


@dataclass(frozen=True, kw_only=True)
class WidthPlan:
    """Gates of a dynamic network at every evaluation of a run (T evaluations, G gates).

    Args:
        scheduler: class of the scheduler.
        scheduler_config: hash of its configuration.
        routers: fingerprint of the routers that it was asked of.
        timesteps: the scheduler's, one per evaluation.
        gates: names of the gates, in the order of the network.
        widths: per evaluation, the units of every gate as zeros and ones, with a space between gates.

    Raises:
        ValueError: parts that do not fit each other.
    """

    name: ClassVar[str] = "width_plan"

    scheduler: str
    scheduler_config: str
    routers: str
    timesteps: tuple[float, ...]
    gates: tuple[str, ...]
    widths: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.timesteps) != len(self.widths):
            raise ValueError(f"{len(self.widths)} widths do not fit {len(self.timesteps)} timesteps; one for each")
        for step, width in enumerate(self.widths):
            units = width.split(" ") if isinstance(width, str) else []
            if len(units) != len(self.gates) or any(not u or set(u) - {"0", "1"} or "1" not in u for u in units):
                raise ValueError(
                    f"widths[{step}] must be {len(self.gates)} groups of zeros and ones, one for each gate and none "
                    f"without a one, got {str(width)[:60]!r}"
                )

    @classmethod
    def of(cls, network: Any, times: Tensor, *, timesteps: Sequence[float], scheduler: tuple[str, str]) -> WidthPlan:
        """Compute the plan with the routers of a dynamic network, in float32 on the CPU.

        Args:
            network: the dynamic network.
            times: (T,) what the network's `timestep` argument will be.
            timesteps: the same as the scheduler says it.
            scheduler: its class and the hash of its configuration.
        """
        dynamics = network.dynamic
        found = dynamics.evaluated(time_embedding(network, times))
        widths = [" ".join(_bits(gate[step]) for gate in found) for step in range(len(times))]
        return cls(
            scheduler=scheduler[0],
            scheduler_config=scheduler[1],
            routers=dynamics.fingerprint,
            timesteps=tuple(timesteps),
            gates=tuple(gated.path for gated in dynamics.gated_layers),
            widths=tuple(widths),
        )

    @functools.cached_property
    def bits(self) -> tuple[Bits, ...]:
        """Units of every gate, per evaluation."""
        return tuple(tuple(width.split(" ")) for width in self.widths)

    @functools.cached_property
    def shares(self) -> Tensor:
        """(T, G) share of every gate's units that is on."""
        return torch.tensor([[units.count("1") / len(units) for units in row] for row in self.bits])

    def ratios(self, costs: Sequence[float]) -> Tensor:
        """Return (T,) the share of the multiply-adds that is left at each evaluation.

        Args:
            costs: multiply-adds of every gate at full width.
        """
        weights = torch.tensor(list(costs), dtype=torch.float64)
        return (self.shares.double() @ weights / weights.sum()).float()

    @property
    def buckets(self) -> int:
        """Number of different widths."""
        return len(set(self.widths))

    def bucketed(self, count: int, costs: Sequence[float]) -> WidthPlan:
        """Return a plan of at most `count` different widths, for compiled networks.

        Neighbouring evaluations share the union of their units, chosen so that the total computation is least (exact
        dynamic programming).

        Args:
            count: at least 1.
            costs: multiply-adds of every gate at full width.

        Raises:
            ValueError: `count` is less than 1.
        """
        if count < 1:
            raise ValueError(f"the number of buckets must be at least 1, got {count}")
        total = len(self.widths)
        weights = list(costs)

        @functools.cache
        def union(first: int, last: int) -> Bits:
            if first == last:
                return self.bits[first]
            return tuple(_union(a, b) for a, b in zip(union(first, last - 1), self.bits[last], strict=True))

        def price(first: int, last: int) -> float:
            row = union(first, last)
            work = sum(cost * units.count("1") / len(units) for cost, units in zip(weights, row, strict=True))
            return (last - first + 1) * work

        # best[k][n]: the cheapest way to cover the first n evaluations with k buckets, and where the last one begins
        best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for _ in range(min(count, total)):
            before = best[-1]
            best.append(
                {
                    n: min((before[m][0] + price(m, n - 1), m) for m in before if m < n)
                    for n in range(1, total + 1)
                    if any(m < n for m in before)
                }
            )
        buckets = min(range(1, len(best)), key=lambda k: best[k].get(total, (float("inf"), 0))[0])
        widths, end = list(self.widths), total
        while end:
            start = best[buckets][end][1]
            widths[start:end] = [" ".join(union(start, end - 1))] * (end - start)
            end, buckets = start, buckets - 1
        return replace(self, widths=tuple(widths))

    def differences(self, *, routers: str, scheduler: tuple[str, str], timesteps: Sequence[float]) -> list[str]:
        """Return in words how a run differs from the one that the plan was made for."""
        found = []
        if routers != self.routers:
            found.append(f"the routers are {routers}, not {self.routers}")
        if scheduler != (self.scheduler, self.scheduler_config):
            there, here = f"{self.scheduler} ({self.scheduler_config})", f"{scheduler[0]} ({scheduler[1]})"
            found.append(f"the scheduler is {here}, not {there}")
        if len(timesteps) != len(self.timesteps):
            found.append(f"it makes {len(timesteps)} evaluations, not {len(self.timesteps)}")
        elif any(abs(a - b) > _CLOSE * max(1.0, abs(b)) for a, b in zip(timesteps, self.timesteps, strict=True)):
            found.append("its timesteps are others")
        return found

    def fits(self, **run: Any) -> bool:
        """Whether a run, described as for `differences`, is the one that it was made for."""
        return not self.differences(**run)

    def check(self, **run: Any) -> None:
        """Raise a ValueError if the run is not the one that the plan was made for."""
        found = self.differences(**run)
        if found:
            raise ValueError(
                f"the width plan was made for another run: {'; '.join(found)}. Run what it was made for, make a new "
                "one with `flowaccel plan`, or leave the plan out: then every run makes its own"
            )


def _bits(units: Tensor) -> str:
    return "".join("1" if on else "0" for on in units.tolist())


def _union(first: str, second: str) -> str:
    return "".join("1" if "1" in pair else "0" for pair in zip(first, second, strict=True))
