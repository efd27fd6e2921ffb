"""Low-rank adapters whose second factor depends on time: the TD-LoRA of DyDiT++ (arXiv 2504.06803), on PEFT.

    y = W x + s / r * sum_e alpha_e(t) B_e A x,    alpha(t) = softmax(W_r E_t)

W is frozen; A (r, columns) is shared; the experts B_1 ... B_E (rows, r) start at 0; W_r (E, D) reads the timestep
embedding E_t. W_r starts near 0 but not at it: with equal shares all experts get the same gradient, stay the same, and
W_r gets none. No code was published with the paper: which factor carries the experts, and s, r and E are a reading that
gives the published number of parameters. It is the same as one LoRA of rank E r with A stacked E times and its rank
channels multiplied by alpha.

All that flowaccel knows of the insides of PEFT's layers stands in this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn

from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.sliced import SlicedLinear, spread

ADAPTER = "timed"
"""PEFT's name of the adapter."""
_START = 0.02
"""Standard deviation of W_r."""


@dataclass(frozen=True, kw_only=True)
class TimedLoraSettings:
    """Size of a TD-LoRA."""

    rank: int = 4
    """r, of every expert."""
    experts: int = 4
    """E."""
    alpha: float | None = None
    """s; None takes 2 r."""

    def __post_init__(self) -> None:
        for name in ("rank", "experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.alpha is not None and (not isinstance(self.alpha, (int, float)) or not self.alpha > 0):
            raise ValueError(f"alpha must be positive, or None for twice the rank, got {self.alpha!r}")

    @property
    def scale(self) -> float:
        """Scale s."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)


class ExpertLinear(SlicedLinear):
    """Linear layer of experts [B_1 ... B_E] side by side, (rows, E r), mixed by time.

    Args:
        rank: r.
        rows: rows of each expert.
        experts: E.
        width: D of the timestep embedding.
    """

    time: Tensor | None = None
    """(B, D) timestep embeddings of the present call, or (1, D) where all rows share one; None mixes all experts alike.
    It stays until a backward pass has ended, so that layers can be computed again in it."""
    fixed: Tensor | None = None
    """(1, D): stands in for `time` in every call."""

    def __init__(self, rank: int, rows: int, experts: int, width: int) -> None:
        super().__init__(experts * rank, rows, bias=False)
        self.rank, self.experts = rank, experts
        self.router: nn.Linear = nn.Linear(width, experts, bias=False)
        nn.init.zeros_(self.weight)
        nn.init.normal_(self.router.weight, std=_START)

    def shares(self, time: Tensor | None) -> Tensor:
        """Return the mixing weights alpha, (B, E) in float32, for embeddings (B, D); None gives (1, E) equal ones."""
        if time is None:
            return torch.full((1, self.experts), 1 / self.experts, device=self.weight.device)
        return nn.functional.linear(time.float(), self.router.weight.float()).softmax(-1)

    def mixed(self, shares: Tensor) -> Tensor:
        """Return B(t), (rows, r), for `shares` (E,), restricted to the rows that are present."""
        weight, _ = self.present
        return (weight.unflatten(1, (self.experts, self.rank)) * shares.to(weight.dtype)[:, None]).sum(1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the mixed experts: (B, ..., r) -> (B, ..., rows)."""
        shares = self.shares(self.time if self.fixed is None else self.fixed)
        if len(shares) == 1:
            output = nn.functional.linear(hidden_states, self.mixed(shares[0]))
        else:
            each = spread(shares, hidden_states).unsqueeze(-1) * hidden_states.unsqueeze(-2)
            output = nn.functional.linear(each.flatten(-2), *self.present)
        return output if self.row_mask is None else output * spread(self.row_mask, output)


class TimedLoraLinear(lora.Linear):
    """PEFT's LoRA layer with an adapter whose B depends on time. Other adapters on it work as usual.

    It is merged only at a time that was fixed; the adapter stays active whatever other adapters are chosen, because the
    network was trained with it (`disable_adapters` switches all off).
    """

    @staticmethod
    def take_over(layer: Any, settings: TimedLoraSettings, width: int) -> TimedLoraLinear:
        """Convert PEFT's `layer`, which has an adapter `ADAPTER`, to a `TimedLoraLinear` in place."""
        if type(layer) is not lora.Linear:
            raise UnsupportedModelError(
                f"TD-LoRA is for plain linear layers, not for a {type(layer).__name__}: quantise afterwards"
            )
        plain = layer.lora_B[ADAPTER]
        experts = ExpertLinear(settings.rank, plain.out_features, settings.experts, width)
        layer.lora_B[ADAPTER] = experts.to(plain.weight).requires_grad_(True)
        layer.lora_A[ADAPTER].requires_grad_(True)
        layer.__class__ = TimedLoraLinear
        assert isinstance(layer, TimedLoraLinear)
        return layer

    @property
    def timed(self) -> bool:
        """Whether the layer still has the time-dependent adapter."""
        return ADAPTER in self.lora_B

    @property
    def experts(self) -> ExpertLinear:
        """Second factor of the time-dependent adapter."""
        found = self.lora_B[ADAPTER]
        assert isinstance(found, ExpertLinear)
        return found

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Activate other adapters, beside this one."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        always = [ADAPTER] if self.timed and ADAPTER not in names else []
        super().set_adapter([*always, *names], *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the matrix that `adapter` adds to W.

        Raises:
            ValueError: it depends on time, and none is fixed.
        """
        if adapter != ADAPTER:
            return super().get_delta_weight(adapter)
        self.check_mergeable()
        experts, first = self.experts, self.lora_A[ADAPTER].weight
        with torch.no_grad():
            second = experts.mixed(experts.shares(experts.fixed)[0])
            return (second.float() @ first.float() * self.scaling[ADAPTER]).to(first.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into W; arguments as in PEFT.

        Raises:
            ValueError: one of them depends on time, and none is fixed; nothing was merged.
        """
        self.check_mergeable(adapter_names)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer: (B, ..., columns) -> (B, ..., rows)."""
        output: Tensor = super().forward(hidden_states, *args, **kwargs)
        # PEFT computes no adapter where any is merged
        if self.timed and self.merged and ADAPTER not in self.merged_adapters and not self.disable_adapters:
            first = self.lora_A[ADAPTER]
            added = self.experts(first(hidden_states.to(first.weight.dtype))) * self.scaling[ADAPTER]
            output = output + added.to(output.dtype)
        return output

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Raise a ValueError if this adapter is among those to be merged (None: all) and no time is fixed."""
        wanted = adapter_names is None or ADAPTER in adapter_names
        if self.timed and wanted and self.experts.fixed is None:
            raise ValueError(
                f"the adapter {ADAPTER!r} is a TD-LoRA, which depends on the timestep and cannot be merged into weights"
                " that do not. Leave it out (adapter_names=[...] of the others), fix one time first (fix_time), or "
                "export plain LoRAs of it (plain_lora, bucket_loras)"
            )


def inject_timed_lora(network: nn.Module, paths: list[str], width: int, settings: TimedLoraSettings) -> None:
    """Add a TD-LoRA to linear layers.

    Only the new parameters start to require a gradient; the other flags stay as they are.

    Args:
        network: it gets PEFT's layers in their places.
        paths: names of the layers.
        width: D of the timestep embedding.
        settings: its size.

    Raises:
        ValueError: there is one already.
        UnsupportedModelError: a layer that is not plain.
    """
    if timed_layers(network):
        raise ValueError("the network has a TD-LoRA already; make one from its base again")
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    active = [(module, module.active_adapters) for module in network.modules() if isinstance(module, lora.LoraLayer)]
    config = LoraConfig(r=settings.rank, lora_alpha=settings.scale, target_modules=list(paths))
    inject_adapter_in_model(config, network, ADAPTER)
    for path in paths:
        TimedLoraLinear.take_over(network.get_submodule(path), settings, width)
    for layer, names in active:  # PEFT chooses the new adapter alone, and freezes all else, which others may share
        layer.set_adapter(names)
    for parameter, wanted in before:
        parameter.requires_grad_(wanted)
    if hasattr(network, "_hf_peft_config_loaded"):  # what diffusers' own loader of adapters leaves
        network._hf_peft_config_loaded = True  # type: ignore[assignment]


def timed_layers(network: nn.Module) -> dict[str, TimedLoraLinear]:
    """Return the layers that have a TD-LoRA, by name."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, TimedLoraLinear)}
    return {name: layer for name, layer in found.items() if layer.timed}


def experts_of(layers: Iterable[nn.Module]) -> list[ExpertLinear]:
    """Return the second factors of the TD-LoRA of those `layers` that have one."""
    return [layer.experts for layer in layers if isinstance(layer, TimedLoraLinear) and layer.timed]


def taken_apart(layer: nn.Module) -> tuple[nn.Module, list[nn.Linear], list[nn.Linear]]:
    """Return the layer below LoRAs, and the first and second factors of each: (r, columns) and (rows, r).

    Raises:
        UnsupportedModelError: a form of LoRA whose result is not a sum over parts, such as DoRA.
    """
    if not isinstance(layer, lora.Linear):
        return layer, [], []
    forms = {name: type(form).__name__ for name, form in getattr(layer, "lora_variant", {}).items()}
    if forms:
        raise UnsupportedModelError(
            f"dynamic width slices plain LoRA, but there are adapters of other forms: {forms}; fuse and unload them"
        )
    if layer.merged and layer.disable_adapters:
        layer.unmerge()  # PEFT would do it during the call, when slices are cut already
    return layer.get_base_layer(), list(layer.lora_A.values()), list(layer.lora_B.values())


def standing(layer: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes when adapters on `layer` are added, removed, merged, unmerged or disabled."""
    if not isinstance(layer, lora.Linear):
        return (layer,)
    merged = tuple((name, layer.scaling.get(name)) for name in layer.merged_adapters)
    parts = layer._modules  # attributes of modules are slow, and this is asked at every call
    factors = (*parts["lora_A"]._modules.values(), *parts["lora_B"]._modules.values())
    return (layer, parts["base_layer"], *factors, merged, layer.disable_adapters)
