"""Training dynamic width and tokens: DyDiT (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803).

Convention: SiT's (t = 1 data, velocity data - noise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowaccel.data import ImageSet
from flowaccel.hooks import macs_by_module, shapes_of
from flowaccel.models.dynamic import Dynamics
from flowaccel.modules.td_lora import ADAPTER, timed_layers

STRATA = 4
_REACH = 0.2
"""How far a controller may move the target."""


@dataclass(frozen=True)
class MacsCosts:
    """Multiply-adds per row of what every gate of a network switches, in the order of its wires."""

    gates: tuple[int, ...]

    @classmethod
    def of(cls, network: Any, arguments: dict[str, Any], rows: int) -> MacsCosts:
        """Counted on one call.

        A gate is charged with the share of its linear layers that it switches and, if it switches heads, with the
        attention between their tokens. What cannot be switched is charged to nobody.

        Args:
            network: a dynamic network.
            arguments: of a call; nothing is computed.
            rows: rows of that call.
        """
        network.dynamic.clear()  # a training step leaves its masks
        counts = macs_by_module(network, shapes_of(arguments))
        if counts is None:
            raise ValueError(f"the multiply-adds of a {type(network).__name__} cannot be counted; is it compiled?")
        names = {id(module): name for name, module in network.named_modules()}
        gates = []
        for wire in network.dynamic.wires:
            made = wire.rows[0].out_features
            cost = sum(counts.get(names[id(linear)], 0) for linear in wire.rows)
            cost += sum(counts.get(names[id(linear)], 0) * made // linear.in_features for linear, _ in wire.columns)
            if wire.attention is not None:
                root = names[id(wire.attention)]
                inner = sum(
                    counts.get(f"{root}.{name}", 0)
                    for name, child in wire.attention.named_modules()
                    if isinstance(child, nn.Linear)
                )
                cost += counts.get(root, 0) - inner
            gates.append(cost // rows)
        return cls(tuple(gates))

    def ratio(self, dynamics: Dynamics, widths: Sequence[Tensor], tokens: dict[str, Tensor]) -> Tensor:
        """(B,) the share of these multiply-adds that is done.

        Args:
            dynamics: the network's.
            widths: (B, units) gates, in the order of the wires.
            tokens: (B,) share of the tokens that is kept, by the path of the site; those that are missing keep all.
        """
        done = torch.zeros(())
        for wire, cost, gates in zip(dynamics.wires, self.gates, widths, strict=True):
            share = gates.float().mean(1)
            if wire.tokens is not None and wire.tokens.path in tokens:
                share = share * tokens[wire.tokens.path]
            done = done.to(share.device) + cost * share
        return done / sum(self.gates)


def kept_tokens(dynamics: Dynamics, rows: int) -> dict[str, Tensor]:
    """(B,) share of the tokens that the last call kept, by the path of the site."""
    return {
        site.path: site.module.keep.float().reshape(rows, -1).mean(1)
        for site in dynamics.sites
        if site.module.keep is not None
    }


@dataclass(frozen=True, kw_only=True)
class WidthObjective:
    """The objective at every step of the training: `objective.at(step)(network, generator)` -> a scalar.

    The loss is that of the dynamic network, plus `macs_weight` times the squared distance of the batch's mean ratio of
    multiply-adds to the target, plus what anchors the whole network (`complete_steps`) or the dynamic one to a teacher
    (`teacher`).
    """

    data: ImageSet
    null_label: int
    costs: MacsCosts
    ratio: float = 0.5
    """The share of the switchable multiply-adds that is aimed at, in (0, 1]; on average over the times of training."""
    batch_size: int = 256
    label_drop: float = 0.1
    macs_weight: float = 2.0
    ramp_start: int = 100
    """Steps before the target begins to fall from 1."""
    ramp: int = 1000
    """It reaches `ratio` after this many steps in all."""
    complete_steps: int = 0
    """For so many steps the whole network is trained beside the dynamic one, as published."""
    teacher: nn.Module | None = None
    """If given, the dynamic network also learns to return what this one does: no labels needed, and cheaper."""
    distill_weight: float = 1.0
    density: Literal["stratified", "uniform", "deployment"] = "stratified"
    """How times are drawn: from `STRATA` equal intervals in turn, at random, or from `times`."""
    times: tuple[float, ...] = ()
    """The times at which the network will run, for `deployment`: the ratio is then what those steps cost."""
    freeze_step: int | None = None
    """From this step gates are those of evaluation and the routers rest; None: never, as published."""
    controller: bool = False
    """Move the target so that the ratio *of evaluation*, without noise, meets `ratio` (an integral controller)."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}")
        if self.density not in ("stratified", "uniform", "deployment"):
            raise ValueError(f"density must be 'stratified', 'uniform' or 'deployment', got {self.density!r}")
        if (self.density == "deployment") != bool(self.times):
            raise ValueError("times are for density='deployment', which needs them")

    def prepare(self, network: Any) -> None:
        """Before training: let the controller's term be trained, where there is one."""
        network.dynamic.correction.requires_grad_(self.controller)

    def target(self, step: int) -> float:
        """The ratio that is aimed at in a step."""
        if step < self.ramp_start:
            return 1.0
        return 1 - (1 - self.ratio) * min(step, self.ramp) / max(self.ramp, 1)

    def at(self, step: int) -> Callable[[nn.Module, torch.Generator], Tensor]:
        """The loss of one step."""

        def loss(network: nn.Module, generator: torch.Generator) -> Tensor:
            return self._loss(network, generator, step)

        return loss

    def _draw_times(self, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(self.batch_size, generator=generator)
        if self.density == "stratified":
            return (uniform + torch.arange(self.batch_size) % STRATA) / STRATA
        if self.density == "deployment":
            return torch.tensor(self.times)[(uniform * len(self.times)).long()]
        return uniform

    def _loss(self, network: Any, generator: torch.Generator, step: int) -> Tensor:
        batch = self.batch_size
        index = torch.randint(len(self.data), (batch,), generator=generator)
        images, labels = self.data.images[index], self.data.labels[index]
        if self.augment is not None:
            images = self.augment(images, generator)
        noise, t = torch.randn(images.shape, generator=generator), self._draw_times(generator)
        dropped = torch.rand(batch, generator=generator) < self.label_drop
        seen = torch.where(dropped, self.null_label, labels)
        device = next(network.parameters()).device
        images, noise, t, seen = (value.to(device) for value in (images, noise, t, seen))
        mix = t.reshape(-1, *[1] * (images.dim() - 1))
        state, target = mix * images + (1 - mix) * noise, images - noise

        dynamics: Dynamics = network.dynamic
        dynamics.generator = generator
        dynamics.hard = self.freeze_step is not None and step >= self.freeze_step
        output = network(state, t, seen, return_dict=False)[0]
        loss = _mse(output, target)
        if not dynamics.hard:
            loss = loss + self._macs_loss(network, t, step)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(state, t, seen, return_dict=False)[0]
            loss = loss + self.distill_weight * _mse(output, taught)
        if step < self.complete_steps:
            redrawn = torch.rand(batch, generator=generator) < self.label_drop  # as published: on its own
            labels = torch.where(redrawn, self.null_label, labels).to(device)
            with dynamics.complete():
                loss = loss + _mse(network(state, t, labels, return_dict=False)[0], target)
        return loss

    def _macs_loss(self, network: Any, t: Tensor, step: int) -> Tensor:
        dynamics: Dynamics = network.dynamic
        kept = kept_tokens(dynamics, len(t))
        done = self.costs.ratio(dynamics, dynamics.masks, kept).mean()
        aim = torch.as_tensor(self.target(step))
        if not self.controller:
            return self.macs_weight * (done - aim).square()
        aim = aim + dynamics.correction.detach().clamp(-_REACH, _REACH)
        off = self._evaluated(network, t, kept) - self.ratio if step >= self.ramp else torch.zeros(())
        # the gradient of the second term is the distance, so that the optimiser integrates it
        return self.macs_weight * (done - aim).square() + dynamics.correction * off.detach()

    def _evaluated(self, network: Any, t: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """The ratio with the gates of evaluation; tokens as they were drawn."""
        dynamics: Dynamics = network.dynamic
        with torch.no_grad():
            embedding = embedded_time(network, t)
            return self.costs.ratio(dynamics, dynamics.evaluated(embedding), kept).mean()


def freeze_backbone(network: Any) -> None:
    """Leave nothing to train but the routers of a dynamic network and, where there is one, its TD-LoRA.

    With a TD-LoRA the loss of the whole network (`WidthObjective.complete_steps`) keeps a meaning, because adapters
    stay on in it. Do this before the network is given to an optimiser; a controller is switched by
    `WidthObjective.prepare` afterwards.

    Args:
        network: a dynamic network; weights that it shares with another are frozen there, too.
    """
    network.requires_grad_(False)
    for wire in network.dynamic.wires:
        wire.gate.router.requires_grad_(True)
    for site in network.dynamic.sites:
        site.router.requires_grad_(True)
    for layer in timed_layers(network).values():
        layer.lora_A[ADAPTER].requires_grad_(True)
        layer.experts.requires_grad_(True)


def embedded_time(network: Any, t: Tensor) -> Tensor:
    """What routers read, (B, D), without setting any gate."""
    rule = network.dynamic.rule
    with network.dynamic.paused():
        return network.get_submodule(rule.time_embed)(network.get_submodule(rule.time_proj)(rule.time_scale * t))


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target).square().mean()
