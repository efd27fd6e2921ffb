"""Accelerator for networks with experts (DiffMoE, arXiv 2503.14487, and its rivals), at a chosen capacity."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowaccel.checks import is_number
from flowaccel.hooks import Call, CallRecord, Pipeline, Run, denoiser
from flowaccel.methods.moe.control import (
    moe_layers,
    set_experts_backend,
    set_moe_budget,
    set_moe_capacity,
    set_moe_selection,
)
from flowaccel.methods.moe.experts import BACKENDS
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.networks import MoEMixin
from flowaccel.methods.moe.stats import ExpertStats, Given
from flowaccel.recipe.accelerator import Detach
from flowaccel.recipe.loading import load_network
from flowaccel.recipe.serialization import learned
from flowaccel.recipe.variant import Variant, put_in_place

FOLDER = "moe"
SELECTIONS = ("predictor_mask", "gate_threshold")
"""Ways to choose with which an image does not depend on what it is batched with."""


@dataclass(frozen=True)
class MixtureOfExperts(Variant):
    """Accelerator that replaces the network by one with experts (DiffMoE, arXiv 2503.14487).

    The experts take the place of feed-forwards.

    All settings are those of this accelerator while it is attached, also where they are None; what the network was set
    to before comes back with `restore`.

    Args:
        network: the network with experts, or its folder. None takes the folder `moe` beside the pipeline's components.
        capacity: how many experts a token takes on average, from 0.05 to the number of experts, with thresholds that
            were fitted for it; less is faster and further from what was trained. None: that of the training.
        selection: how the router `diffmoe` chooses: `predictor_mask` asks its capacity predictor, `gate_threshold` its
            gate; None takes what the network was saved with.
        backend: how experts are run: `loop`, `bmm` or `grouped_mm`, or `auto`, the fastest here.
        budget: let an expert take at most so many times its even share of an image's tokens. Shapes are then known
            beforehand and nothing waits for the device, but the whole budget is computed, also where there are fewer
            tokens for it, and pairs that do not fit are left out; the report counts them. None: no bound.

    Raises:
        TypeError: a network without experts.
        ValueError: numbers out of range, or unknown names.
    """

    name: ClassVar[str] = "mixture_of_experts"
    what = "network with experts"
    advice = "train one with `flowaccel train moe`, or make one with flowaccel.methods.moe.networks.upcycle_to_moe"

    network: nn.Module | str | Path | None = learned(FOLDER, lambda folder: load_moe(folder), default=None)
    capacity: float | None = None
    selection: str | None = None
    backend: str = "auto"
    budget: float | None = None

    def __post_init__(self) -> None:
        self.check_network()
        for name, value in (("capacity", self.capacity), ("budget", self.budget)):
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a positive number or None, got {value!r}")
        if self.selection == "gate_topk_count":
            raise ValueError(f"selection {_by_batch('gate_topk_count')}")
        if self.selection not in (None, *SELECTIONS):
            raise ValueError(f"selection must be one of {list(SELECTIONS)} or None, got {self.selection!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")

    @staticmethod
    def is_form(network: nn.Module) -> bool:
        """Whether a network is of a class with experts, and has some."""
        return isinstance(network, MoEMixin) and bool(moe_layers(network))

    def stand_in(self, pipe: Pipeline) -> Any:
        """Return the network with experts, on the device and in the dtype of the pipeline's network.

        The tensors that take part in routing keep their dtype.

        Raises:
            ValueError: it is a form of another network.
        """
        return self.fitted_to(self.resolve(pipe), denoiser(pipe))

    def attach(self, pipe: Pipeline) -> Detach:
        """Replace the network and set its experts; detaching restores the original object and settings.

        Raises:
            ValueError: a network or settings that do not fit, or thresholds that were never fitted.
        """
        network = self.stand_in(pipe)
        layers = moe_layers(network)
        with ExitStack() as undo:
            for layer in layers.values():
                undo.callback(_put_back(layer))
            self._set(network, layers)
            undo.callback(put_in_place(pipe, network, _LoadRecorder(network, layers, self.budget)))
            return undo.pop_all().close

    def _set(self, network: Any, layers: dict[str, MoEFeedForward]) -> None:
        set_moe_capacity(network, self.capacity)
        set_experts_backend(network, self.backend)
        set_moe_budget(network, self.budget)
        for layer in layers.values():
            layer.selection = layer.settings.inference_selection
        if self.selection is not None:
            set_moe_selection(network, self.selection)
        for path, layer in layers.items():
            self._check(path, layer)

    def _check(self, path: str, layer: MoEFeedForward) -> None:
        router = layer.settings.router
        if layer.invariance == "batch":
            raise ValueError(f"the selection of {path} {_by_batch(layer.selection)}")
        if self.budget is not None and not layer.settings.thresholded:
            raise ValueError(
                f"budget is for routers that choose by thresholds; {path} has router={router!r}, with which shapes are "
                f"known without, got {self.budget}"
            )
        if layer.settings.thresholded:
            layer.thresholds(layer.score_kind)  # raises where there are none


def _by_batch(selection: str) -> str:
    return (
        f"is {selection!r}, with which an image depends on what it is batched with; take one of {list(SELECTIONS)}, "
        "or, for parity with published numbers, put the network into the pipeline yourself, without this accelerator"
    )


def _put_back(layer: MoEFeedForward) -> Detach:
    """Return a function that restores a layer's current settings."""
    experts, backend = layer.experts, layer.experts.backend
    selection, budget, capacity = layer.selection, layer.budget, layer.thresholds.capacity

    def put_back() -> None:
        experts.backend, layer.selection, layer.budget = backend, selection, budget
        layer.thresholds.use(capacity)

    return put_back


