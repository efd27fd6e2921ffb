"""Training of networks with experts (DiffMoE, arXiv 2503.14487), and fitting of their thresholds.

The order of a step: forward, backward, optimiser, then `moe_step`. Averaged weights take the buffers as they are
(`copy_moe_buffers`), and at the end `settle` fits the thresholds to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.training.labelled import LabelledObjective

EXPERTS = "ff.experts"
"""Part of the names of experts' parameters."""
PREDICTOR = "capacity_predictor"
"""Part of the names of capacity predictors' parameters."""


def expert_rates(backbone: float) -> dict[str, float]:
    """Return `LoopConfig.rate_scales` for adding experts to a trained network.

    The other weights learn at `backbone` times the rate of experts, gates and predictors.
    """
    return {EXPERTS: 1.0, "ff.gate": 1.0, PREDICTOR: 1.0, "": backbone}


def moe_step(network: nn.Module) -> None:
    """Update thresholds and selection biases from the observations since the last call, once per optimiser step.

    Where torch.distributed is initialised, all processes must call it: it takes their mean.
    """
    for layer in moe_layers(network).values():
        layer.commit()


def moe_losses(network: nn.Module) -> dict[str, Tensor]:
    """Return the routers' own losses in the last training call, scalars without gradients by layer.

    They are part of the gradient already.
    """
    found = {path: layer.aux_loss for path, layer in moe_layers(network).items()}
    return {path: loss for path, loss in found.items() if loss is not None}


def copy_moe_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy the thresholds and biases of `source` to `target`, such as a network of averaged weights.

    An average of them would lag behind and let too many experts run.
    """
    to = moe_layers(target)
    for path, layer in moe_layers(source).items():
        own = dict(to[path].named_buffers())
        for name, buffer in layer.named_buffers():
            own[name].copy_(buffer)


@torch.no_grad()
def calibrate_thresholds(
    network: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    capacity: float | None = None,
    *,
    call: Any = None,
    passes: int = 2,
) -> None:
    """Fit all thresholds to exact quantiles, so that experts run at a capacity on average.

    Other capacities can be set afterwards (`flowaccel.methods.moe.control.set_moe_capacity`). Needed after fine-tuning,
    quantisation or another resolution, too.

    Args:
        network: with experts whose router has thresholds; it is left in evaluation.
        batches: arguments of its calls, over the times and conditions of use.
        capacity: how many experts a token takes on average; None takes that of the training.
        call: module to call in its place, such as a wrapper around it.
        passes: how often all batches are run; what a layer reads depends on what those before it chose.

    Raises:
        ValueError: no batches, no experts, a router without thresholds, or a capacity out of range.
    """
    layers = _layers(network)
    if not batches:
        raise ValueError("batches must hold at least one, got none")
    for path, layer in layers.items():
        if not layer.settings.thresholded:
            raise ValueError(f"{path} has router={layer.settings.router!r}, which has no thresholds to fit")
        if capacity is not None and not 0 < capacity <= layer.settings.num_experts:
            raise ValueError(f"capacity must be above 0 and at most {layer.settings.num_experts}, got {capacity}")
    network.eval()
    for _ in range(passes):
        with _collecting(list(layers.values())):
            for batch in batches:
                (call or network)(*batch, return_dict=False)
        for layer in layers.values():
            layer.thresholds.use(None)
            layer.thresholds.fit(layer.settings.capacity if capacity is None else capacity)


@torch.no_grad()
def realised_capacity(
    network: nn.Module, batches: Sequence[tuple[Tensor, ...]], *, call: Any = None
) -> dict[str, float]:
    """Return how many experts a token takes on average in inference, by layer.

    Neither thresholds nor modes of `network` change.

    Args:
        network: with experts.
        batches: arguments of its calls.
        call: module to call in its place, such as a wrapper around it.

    Raises:
        ValueError: no batches, no experts, or thresholds that were never fitted.
    """
    layers = _layers(network)
    if not batches:
        raise ValueError("batches must hold at least one, got none")
    pairs, tokens = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def count(path: str, layer: Any, _: Any, output: Tensor) -> None:
        pairs[path] += layer.plan.pairs
        tokens[path] += output.shape[:-1].numel()

    training = network.training
    hooks = [layer.register_forward_hook(partial(count, path)) for path, layer in layers.items()]
    try:
        network.eval()
        for batch in batches:
            (call or network)(*batch, return_dict=False)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return {path: pairs[path] / tokens[path] for path in layers}


def _layers(network: nn.Module) -> dict[str, MoEFeedForward]:
    layers = moe_layers(network)
    if not layers:
        raise ValueError(f"network must have experts, got a {type(network).__name__} without")
    return layers


@contextmanager
def _collecting(layers: list[MoEFeedForward]) -> Iterator[None]:
    try:
        for layer in layers:
            layer.thresholds.discard()
            layer.thresholds.collecting = True
        yield
    finally:
        for layer in layers:
            layer.thresholds.collecting = False


def drawn_batches(
    objective: LabelledObjective, count: int, seed: int, device: torch.device | str = "cpu"
) -> list[tuple[Tensor, ...]]:
    """Draw `count` batches of an objective's inputs for `calibrate_thresholds`."""
    generator = torch.Generator().manual_seed(seed)
    return [objective.arguments(objective.draw(generator, device)) for _ in range(count)]


