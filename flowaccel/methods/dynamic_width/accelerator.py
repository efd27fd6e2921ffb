"""Dynamic width and tokens: DyDiT (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803), sliced for real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from flowaccel.checks import is_number, is_whole
from flowaccel.hooks import Call, CallStats, Identity, Pipeline, Session, denoiser, session_of
from flowaccel.methods.dynamic_width.adapter import WEIGHTS_FILE as ADAPTER_WEIGHTS
from flowaccel.methods.dynamic_width.adapter import WidthAdapter
from flowaccel.methods.dynamic_width.network import Dynamics
from flowaccel.methods.dynamic_width.plan import WidthPlan
from flowaccel.recipe.accelerator import Detach
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.loading import load_network
from flowaccel.recipe.serialization import component, learned
from flowaccel.recipe.variant import Variant, put_in_place

FOLDER = "width"
PLANS: dict[str, type[WidthPlan]] = {WidthPlan.name: WidthPlan}


@dataclass(frozen=True)
class DynamicWidth(Variant):
    """Accelerator that replaces the network by one of dynamic width.

    At every timestep it computes only the heads and channels that its routers keep there, and, where it has token
    routers, sends only the tokens that these keep through its feed-forwards.

    What is kept of heads and channels depends on time alone, so a run's plan is made before its first step, layers are
    sliced to it and the slices are held for the next run.

    Args:
        network: the dynamic network; or a `WidthAdapter`, which makes one around the pipeline's own weights; or the
            folder of either. None takes the folder `width` beside the pipeline's components.
        plan: which heads and channels are on at which step, as `flowaccel plan` writes it; None lets every run make its
            own. A run that the plan was not made for raises a ValueError.
        buckets: let a run have at most so many different widths, by the union of neighbouring ones; for compiled
            networks. None: as many as the routers give.
        gather: by layer, whether to gather the tokens that it keeps, or to compute all and clear the rest, which is the
            same and may be faster for few tokens; `flowaccel plan` measures it. None gathers in all layers.
        capacities: by layer, the share of the tokens of every image that is computed, those that are wanted most: with
            it no step waits for the device to learn how many tokens there are. `flowaccel plan --capacities` fits them.
            None computes as many as are kept.
        slice_memory: how much the slices may take, in units of the weights that they are cut from; what does not fit is
            cut anew at every step.

    Raises:
        TypeError: a network or plan that is none.
        ValueError: numbers out of range.
    """

    name: ClassVar[str] = "dynamic_width"
    what = "dynamic network"
    advice = (
        "make one with flowaccel.methods.dynamic_width.networks.make_dynamic, and train it with `flowaccel train width`"
    )

    network: nn.Module | str | Path | None = learned(FOLDER, lambda folder: load_width(folder), default=None)
    plan: WidthPlan | None = component(PLANS, default=None)
    buckets: int | None = None
    gather: Mapping[str, bool] | None = None
    capacities: Mapping[str, float] | None = None
    slice_memory: float = 1.0

    def __post_init__(self) -> None:
        self.check_network()
        if self.plan is not None and not isinstance(self.plan, WidthPlan):
            raise TypeError(f"plan must be a WidthPlan or None, got {self.plan!r}")
        if self.buckets is not None and not is_whole(self.buckets, 1):
            raise ValueError(f"buckets must be a whole number of at least 1, or None, got {self.buckets!r}")
        for path, share in (self.capacities or {}).items():
            if not is_number(share, 0, 1) or share == 0:
                raise ValueError(f"capacities must lie in (0, 1], got {share!r} for {path}")
        for path, choice in (self.gather or {}).items():
            if not isinstance(choice, bool):
                raise ValueError(f"gather must be true or false for every layer, got {choice!r} for {path}")
        if not is_number(self.slice_memory, 0):
            raise ValueError(f"slice_memory must not be negative, got {self.slice_memory!r}")

    @staticmethod
    def is_form(network: nn.Module) -> bool:
        """Whether a network has dynamic width, or is an adapter that adds it."""
        return isinstance(network, WidthAdapter) or isinstance(getattr(network, "dynamic", None), Dynamics)

    def stand_in(self, pipe: Pipeline) -> Any:
        """Return the dynamic network in evaluation mode, on the device and in the dtype of the pipeline's network.

        Raises:
            ValueError: it is a dynamic form of another network, or an adapter for one.
        """
        network, base = self.resolve(pipe), denoiser(pipe)
        if isinstance(network, WidthAdapter):
            return network.applied(base, Identity.of(base).config).eval()
        return self.fitted_to(network, base)

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, and that the widths follow the loop's time."""
        return super().tags | {Tag.LOOP_TIME}

    def attach(self, pipe: Pipeline) -> Detach:
        """Replace the network; detaching restores the original object."""
        network = self.stand_in(pipe)
        dynamics: Dynamics = network.dynamic
        if self.plan is not None and self.plan.routers != dynamics.fingerprint:
            raise ValueError(
                f"the width plan was made for routers {self.plan.routers}, and these are {dynamics.fingerprint}; make "
                "a new one with `flowaccel plan`"
            )
        dynamics.cache.bound(int(self.slice_memory * dynamics.weight_bytes))
        self._set_sites(dynamics)
        return put_in_place(pipe, network, _PlanRunner(self, session_of(pipe), network))

    def _set_sites(self, dynamics: Dynamics) -> None:
        paths = {site.path for site in dynamics.sites}
        for name, given in (("gather", self.gather), ("capacities", self.capacities)):
            unknown = sorted(set(given or {}) - paths)
            if unknown:
                raise ValueError(
                    f"{name} names layers that leave out no tokens: {unknown[:3]}; there are {sorted(paths)}"
                )
        for site in dynamics.sites:
            site.module.gather = (self.gather or {}).get(site.path, True)
            site.capacity = (self.capacities or {}).get(site.path)
            site.module.capacity = None