class _LoadRecorder:
    """Wrapper around the network's calls that records the experts' load."""

    def __init__(self, network: nn.Module, layers: dict[str, MoEFeedForward], budget: float | None) -> None:
        self.network, self.layers, self.budget = network, layers, budget

    def __call__(self, call_next: Callable[..., Any], call: Call) -> Any:
        if call.module is not self.network:
            return call_next()
        for layer in self.layers.values():
            layer.plan = None  # a cache may leave out the layer
        output = call_next()
        self._note(call)
        return output

    def _note(self, call: Call) -> None:
        record, overflow = call.record, []
        stats: ExpertStats = record.stats.setdefault(MixtureOfExperts.name, ExpertStats())
        for path, layer in self.layers.items():
            if layer.plan is None or layer.pooled is None:
                continue
            (rows, length), pairs = layer.pooled, layer.plan.pairs
            name = f"{path}.experts"
            stats.given[name] = stats.given.get(name, Given(0, 0)) + Given(rows * length, pairs)
            before = record.done.get(name, (0, 0))
            record.done[name] = (before[0] + rows, before[1] + pairs * layer.shape.macs)
            if layer.overflow is not None:
                overflow.append(layer.overflow)
        if overflow:
            self._overflow(call.run).append((record, torch.stack(overflow).sum()))

    def _overflow(self, run: Run) -> list[tuple[CallRecord, Tensor]]:
        """Return the run's calls with their overflow, a scalar on the device each.

        They are read when the run ends, so that no step waits for the device.
        """
        if self not in run.state:
            found: list[tuple[CallRecord, Tensor]] = []
            run.state[self] = found
            run.at_end.append(functools.partial(self._count, run, found))
        left_out: list[tuple[CallRecord, Tensor]] = run.state[self]
        return left_out

    def _count(self, run: Run, found: list[tuple[CallRecord, Tensor]]) -> None:
        numbers = torch.stack([number for _, number in found]).tolist()
        for (record, _), number in zip(found, numbers, strict=True):
            stats: ExpertStats = record.stats[MixtureOfExperts.name]
            stats.overflow = (stats.overflow or 0) + number
        total = sum(numbers)
        if total and not run.failed:
            warnings.warn(
                f"budget={self.budget} was too small: {total} of the pairs of a token and an expert that were chosen "
                "in this run did not fit and were left out; give MixtureOfExperts a larger budget, or None",
                RuntimeWarning,
                stacklevel=2,
            )


def load_moe(folder: Path) -> nn.Module:
    """Load a network with experts; raises as `load_network` does."""
    return load_network(folder, MixtureOfExperts.what)
