"""Settings of mixture-of-experts feed-forwards, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from flowaccel.checks import check_whole, is_number
from flowaccel.models.settings import settings_from

RouterName = Literal[
    "diffmoe", "token_choice", "expert_choice", "dit_moe", "expert_race", "deepseek", "expert_threshold"
]
Selection = Literal["predictor_mask", "gate_topk_count", "gate_threshold"]
Layers = Literal["odd", "even", "all", "deep_half", "first3_last1_dense"]
ROUTERS: tuple[str, ...] = get_args(RouterName)
SELECTIONS: tuple[str, ...] = get_args(Selection)
LAYERS: tuple[str, ...] = get_args(Layers)

BY_TOKEN = ("token_choice", "dit_moe", "deepseek")
"""Routers with which every token takes the same number of experts."""
SCORES = {"expert_race": "identity", "deepseek": "sigmoid"}
AUX_WEIGHTS = {"diffmoe": 1.0, "token_choice": 0.01, "dit_moe": 0.01, "expert_race": 1e-4}
"""Loss weights of the routers that have a loss of their own; arXiv 2503.14487, 2407.11633, 2503.16057."""


@dataclass(frozen=True, kw_only=True)
class MoESettings:
    """Settings of a network's experts and their router. The defaults are those of DiffMoE (arXiv 2503.14487).

    Raises:
        ValueError: a value out of its range.
    """

    router: str = "diffmoe"
    """Router, one of `ROUTERS`; docs/moe.md compares them."""
    num_experts: int = 16
    """E, at least 1."""
    capacity: float = 1.0
    """Number of experts that a token takes on average, above 0 and at most E; a whole number where every token takes
    equally many."""
    layers: str | tuple[int, ...] = "odd"
    """Blocks that have experts: one of `LAYERS`, or their indices from 0."""
    inner_dim: int | None = None
    """Hidden width of an expert; None takes that of the dense feed-forward."""
    activation_fn: str | None = None
    """Activation, as diffusers' `FeedForward` names it; None takes the dense feed-forward's."""
    bias: bool | None = None
    """Whether the experts' linear layers have one; None does as the dense feed-forward."""
    score_fn: str | None = None
    """`softmax`, `sigmoid` or `identity` of the gate's logits; None takes the router's."""
    norm_topk: bool | None = None
    """Scale the weights of a token so that they sum to 1, for the routers of `BY_TOKEN`; None: only with `deepseek`
    and more than one. A single expert's weight would always be 1, and the gate learn nothing from the output."""
    routed_scale: float = 1.0
    """Factor on the output of the experts; DSMoE has 2.5."""
    shared_inner_dim: int | None = None
    """Hidden width of a further feed-forward that all tokens go through; None for none."""
    inference_selection: str = "predictor_mask"
    """How the `diffmoe` router chooses outside of training. `predictor_mask`: a token takes an expert where the
    capacity predictor's score is above the expert's threshold, which depends on the token alone. `gate_threshold`: the
    same with the gate's score. `gate_topk_count`: as published, the predictor says how many tokens an expert takes, and
    those of the whole batch with the best gate scores are taken: an image then depends on what it is batched with."""
    threshold_momentum: float = 0.95
    """Momentum of the thresholds' running average, in [0, 1)."""
    threshold_warmup: int = 100
    """Updates of the threshold before `expert_threshold` trains with it."""
    aux_loss_weight: float | None = None
    """Weight of the router's own loss; None takes the published one."""
    bias_rate: float = 1e-3
    """Change of an expert's selection bias per step, against its load (`deepseek`)."""
    expert_groups: int = 1
    """`deepseek` chooses among the experts of the best groups only: into how many groups they are divided,"""
    top_groups: int = 1
    """and how many of the groups are kept."""
    gate_init_std: float = 0.006
    """Spread of the gate's first weights."""

    def __post_init__(self) -> None:
        self._one_of("router", ROUTERS)
        self._one_of("inference_selection", SELECTIONS)
        if self.score_fn is not None:
            self._one_of("score_fn", ("softmax", "sigmoid", "identity"))
        check_whole(self, num_experts=1)
        if not (is_number(self.capacity) and 0 < self.capacity <= self.num_experts):
            raise ValueError(f"capacity must be above 0 and at most num_experts={self.num_experts}, got "
                             f"{self.capacity!r}")  # fmt: skip
        if self.router in BY_TOKEN and self.capacity != int(self.capacity):
            raise ValueError(
                f"capacity must be a whole number with router={self.router!r}, where every token takes equally many "
                f"experts, got {self.capacity}"
            )
        if self.inference_selection != "predictor_mask" and self.router != "diffmoe":
            raise ValueError(f"inference_selection={self.inference_selection!r} is for router='diffmoe', got "
                             f"{self.router!r}")  # fmt: skip
        if self.norm_topk and self.router not in BY_TOKEN:
            raise ValueError(f"norm_topk=True is for the routers {list(BY_TOKEN)}, got router={self.router!r}")
        if self.expert_groups != 1 and self.router != "deepseek":
            raise ValueError(f"expert_groups={self.expert_groups!r} is for router='deepseek', got {self.router!r}")
        for name in ("inner_dim", "shared_inner_dim"):
            if getattr(self, name) is not None:
                check_whole(self, **{name: 1})
        check_whole(self, threshold_warmup=1, expert_groups=1, top_groups=1)
        if not (is_number(self.threshold_momentum) and 0 <= self.threshold_momentum < 1):
            raise ValueError(f"threshold_momentum must lie in [0, 1), got {self.threshold_momentum!r}")
        if not (is_number(self.routed_scale) and self.routed_scale > 0):
            raise ValueError(f"routed_scale must be above 0, got {self.routed_scale!r}")
        for name in ("aux_loss_weight", "bias_rate", "gate_init_std"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if self.num_experts % self.expert_groups or self.top_groups > self.expert_groups:
            raise ValueError(
                f"expert_groups must divide num_experts={self.num_experts} and top_groups be at most expert_groups, "
                f"got {self.expert_groups} and {self.top_groups}"
            )
        if self.top_groups * (self.num_experts // self.expert_groups) < self.capacity:
            raise ValueError(f"top_groups={self.top_groups} leaves fewer experts than capacity={self.capacity}")
        self._check_layers()

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            self._one_of("layers", LAYERS)
            return
        given: Any = self.layers
        whole = isinstance(given, (list, tuple)) and all(type(index) is int and index >= 0 for index in given)
        if not whole or not given:
            raise ValueError(f"layers must list blocks by indices from 0, or be one of {list(LAYERS)}, got {given!r}")
        object.__setattr__(self, "layers", tuple(given))

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")

    @property
    def scores(self) -> str:
        """Function that turns the gate's logits into scores."""
        return self.score_fn or SCORES.get(self.router, "softmax")

    @property
    def normalised(self) -> bool:
        """Whether the weights of a token sum to 1."""
        several = self.router == "deepseek" and self.capacity > 1
        return several if self.norm_topk is None else self.norm_topk

    @property
    def aux_weight(self) -> float:
        """Weight of the router's own loss."""
        return AUX_WEIGHTS.get(self.router, 0.0) if self.aux_loss_weight is None else self.aux_loss_weight

    @property
    def thresholded(self) -> bool:
        """Whether the router uses thresholds, which training has to find."""
        return self.router in ("diffmoe", "expert_race", "expert_threshold")

    def blocks(self, count: int) -> tuple[int, ...]:
        """Return which of `count` blocks have experts, at least one.

        Raises:
            ValueError: an index that is not there, or a choice that is none.
        """
        if isinstance(self.layers, str):
            chosen = named_blocks(self.layers, count)
            if not chosen:
                raise ValueError(f"layers={self.layers!r} chooses none of {count} blocks; name some by their indices")
            return chosen
        if max(self.layers) >= count:
            raise ValueError(f"layers must be below the number of blocks, {count}, got {list(self.layers)}")
        return tuple(sorted(set(self.layers)))

    @classmethod
    def of(cls, given: Self | dict[str, Any] | None) -> Self:
        """Create the settings from a configuration.

        Raises:
            ValueError: an entry that is not known.
        """
        return settings_from(cls, given, "moe_config")


def named_blocks(layers: str, count: int) -> tuple[int, ...]:
    """Return the indices, of `count` blocks, that an entry of `LAYERS` stands for."""
    named = {
        "odd": range(1, count, 2),
        "even": range(0, count, 2),
        "all": range(count),
        "deep_half": range(count // 2, count),
        "first3_last1_dense": range(3, count - 1),
    }
    return tuple(named[layers])