class _PlanRunner:
    """Wrapper around the network's calls that applies the gates of the width plan."""

    def __init__(self, config: DynamicWidth, session: Session, network: Any) -> None:
        self.config, self.session, self.network = config, session, network
        self.dynamics: Dynamics = network.dynamic
        self.routers = self.dynamics.fingerprint  # once: on a GPU it waits for the device

    def __call__(self, call_next: Callable[..., Any], call: Call) -> Any:
        if call.module is not self.network:
            return call_next()
        plan = call.run.state.get(self)
        if plan is None:
            plan = call.run.state[self] = self._plan(call)
        place = min((call.run.begin or 0) + call.step, len(plan.bits) - 1)
        dynamics = self.dynamics
        dynamics.chosen, cut = plan.bits[place], dynamics.cache.passing
        try:
            return call_next()
        finally:
            dynamics.chosen = None
            if call.record.what == "computed":
                _note(call, dynamics, plan.shares[place].tolist(), dynamics.cache.passing - cut)

    def _plan(self, call: Call) -> WidthPlan:
        """Return the plan for this run: the previous run's if it still fits, the given one, or a new one."""
        timesteps, scheduler = call.run.timesteps, self.session.pipe.scheduler
        found = Identity.of(scheduler)
        asked = (found.kind, found.config)
        run = {"routers": self.routers, "scheduler": asked, "timesteps": timesteps}
        if self.config.plan is not None:
            self.config.plan.check(**run)
        key, made = (self.config.plan, self.config.buckets), self.dynamics.plan
        if made is not None and made.fits(**run) and self.dynamics.plan_key == key:
            return made
        plan = self.config.plan
        if plan is None:
            scale = scheduler.config.get("num_train_timesteps", 1000)
            times = call.family.argument_of(torch.tensor(timesteps), scale)
            plan = WidthPlan.of(self.network, times, timesteps=timesteps, scheduler=asked)
        if self.config.buckets is not None:
            plan = plan.bucketed(self.config.buckets, self.dynamics.gate_weights)
        self.dynamics.plan, self.dynamics.plan_key = plan, key
        self.dynamics.keep_slices(plan.bits)
        return plan


@dataclass
class WidthStats(CallStats):
    """Statistics of a network call with dynamic width."""

    width: float
    """Share of the switchable heads and channels that was computed."""
    slice_bytes: int
    """Weights of parts of layers that were held beside the whole layers."""
    slices_cut: int
    """Parts of layers that were cut for this call and not held."""

    def __str__(self) -> str:
        return f", width {self.width:.0%}"

    @classmethod
    def summary(cls, stats: Sequence[WidthStats], calls: int, macs: str) -> str:
        """Return the mean width."""
        mean = sum(found.width for found in stats) / len(stats)
        return f"Width {mean:.0%} on average{f', {macs} left out' if macs else ''}."

    @classmethod
    def notes(cls, stats: Sequence[WidthStats]) -> list[str]:
        """Return the memory use of the layers' slices, in words."""
        held, cut = max(found.slice_bytes for found in stats), sum(found.slices_cut for found in stats)
        return [f"Slices of layers: {held / 1e6:.1f} MB held, {cut} cut anew for want of room."] if held or cut else []


def _note(call: Call, dynamics: Dynamics, shares: list[float], cut: int) -> None:
    """Add what was left out to the call's record."""
    record = call.record
    record.stats[DynamicWidth.name] = WidthStats(sum(shares) / len(shares), dynamics.cache.held, cut)
    for path, share in dynamics.left_out(shares).items():
        block = path.rpartition(".")[0]
        skipped = max(
            record.not_run.get(part, 0) for part in ("", block, path)
        )  # a cache's doing: it did not run at all
        record.not_run[path] = record.not_run.get(path, 0) + max(0, call.rows - skipped) * share


def load_width(folder: Path) -> nn.Module:
    """Load a dynamic network or an adapter that makes one; raises as `load_network` does."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return WidthAdapter.from_pretrained(folder)
    return load_network(folder, "dynamic network")
