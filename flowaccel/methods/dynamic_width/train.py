"""Training dynamic width and tokens: DyDiT (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803).

Convention: SiT's (t = 1 data, velocity data - noise). DyDiT's own objective, on a DDPM chain, is made of the terms of
`flowaccel.training.ddpm` and of `MacsCosts.ratio`; there is no `WidthObjective` for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowaccel.data import ImageSet
from flowaccel.hooks import macs_by_module, shapes_of
from flowaccel.methods.dynamic_width.fused import TokenSingleBlock
from flowaccel.methods.dynamic_width.network import Dynamics
from flowaccel.methods.dynamic_width.td_lora import ADAPTER, timed_layers

STRATA = 4
_REACH = 0.2
"""Largest change that a controller may make to the target."""


RECOMMENDED: dict[str, dict[str, Any]] = {
    "routers": {"normalise": True, "bias": 4.0, "token_bias": 4.0, "tau": 2.0},
    "objective": {"ramp_start": 0, "controller": True, "distill_weight": 1.0},
}
"""Arguments of `DynamicSettings` and of `WidthObjective` that are not the published ones, which are their defaults."""
RECOMMENDED_REST = 0.1
"""Last share of the recommended training, in which the routers rest."""
STYLES = ("recommended", "published")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Arguments of a training style, with overrides applied."""

    routers: dict[str, Any]
    objective: dict[str, Any]


def plan_training(
    style: str, *, routers: dict[str, Any], objective: dict[str, Any], rest: float | None, steps: int
) -> TrainingPlan:
    """Return the arguments of `DynamicSettings` and of `WidthObjective` for a training style.

    Args:
        style: one of `STYLES`.
        routers: settings that are chosen otherwise.
        objective: arguments that are chosen otherwise.
        rest: the last part of the training in which routers rest, in [0, 1); None leaves it to the style.
        steps: number of steps of the training.

    Raises:
        ValueError: an unknown style, or `rest` out of range.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if rest is not None and not 0 <= rest < 1:
        raise ValueError(f"rest must lie in [0, 1), got {rest}")
    ours = style == "recommended"
    share = rest if rest is not None else RECOMMENDED_REST if ours else 0.0
    start = RECOMMENDED if ours else {"routers": {}, "objective": {"distill_weight": 0.0}}
    return TrainingPlan(
        routers={**start["routers"], **routers},
        objective={**start["objective"], "freeze_step": round(steps * (1 - share)) if share else None, **objective},
    )


@dataclass(frozen=True)
class MacsCosts:
    """Multiply-adds per row that every gate of a network switches, in the order of its gates."""

    gates: tuple[int, ...]
    everywhere: tuple[int, ...] = ()
    """Part of `gates` that is computed even if all tokens are left out that can be; empty for nothing."""

    @classmethod
    def of(cls, network: Any, arguments: dict[str, Any], rows: int) -> MacsCosts:
        """Count the multiply-adds of one call.

        A gate is charged with the share of its linear layers that it switches and, if it switches heads, with the
        attention between their tokens. What cannot be switched is charged to nobody.

        Args:
            network: a dynamic network.
            arguments: arguments of a call; nothing is computed.
            rows: rows of that call.
        """
        network.dynamic.clear()  # a training step leaves its masks
        counts = macs_by_module(network, shapes_of(arguments))
        if counts is None:
            raise ValueError(f"the multiply-adds of a {type(network).__name__} cannot be counted; is it compiled?")
        names = {id(module): name for name, module in network.named_modules()}
        gates, everywhere = [], []
        for gated in network.dynamic.gated_layers:
            made = gated.rows[0].out_features
            cost = sum(counts.get(names[id(linear)], 0) for linear in gated.rows)
            cost += sum(counts.get(names[id(linear)], 0) * made // linear.in_features for linear, _ in gated.columns)
            if gated.attention is not None:
                root = names[id(gated.attention)]
                inner = sum(
                    counts.get(f"{root}.{name}", 0)
                    for name, child in gated.attention.named_modules()
                    if isinstance(child, nn.Linear)
                )
                cost += counts.get(root, 0) - inner
            always = 0
            if gated.tokens is not None and isinstance(gated.tokens.module, TokenSingleBlock):
                block = gated.path.removesuffix(gated.rule.name)
                always = sum(counts.get(f"{block}{name}", 0) for name in gated.rule.everywhere)
                always += int((cost - always) * _text_share(arguments))
            gates.append(cost // rows)
            everywhere.append(always // rows)
        return cls(tuple(gates), tuple(everywhere))

    def ratio(self, dynamics: Dynamics, widths: Sequence[Tensor], tokens: dict[str, Tensor]) -> Tensor:
        """Return (B,) the share of these multiply-adds that is computed.

        Args:
            dynamics: the network's.
            widths: (B, units) gates, in the order of the gates.
            tokens: (B,) share of the tokens that is kept, by the path of the site; those that are missing keep all.
        """
        done = torch.zeros(())
        everywhere = self.everywhere or (0,) * len(self.gates)
        for gated, cost, always, gates in zip(dynamics.gated_layers, self.gates, everywhere, widths, strict=True):
            share = gates.float().mean(1)
            if gated.tokens is None or gated.tokens.path not in tokens:
                share = share * cost
            else:
                share = share * (always + (cost - always) * tokens[gated.tokens.path])
            done = done.to(share.device) + share
        return done / sum(self.gates)


def dynamics_of(network: Any) -> Dynamics:
    """Return the routers of a dynamic network, also if another module wraps it (`network.network`)."""
    return getattr(network, "network", network).dynamic


def _text_share(arguments: dict[str, Any]) -> float:
    """Return the share of a single-stream block's tokens that is text."""
    text, image = (arguments[name].shape[1] for name in ("encoder_hidden_states", "hidden_states"))
    return text / (text + image)


