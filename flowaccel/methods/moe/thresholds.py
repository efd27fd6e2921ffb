"""Thresholds for selecting experts: tracked in training, or fitted afterwards for any capacity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flowaccel.methods.moe.routing import Asked

LOWEST_CAPACITY = 0.05
CURVE_POINTS = 48
MOST_COLLECTED = 4096
"""Tokens of a call whose scores are kept: enough for quantiles, and little memory in large networks."""


class Thresholds(nn.Module):
    """Thresholds of one layer, one per expert, for every kind of score that can be compared with them.

    Buffers, of every kind: `KIND` (E,) the threshold, NaN where only other kinds were ever set, `KIND_curve`
    (points, E) those of a row of capacities, NaN until they are fitted; and `updates`, how often a threshold was set.

    Args:
        experts: E.
        observed: kinds of what training observes: scores, or `load`, which has no threshold.
        momentum: momentum of the running average over training steps.
        joint: whether all experts have the same threshold.
    """

    updates: Tensor

    def __init__(self, experts: int, observed: tuple[str, ...], momentum: float, *, joint: bool = False) -> None:
        super().__init__()
        self.experts, self.momentum, self.joint = experts, momentum, joint
        self.kinds = tuple(kind for kind in observed if kind != "load")
        for kind in self.kinds:
            self.register_buffer(kind, torch.zeros(experts, dtype=torch.float32))
            self.register_buffer(f"{kind}_curve", torch.full((CURVE_POINTS, experts), torch.nan, dtype=torch.float32))
        if self.kinds:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.collecting = False
        self._collected: dict[str, list[Tensor]] = {}
        self._pending: dict[str, tuple[Tensor, int]] = {}
        self._fitted: set[str] = set()
        self._capacity: float | None = None
        self._held: dict[Any, Tensor] = {}

    collecting: bool
    """Whether scores are kept for `fit`."""

    def forward(self, kind: str) -> Tensor:
        """Return the threshold in use, (E,). It is a call, so that offloading brings the buffers.

        Raises:
            ValueError: there is none.
        """
        threshold: Tensor = getattr(self, kind)
        if self._capacity is not None:
            key = (kind, self._capacity, threshold.device)
            if key not in self._held:
                self._held[key] = self.at(kind, self._capacity)
            return self._held[key]
        if not self.fitted(kind):
            raise ValueError(
                "the thresholds that choose experts were never fitted, and without them every token would take every "
                "expert; train the network with flowaccel.methods.moe.train.moe_step(network) after every optimiser "
                "step, or fit them with flowaccel.methods.moe.train.calibrate_thresholds(network, batches)"
            )
        return threshold

    def use(self, capacity: float | None) -> None:
        """Use the fitted thresholds of a capacity.

        None takes those that training tracked, or that were fitted for the capacity of the training.

        Raises:
            ValueError: nothing was fitted, or a capacity that no curve holds.
        """
        self._held = {} if capacity is None else {
            (kind, capacity, getattr(self, kind).device): self.at(kind, capacity) for kind in self.kinds
        }  # fmt: skip
        self._capacity = capacity

    @property
    def capacity(self) -> float | None:
        """Capacity that `use` set last."""
        return self._capacity

    def fitted(self, kind: str) -> bool:
        """Whether there are thresholds of a kind; synchronises with the device until there are."""
        if kind in self._fitted or kind not in self.kinds or self.updates.is_meta:
            return kind in self._fitted
        if int(self.updates) > 0 and not bool(getattr(self, kind).isnan().any()):
            self._fitted.add(kind)
        return kind in self._fitted

    def train(self, mode: bool = True) -> Thresholds:
        """Set the training mode as `nn.Module` does.

        In evaluation mode, the device is asked whether there are thresholds.
        """
        super().train(mode)
        if not mode:
            for kind in self.kinds:
                self.fitted(kind)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._fitted, self._held = set(), {}

    def warm(self, updates: int) -> bool:
        """Whether the thresholds were set at least so many times; waits for the device."""
        return int(self.updates) >= updates

    def observe(self, found: dict[str, Tensor]) -> None:
        """Accumulate the thresholds of a call, (E,) by kind, until `commit`.

        A call that checkpointing repeats counts twice, which leaves the mean as it is.
        """
        for kind, value in found.items():
            total, count = self._pending.get(kind, (torch.zeros_like(value), 0))
            self._pending[kind] = (total + value.detach(), count + 1)

    def commit(self) -> dict[str, Tensor]:
        """Return the mean of the observations since the last call, over all processes, and update the running averages.

        Every process must have observed something, or none.
        """
        means = {kind: total / count for kind, (total, count) in sorted(self._pending.items())}
        self._pending = {}
        for value in means.values():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(value)
                value /= torch.distributed.get_world_size()
        moved = [kind for kind in means if kind in self.kinds]
        for kind in moved:
            buffer: Tensor = getattr(self, kind)
            fresh = means[kind].to(buffer.dtype)
            followed = self.momentum * buffer + (1 - self.momentum) * fresh
            first = (self.updates == 0) | buffer.isnan()
            buffer.copy_(torch.where(first, fresh, followed))
        if moved:
            self.updates += 1
        return means

    def collect(self, asked: Asked, valid: Tensor | None) -> None:
        """Keep the scores (S, E) of a call for `fit`, a random subset of at most `MOST_COLLECTED` tokens."""
        scores = {"gate": asked.scores()}
        if asked.predicted is not None:
            scores["predictor"] = asked.predicted.sigmoid()
        for kind in self.kinds:
            found = scores[kind].detach()
            found = found if valid is None else found[valid]
            if len(found) > MOST_COLLECTED:
                generator = torch.Generator().manual_seed(len(self._collected.get(kind, ())))
                found = found[torch.randperm(len(found), generator=generator)[:MOST_COLLECTED].to(found.device)]
            self._collected.setdefault(kind, []).append(found)

    def discard(self) -> None:
        """Drop scores that were collected but not fitted because something failed."""
        self._collected = {}

    def fit(self, capacity: float) -> None:
        """Set thresholds from the scores that were collected: exact quantiles, for `capacity` and for the curve.

        Raises:
            ValueError: nothing was collected, or a capacity that is not above 0 and at most E.
        """
        if not 0 < capacity <= self.experts:
            raise ValueError(
                f"capacity must be above 0 and at most the number of experts, {self.experts}, got {capacity}"
            )
        if not self._collected:
            raise ValueError("no scores were collected: run the network while collecting")
        for kind, parts in self._collected.items():
            ranked = torch.cat(parts).float().sort(dim=0, descending=True).values
            if self.joint:
                ranked = ranked.flatten().sort(descending=True).values.unsqueeze(1).expand(-1, self.experts)
            curve = [_at_share(ranked, point / self.experts) for point in self.capacities().tolist()]
            getattr(self, f"{kind}_curve").copy_(torch.stack(curve))
            share = capacity / self.experts
            getattr(self, kind).copy_(_at_share(ranked, share) if share < 1 else torch.tensor(-torch.inf))
        self._collected, self._held = {}, {}
        self.updates += 1

    def capacities(self) -> Tensor:
        """Return the capacities of the curve, ascending."""
        top = math.log(self.experts)
        return torch.linspace(math.log(LOWEST_CAPACITY), top, CURVE_POINTS, dtype=torch.float64).exp()

    def at(self, kind: str, capacity: float) -> Tensor:
        """Return the fitted threshold (E,) of a capacity, interpolated; -inf where all experts are wanted.

        Raises:
            ValueError: nothing was fitted, or a capacity that no curve holds.
        """
        curve: Tensor = getattr(self, f"{kind}_curve")
        if not LOWEST_CAPACITY <= capacity <= self.experts:
            raise ValueError(
                f"capacity must lie between {LOWEST_CAPACITY} and the number of experts, {self.experts}, got {capacity}"
            )
        if bool(curve[0].isnan().any()):
            raise ValueError(
                "there are no thresholds for other capacities yet; fit them with "
                "flowaccel.methods.moe.train.calibrate_thresholds(network, batches)"
            )
        if capacity == self.experts:
            return torch.full_like(curve[0], -torch.inf)
        points = self.capacities()
        above = min(max(1, int(torch.searchsorted(points, capacity))), len(points) - 1)
        low, high = points[above - 1].log(), points[above].log()
        share = float(((math.log(capacity) - low) / (high - low)).clamp(0, 1))
        return torch.lerp(curve[above - 1], curve[above], share)


def _at_share(ranked: Tensor, share: float) -> Tensor:
    """Return (E,) the values above which a share of `ranked` (N, E), descending, lies.

    They are finite, so that there are values between them and others.
    """
    place = round(share * len(ranked))
    if place >= len(ranked):
        return ranked[-1].nextafter(torch.full_like(ranked[0], -torch.inf))
    if place == 0:
        return ranked[0]
    return (ranked[place - 1] + ranked[place]) / 2
