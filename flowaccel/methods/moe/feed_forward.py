"""Feed-forward of experts (DiffMoE, arXiv 2503.14487), in place of a dense one.

Shapes: B samples of L tokens, S = B * L tokens in the pool, D width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from flowaccel.methods.moe.experts import Experts, ExpertShape
from flowaccel.methods.moe.plans import ExpertPlan
from flowaccel.methods.moe.routing import GATE, LOAD, PREDICTOR, ROUTING, Asked, Routed, invariance
from flowaccel.methods.moe.settings import SELECTIONS, MoESettings
from flowaccel.methods.moe.thresholds import Thresholds
from flowaccel.models.routers import never_narrower, without_autocast

_PREDICTOR_STD = 0.02


class MoEFeedForward(nn.Module):
    """Mixture-of-experts feed-forward: sends every token through some of E feed-forwards.

    While training, the router chooses within the pool of all tokens of the call, and its own loss is added to the
    gradient of whatever is made of the output. Call `flowaccel.methods.moe.train.moe_step` after every optimiser step.

    Router, capacity predictor and thresholds compute in float32 whatever the weights are, or in float64 for an input of
    float64, because another choice changes the output.

    Args:
        settings: how many experts, and how they are chosen. What it leaves to the dense feed-forward (`inner_dim`,
            `activation_fn`, `bias`) is as in `shape`.
        shape: shape of the dense feed-forward.
    """

    def __init__(self, settings: MoESettings, shape: ExpertShape) -> None:
        super().__init__()
        self.settings = settings
        self.shape: ExpertShape = ExpertShape(
            dim=shape.dim,
            inner_dim=settings.inner_dim or shape.inner_dim,
            activation_fn=settings.activation_fn or shape.activation_fn,
            bias=shape.bias if settings.bias is None else settings.bias,
        )
        dim, count = shape.dim, settings.num_experts
        self.gate: nn.Linear = nn.Linear(dim, count, bias=False)
        self.experts: Any = Experts(count, self.shape)
        self.gate_hidden: nn.Linear | None = nn.Linear(dim, dim) if settings.router == "expert_race" else None
        self.capacity_predictor: Any = None
        if settings.router == "diffmoe":
            self.capacity_predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, count))
        self.thresholds: Thresholds = Thresholds(
            count, observed(settings), settings.threshold_momentum, joint=settings.router == "expert_race"
        )
        if settings.router == "deepseek":
            self.register_buffer("selection_bias", torch.zeros(count))
        self.shared: FeedForward | None = None
        if settings.shared_inner_dim is not None:
            self.shared = FeedForward(
                dim,
                inner_dim=settings.shared_inner_dim,
                activation_fn=self.shape.activation_fn,
                bias=self.shape.bias,
            )
        self.capacity = settings.capacity
        self.selection = settings.inference_selection
        self.budget: float | None = None
        self.aux_loss_scale = 1.0
        self.plan: ExpertPlan | None = None
        self.pooled: tuple[int, int] | None = None
        self.aux_loss: Tensor | None = None
        self.overflow: Tensor | None = None
        self.reset_router()

    selection_bias: Tensor
    """(E,): what `deepseek` adds to the scores for its choice."""
    capacity: float
    """Number of experts that a token takes on average in training; a schedule may change it."""
    selection: str
    """Selection of the `diffmoe` router in inference, one of `SELECTIONS`."""
    budget: float | None
    """Limit of an expert in inference, `budget * L / E` tokens of a sample, so that shapes are static and nothing waits
    for the device; None sets no limit. Not for `gate_topk_count`."""
    aux_loss_scale: float
    """Factor on the gradient of the router's own loss: that which the rest of the loss is divided by."""
    plan: ExpertPlan | None
    """Plan of the last call, without gradients."""
    pooled: tuple[int, int] | None
    """(B, L) of the last call."""
    aux_loss: Tensor | None
    """Router's own loss in the last training call, with its weight and without gradient."""
    overflow: Tensor | None
    """Number of pairs that the last call left out for the budget, a scalar on the device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEFeedForward:
        """Move as `nn.Module` does, but keep the router's precision, because another choice changes the output."""
        wide = never_narrower(fn)
        if recurse:
            for name, child in self.named_children():
                child._apply(fn if name in ("experts", "shared") else wide)
        return super()._apply(wide, recurse=False)

    def reset_router(self) -> None:
        """Initialise the router: a gate of small weights, and a predictor of the capacity's share for every pair."""
        nn.init.normal_(self.gate.weight, std=self.settings.gate_init_std)
        if self.capacity_predictor is not None:
            first, last = self.capacity_predictor[0], self.capacity_predictor[2]
            nn.init.xavier_uniform_(first.weight)
            nn.init.zeros_(first.bias)
            nn.init.normal_(last.weight, std=_PREDICTOR_STD)
            share = min(self.settings.capacity / self.settings.num_experts, 0.99)
            nn.init.constant_(last.bias, math.log(share / (1 - share)))

    @property
    def invariance(self) -> str:
        """What an output depends on in inference: its own `token` only, its `sample`, or the whole `batch`."""
        return invariance(self.settings.router, self.selection)

    def forward(self, hidden_states: Tensor, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run every token through its experts.

        Args:
            hidden_states: (B, L, D) or (S, D).
            token_mask: bool (B, L): the tokens that exist; the others are never chosen, change nothing and get 0 (and
                what a shared feed-forward gives them). None for all.

        Returns:
            The same shape and type. Tokens without an expert get 0.

        Raises:
            ValueError: a mask of another shape; or thresholds that were never fitted.
        """
        pool = hidden_states.reshape(-1, hidden_states.shape[-1])
        samples = hidden_states.shape[0] if hidden_states.dim() == 3 else 1
        valid = self._valid(hidden_states, token_mask)
        if self.training and valid is not None and not bool(valid.any()):
            return torch.zeros_like(hidden_states) if self.shared is None else self.shared(hidden_states)
        with without_autocast(pool.device):
            routed = self.route(pool, samples, valid)
        plan = routed.plan
        output = self.settings.routed_scale * self.experts(pool, plan)
        if self.shared is not None:
            output = output + self.shared(pool)
        output = output.to(hidden_states.dtype)
        if self.training and routed.loss is not None and torch.is_grad_enabled():
            loss = self.settings.aux_weight * routed.loss
            output = _Injected.apply(output, loss, self.aux_loss_scale)
            self.aux_loss = loss.detach()
        if not hidden_states.is_meta:
            self.plan = ExpertPlan(plan.tokens, plan.experts, plan.weights.detach(), plan.counts, plan.each)
            self.overflow = routed.overflow
            self.pooled = (samples, hidden_states.shape[-2])
        return output.reshape(hidden_states.shape)

    def route(self, pool: Tensor, samples: int, valid: Tensor | None = None) -> Routed:
        """Choose the experts of a pool (S, D) of tokens of `samples` samples; `valid` is bool (S,)."""
        dtype = torch.float64 if pool.dtype == torch.float64 else torch.float32
        given = pool.to(dtype)
        read = given if self.gate_hidden is None else nn.functional.gelu(_linear(self.gate_hidden, given))
        predicted = _sequential(self.capacity_predictor, given.detach()) if self._predicts else None
        unfitted = self.thresholds.collecting and not self.thresholds.fitted(self.score_kind)
        choosing = self.training or pool.is_meta or unfitted
        asked = Asked(
            settings=self.settings,
            logits=_linear(self.gate, read),
            samples=samples,
            capacity=self.capacity,
            training=choosing,
            valid=valid,
            predicted=predicted,
            threshold=None if pool.is_meta else self._threshold(choosing),
            selection=self.selection,
            bias=getattr(self, "selection_bias", None),
            budget=self._budget(len(pool) // max(1, samples)),
        )
        routed = ROUTING[self.settings.router](asked)
        if self.thresholds.collecting and not pool.is_meta:
            self.thresholds.collect(asked, valid)
        elif self.training and torch.is_grad_enabled():
            self.thresholds.observe(routed.observed)
        return routed

    @property
    def _predicts(self) -> bool:
        """Whether the capacity predictor is read."""
        unread = self.selection == "gate_threshold" and not (self.training or self.thresholds.collecting)
        return self.capacity_predictor is not None and not unread

    def _threshold(self, choosing: bool) -> Tensor | None:
        """Return the threshold of the scores that decide, or None.

        In training it is that of `expert_threshold`, once it is warm.
        """
        if not self.settings.thresholded:
            return None
        if choosing:
            warm = self.settings.router == "expert_threshold" and self.thresholds.warm(self.settings.threshold_warmup)
            return self.thresholds(GATE) if warm else None
        found: Tensor = self.thresholds(self.score_kind)
        return found

    @property
    def score_kind(self) -> str:
        """Kind of the scores that are compared with a threshold in inference."""
        return GATE if self.settings.router != "diffmoe" or self.selection == "gate_threshold" else PREDICTOR

    def _budget(self, length: int) -> int | None:
        if self.budget is None:
            return None
        return min(length, math.ceil(self.budget * length / self.settings.num_experts))

    def _valid(self, hidden_states: Tensor, token_mask: Tensor | None) -> Tensor | None:
        if token_mask is None or token_mask.is_meta:
            return None  # without data all tokens count
        if token_mask.shape != hidden_states.shape[:-1] or token_mask.dtype != torch.bool:
            raise ValueError(
                f"token_mask must be bool of shape {tuple(hidden_states.shape[:-1])}, True for tokens that exist; got "
                f"{token_mask.dtype} {tuple(token_mask.shape)}"
            )
        return token_mask.reshape(-1)

    @torch.no_grad()
    def commit(self) -> None:
        """Update thresholds and biases from the observations since the last call.

        See `flowaccel.methods.moe.train.moe_step`.
        """
        found = self.thresholds.commit()
        if LOAD in found:
            load = found[LOAD]
            self.selection_bias += self.settings.bias_rate * torch.sign(load.mean() - load)

    def choose_by(self, selection: str) -> None:
        """Set how the `diffmoe` router chooses in inference.

        Raises:
            ValueError: another router, or an unknown way.
        """
        if self.settings.router != "diffmoe" or selection not in SELECTIONS:
            raise ValueError(
                f"selection must be one of {list(SELECTIONS)} and is for router='diffmoe', got {selection!r} for "
                f"router={self.settings.router!r}"
            )
        self.selection = selection

    @classmethod
    def of(cls, dense: FeedForward, settings: MoESettings | dict[str, Any] | None = None) -> MoEFeedForward:
        """Create experts of the shape of a dense feed-forward, on its device and in its dtype; the router is float32.

        Raises:
            ValueError: settings that are not known, or an activation that experts do not have.
        """
        layer, weight = cls(MoESettings.of(settings), ExpertShape.of(dense)), dense.net[2].weight
        layer.to(weight.device)
        for part in (layer.experts, layer.shared):
            if part is not None:
                part.to(weight.dtype)
        return layer


def observed(settings: MoESettings) -> tuple[str, ...]:
    """Return the kinds of scores that a router observes in training."""
    kinds = {
        "diffmoe": (PREDICTOR, GATE),
        "expert_race": (GATE,),
        "expert_threshold": (GATE,),
        "deepseek": (LOAD,),
    }
    return kinds.get(settings.router, ())


class _Injected(torch.autograd.Function):
    """Identity function that adds a loss to the gradient, also under gradient checkpointing."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, torch.full_like(ctx.like, ctx.scale), None


def _linear(layer: nn.Linear, given: Tensor) -> Tensor:
    """Apply a linear layer in the dtype of the input, whatever that of the weights."""
    if layer.weight.dtype == given.dtype:
        found: Tensor = layer(given)  # a call, so that offloading brings the weights
        return found
    bias = None if layer.bias is None else layer.bias.to(given.dtype)
    return nn.functional.linear(given, layer.weight.to(given.dtype), bias)


def _sequential(layers: Any, given: Tensor) -> Tensor:
    return _linear(layers[2], nn.functional.silu(_linear(layers[0], given)))