@dataclass(frozen=True, kw_only=True)
class WidthObjective:
    """Training objective of each step: `objective.at(step)(network, generator)` -> a scalar.

    The loss is that of the dynamic network, plus `macs_weight` times the squared distance of the batch's mean ratio of
    multiply-adds to the target, plus what anchors the whole network (`complete_steps`) or the dynamic one to a teacher
    (`teacher`).
    """

    data: ImageSet
    null_label: int
    costs: MacsCosts
    ratio: float = 0.5
    """Target share of the switchable multiply-adds, in (0, 1], on average over the times of training."""
    batch_size: int = 256
    label_drop: float = 0.1
    macs_weight: float = 2.0
    ramp_start: int = 100
    """Steps before the target begins to fall from 1."""
    ramp: int = 1000
    """It reaches `ratio` after this many steps in all."""
    complete_steps: int = 0
    """Number of steps for which the whole network is trained beside the dynamic one, as published."""
    teacher: nn.Module | None = None
    """Network whose output the dynamic network also learns: no labels needed, and cheaper; None for none."""
    distill_weight: float = 1.0
    density: Literal["stratified", "uniform", "deployment"] = "stratified"
    """Distribution of times: from `STRATA` equal intervals in turn, at random, or from `times`."""
    times: tuple[float, ...] = ()
    """Times at which the network will run, for `deployment`: the ratio is then what those steps cost."""
    freeze_step: int | None = None
    """Step from which gates are those of evaluation and the routers rest; None: never, as published."""
    controller: bool = False
    """Move the target so that the ratio *of evaluation*, without noise, meets `ratio` (an integral controller)."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop must lie in [0, 1], got {self.label_drop}")
        for name in ("macs_weight", "distill_weight", "ramp_start", "ramp", "complete_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if self.density not in ("stratified", "uniform", "deployment"):
            raise ValueError(f"density must be 'stratified', 'uniform' or 'deployment', got {self.density!r}")
        if (self.density == "deployment") != bool(self.times):
            raise ValueError(
                "density='deployment' needs the times at which the network will run, and no other density takes any; "
                f"got density={self.density!r} and {len(self.times)} times"
            )

    def prepare(self, network: Any) -> None:
        """Prepare the network for training: enable gradients of the controller's term, where there is one."""
        dynamics_of(network).correction.requires_grad_(self.controller)

    def target(self, step: int) -> float:
        """Return the target ratio of a step."""
        if step < self.ramp_start:
            return 1.0
        return self.ratio if step >= self.ramp else 1 - (1 - self.ratio) * step / self.ramp

    def at(self, step: int) -> Callable[[nn.Module, torch.Generator], Tensor]:
        """Return the loss function of one step."""

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

    @staticmethod
    def example(data: ImageSet, null_label: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return state, time and label of one row, to count multiply-adds on."""
        return (
            torch.zeros_like(data.images[:1]).to(device),
            torch.zeros(1, device=device),
            torch.full((1,), null_label, device=device),
        )

    def draw(self, generator: torch.Generator, device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw a batch: states, times, labels (none dropped) and velocities."""
        index = torch.randint(len(self.data), (self.batch_size,), generator=generator)
        images, labels = self.data.images[index], self.data.labels[index]
        if self.augment is not None:
            images = self.augment(images, generator)
        noise, t = torch.randn(images.shape, generator=generator), self._draw_times(generator)
        images, noise, t = (value.to(device) for value in (images, noise, t))
        mix = t.reshape(-1, *[1] * (images.dim() - 1))
        return mix * images + (1 - mix) * noise, t, labels.to(device), images - noise

    def _dropped(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(len(labels), generator=generator) < self.label_drop
        return torch.where(dropped.to(labels.device), self.null_label, labels)

    def _loss(self, network: Any, generator: torch.Generator, step: int) -> Tensor:
        state, t, labels, target = self.draw(generator, next(network.parameters()).device)
        dynamics = dynamics_of(network)
        dynamics.generator = generator
        dynamics.hard = self.freeze_step is not None and step >= self.freeze_step
        seen = self._dropped(labels, generator)
        output = network(state, t, seen, return_dict=False)[0]
        loss = _mse(output, target)
        if not dynamics.hard:
            loss = loss + self._macs_loss(dynamics, step)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(state, t, seen, return_dict=False)[0]
            loss = loss + self.distill_weight * _mse(output, taught)
        if step < self.complete_steps:
            seen = self._dropped(labels, generator)  # as published, on its own
            with dynamics.complete():
                loss = loss + _mse(network(state, t, seen, return_dict=False)[0], target)
        return loss

    def _macs_loss(self, dynamics: Dynamics, step: int) -> Tensor:
        kept = dynamics.kept_tokens(self.batch_size)
        done = self.costs.ratio(dynamics, dynamics.masks, kept).mean()
        aim = torch.as_tensor(self.target(step))
        if not self.controller:
            return self.macs_weight * (done - aim).square()
        with torch.no_grad():
            dynamics.correction.clamp_(-_REACH, _REACH)  # here, so that it does not wind up where it has no effect
        aim = aim + dynamics.correction.detach()
        settled = step >= max(self.ramp, self.ramp_start)
        off = self._evaluated(dynamics, kept) - self.ratio if settled else torch.zeros(())
        # the gradient of the second term is the distance, so that the optimiser integrates it
        return self.macs_weight * (done - aim).square() + dynamics.correction * off.detach()

    def _evaluated(self, dynamics: Dynamics, kept: dict[str, Tensor]) -> Tensor:
        """Return the ratio with the gates of evaluation and the tokens as they were drawn."""
        return self.costs.ratio(dynamics, dynamics.evaluated(dynamics.embedding), kept).mean()


def freeze_backbone(network: Any) -> None:
    """Freeze everything but the routers of a dynamic network and, where there is one, its TD-LoRA.

    With a TD-LoRA the loss of the whole network (`WidthObjective.complete_steps`) keeps a meaning, because adapters
    stay on in it. Do this before the network is given to an optimiser; a controller is switched by
    `WidthObjective.prepare` afterwards.

    Args:
        network: a dynamic network; weights that it shares with another are frozen there, too.
    """
    network.requires_grad_(False)
    for gated in network.dynamic.gated_layers:
        gated.gate.router.requires_grad_(True)
    for site in network.dynamic.sites:
        site.router.requires_grad_(True)
    for layer in timed_layers(network).values():
        layer.lora_A[ADAPTER].requires_grad_(True)
        layer.experts.requires_grad_(True)


def trainable_share(network: Any) -> float:
    """Return the share of the parameters that require a gradient, from 0 to 1."""
    counts = [(value.numel(), value.requires_grad) for value in network.parameters()]
    return sum(number for number, trained in counts if trained) / sum(number for number, _ in counts)


def call_arguments(network: Any, *args: Tensor) -> dict[str, Any]:
    """Return the arguments that the dynamic network receives when `network` is called with `args`.

    `network` is the dynamic network or a module that wraps it.
    """
    inner = getattr(network, "network", network)
    seen: dict[str, Any] = {}

    def note(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.update(inspect.signature(module.forward).bind(*positional, **named).arguments)

    handle = inner.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), inner.dynamic.complete():
            network(*args, return_dict=False)
    finally:
        handle.remove()
    return seen


@dataclass(frozen=True, kw_only=True)
class LayerRatios:
    """Shares of a dynamic network's work that are computed with the gates of evaluation."""

    ratio: float
    """Share of all switchable multiply-adds."""
    gates: dict[str, float]
    """Share of the units that is on, by gate, on average over the times of training."""
    tokens: dict[str, float]
    """Share of the tokens that is kept, by layer."""


def layer_ratios(objective: WidthObjective, network: Any, generator: torch.Generator) -> LayerRatios:
    """Measure the ratios of all layers on one batch of the objective's data and times."""
    dynamics, training = dynamics_of(network), network.training
    network.train()
    state, t, labels, _ = objective.draw(generator, next(network.parameters()).device)
    before, dynamics.hard = dynamics.hard, True
    try:
        network(state, t, labels, return_dict=False)  # with gradients enabled, which is when masks are kept
        kept = dynamics.kept_tokens(len(t))
        ratio = objective.costs.ratio(dynamics, dynamics.masks, kept).mean().item()
        gates = {
            gated.path: mask.mean().item() for gated, mask in zip(dynamics.gated_layers, dynamics.masks, strict=True)
        }
    finally:
        dynamics.hard = before
        dynamics.clear()
        network.train(training)
    return LayerRatios(ratio=ratio, gates=gates, tokens={path: share.mean().item() for path, share in kept.items()})


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target).square().mean()