def settle(network: nn.Module, objective: LabelledObjective, *, batches: int, seed: int, call: Any = None) -> None:
    """Finish a training: set the capacity of the settings and fit the thresholds, where there are any.

    They are fitted to the averaged weights that `network` holds now. It is left in evaluation mode.

    Args:
        network: with experts.
        objective: objective that it was trained with.
        batches: number of its batches to fit thresholds to.
        seed: seed of these batches.
        call: as for `calibrate_thresholds`.
    """
    network.eval()
    layers = _layers(network).values()
    for layer in layers:
        layer.capacity = layer.settings.capacity  # a schedule may have ended early, or begin when it was built
    if any(layer.settings.thresholded for layer in layers):
        device = next(network.parameters()).device
        calibrate_thresholds(network, drawn_batches(objective, batches, seed, device), call=call)


@dataclass(frozen=True, kw_only=True)
class MoEObjective:
    """Objective of a dense network, adapted to one with experts.

    It changes their capacity during training, and updates their thresholds after every step. The routers' own losses
    reach the gradient by themselves.

    Upcycled networks start with all experts and come down to the capacity of the training.
    """

    objective: LabelledObjective
    full_steps: int = 0
    """Steps with all experts for every token,"""
    ramp: int = 0
    """and steps over which the capacity falls linearly from there."""

    def __post_init__(self) -> None:
        if self.full_steps < 0 or self.ramp < 0:
            raise ValueError(f"full_steps and ramp must not be negative, got {self.full_steps} and {self.ramp}")

    def capacity_at(self, step: int, layer: MoEFeedForward) -> float:
        """Return how many experts a token takes on average at optimiser step `step` (0-based)."""
        goal, everything = layer.settings.capacity, float(layer.settings.num_experts)
        if step < self.full_steps:
            return everything
        done = (step - self.full_steps + 1) / (self.ramp + 1)
        return max(goal, everything + done * (goal - everything))

    def at(self, step: int) -> Any:
        """Return the loss function of an optimiser step."""
        return partial(self._loss, step)

    def _loss(self, step: int, network: nn.Module, generator: torch.Generator) -> Tensor:
        for layer in moe_layers(network).values():
            layer.capacity = self.capacity_at(step, layer)
        return self.objective(network, generator)

    def stepped(self, network: nn.Module) -> None:
        """Commit the observations of the step."""
        moe_step(network)


def prepare_training(network: nn.Module) -> None:
    """Enable gradients of every weight but fixed position tables, and disable the network's label dropout.

    The objective drops labels; diffusers' DiT would do so in every block anew.
    """
    network.requires_grad_(True)
    for name, parameter in network.named_parameters():
        if name.endswith("pos_embed"):
            parameter.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
