"""Dynamic forms of stock networks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.fused import TokenSingleBlock
from flowaccel.methods.dynamic_width.importance import channel_groups, head_groups
from flowaccel.methods.dynamic_width.network import Dynamics
from flowaccel.methods.dynamic_width.official import arrangement, read_dydit, write_dydit
from flowaccel.methods.dynamic_width.rules import rule_of
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.td_lora import timed_layers
from flowaccel.models.clone import clone_sharing_parameters
from flowaccel.models.official import load_converted
from flowaccel.models.sit import SiTTransformer2DModel
from flowaccel.models.variants import VariantMixin

_TIMES = 256


class DynamicMixin(VariantMixin):
    """Mixin that adds routers (`dynamic`) and their configuration to a stock network."""

    dynamic: Dynamics
    argument = "dynamic_config"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["dynamic"]

    @classmethod
    def settings_of(cls, given: Any) -> DynamicSettings:
        """Return the settings of a configuration entry; None gives the defaults."""
        return DynamicSettings.of(given)

    def routing(self) -> list[Tensor]:
        """Return the tensors of the routers, whose precision must be kept: a flipped gate changes the network."""
        return [*self.dynamic.parameters(), *self.dynamic.buffers()]

    def install(self, settings: DynamicSettings) -> None:
        """Add the routers and connect them to the layers."""
        network: Any = self
        network.register_to_config(dynamic_config=asdict(settings))
        network.dynamic = Dynamics(network, settings)
        network.get_submodule(network.dynamic.rule.time_embed).register_forward_hook(network.dynamic.timed)
        network.register_forward_pre_hook(network.dynamic.started)
        network.register_forward_hook(network.dynamic.ended, always_call=True)
        if network.is_gradient_checkpointing:  # taken over from a stock network, with its function
            self.enable_gradient_checkpointing()

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Recompute blocks in the backward pass instead of storing activations; the gates are those of the forward.

        Args:
            gradient_checkpointing_func: `f(block, *args)`; None takes torch's, which is not reentrant. A reentrant one
                gives no gradients to the routers.
        """
        given = gradient_checkpointing_func or functools.partial(checkpoint, use_reentrant=False)
        network: Any = super()
        network.enable_gradient_checkpointing(functools.partial(self.dynamic.checkpointed, given))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the network as diffusers does.

        Raises:
            ValueError: there is a TD-LoRA, whose layers `from_pretrained` would not find.
        """
        if self.dynamic.timed_lora is not None:
            raise ValueError(
                "a network with a TD-LoRA is saved as what was trained, beside its base: "
                "WidthAdapter.of(network).save_pretrained(folder)"
            )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Fuse LoRA weights as diffusers does.

        Weights that are shared with the base network change there, too: unfuse before `restore`.

        Raises:
            ValueError: a TD-LoRA is among the adapters, and no time is fixed for it; nothing was fused.
        """
        network: Any = self
        for layer in timed_layers(network).values():
            layer.check_mergeable(adapter_names)
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)  # type: ignore[misc]

    def fuse_qkv_projections(self) -> None:
        """Refuse to fuse the projections, because heads are sliced out of separate ones.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"the projections of a {type(self).__name__} cannot be fused, because its heads are sliced out of them; "
            "fuse those of the stock network, or leave them apart"
        )

    @classmethod
    def from_base(cls, base: nn.Module, settings: DynamicSettings | dict[str, Any] | None = None) -> Any:
        """Build a dynamic network that shares the weights of `base`, which is not changed.

        Heads and hidden channels are ranked by the size of their weights: the strongest are always on. Everything is
        on at first, so that the result computes what `base` computes.

        Args:
            base: a network of the class that this one is a dynamic form of.
            settings: settings of the dynamic parts.

        Raises:
            UnsupportedModelError: no rules for its class, or layers that cannot be sliced.
            ValueError: settings that are not known or do not fit.
        """
        network = cls.sharing_parameters(base)
        cls.install(network, DynamicSettings.of(settings))
        network.dynamic.to(base.device)
        rank(network)
        measure_time(network)
        return network


def rank(network: Any) -> None:
    """Assign heads and channels to gates by the size of their weights, the strongest to the gate that is always on."""
    for gated in network.dynamic.gated_layers:
        grouping = head_groups if gated.rule.kind == "heads" else channel_groups
        found = grouping(gated.rows, gated.columns, gated.gate.units)
        gated.gate.group_of.copy_(found)


def measure_time(network: Any) -> None:
    """Store the mean and the spread of the timestep embedding over all times."""
    dynamics = network.dynamic
    embedded = time_embedding(network, torch.linspace(0, dynamics.rule.time_span, _TIMES))
    dynamics.time_mean.copy_(embedded.mean(0))
    dynamics.time_std.copy_(embedded.std(0).clamp_min(1e-3 * float(embedded.abs().mean())))


class DynamicSiTTransformer2DModel(DynamicMixin, SiTTransformer2DModel):
    """`SiTTransformer2DModel` with dynamic width and tokens.

    Loaded `from_official`, a checkpoint of DyDiT (arXiv 2410.03456) is one with integer times 0 .. 999, of which 999 is
    noise, that returns noise and variance channels.
    """

    @classmethod
    def from_official(
        cls, path_or_state_dict: str | Path | dict[str, Tensor], which: str | None = None, **overrides: Any
    ) -> Self:
        """Load a checkpoint in the layout of the official DyDiT repository (of March 2025).

        All computed channels are returned: for DyDiT noise, then variance. Without token routers in the checkpoint,
        tokens are not dynamic.

        Args:
            path_or_state_dict: as for `SiTTransformer2DModel.from_official`.
            which: take this entry of a training checkpoint.
            overrides: constructor arguments that the weights do not tell: `num_attention_heads` for a width that no
                published size has, `out_channels` to drop the second half of the channels, and entries of
                `dynamic_config` such as `tau`.

        Raises:
            CheckpointError: a truncated, foreign or hostile file, weights that do not fit, a network without routers,
                or the router layout of December 2024, in which no gate is always on; nothing is changed.
        """
        config, state = read_dydit(path_or_state_dict, which, overrides)
        model = cls(**config)
        load_converted(model, arrangement(model) | state)
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """Return this network's weights under the official key names.

        The dict is new; tensors are shared where they are unchanged. Heads and channels are reordered so that groups
        are contiguous, as that layout has them.

        Raises:
            ValueError: `normalise`, or another number of `groups` than heads, which the layout cannot express; or
                adapters.
        """
        return write_dydit(self)


class DynamicDiTTransformer2DModel(DynamicMixin, DiTTransformer2DModel):
    """`DiTTransformer2DModel` with dynamic width and tokens."""


class DynamicSD3Transformer2DModel(DynamicMixin, SD3Transformer2DModel):
    """`SD3Transformer2DModel` with dynamic width and tokens."""


class DynamicFluxTransformer2DModel(DynamicMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` with dynamic width and tokens."""

    _repeated_blocks: ClassVar[list[str]] = [*FluxTransformer2DModel._repeated_blocks, TokenSingleBlock.__name__]
    _no_split_modules: ClassVar[list[str]] = [*FluxTransformer2DModel._no_split_modules, TokenSingleBlock.__name__]


class DynamicLatteTransformer3DModel(DynamicMixin, LatteTransformer3DModel):
    """`LatteTransformer3DModel` with dynamic width and tokens."""


DYNAMIC: dict[str, type[DynamicMixin]] = {
    rule_of(kind).base: kind
    for kind in (
        DynamicSiTTransformer2DModel,
        DynamicDiTTransformer2DModel,
        DynamicSD3Transformer2DModel,
        DynamicFluxTransformer2DModel,
        DynamicLatteTransformer3DModel,
    )
}
"""Dynamic classes by the class name of the stock network."""


def make_dynamic(base: nn.Module, settings: DynamicSettings | dict[str, Any] | None = None) -> Any:
    """Apply `DynamicMixin.from_base` of the class that fits `base`.

    Raises:
        UnsupportedModelError: no rules for its class.
    """
    return DYNAMIC[rule_of(base).base].from_base(base, settings)


def time_embedding(network: Any, times: Tensor) -> Tensor:
    """Return embeddings (T, D), float32 on the CPU, of times (T,) as given to the network's `timestep`."""
    rule = network.dynamic.rule
    projected = network.get_submodule(rule.time_proj)(rule.time_scale * times.float().cpu())
    embed: nn.Module = network.get_submodule(rule.time_embed)
    weight = next(embed.parameters())
    with torch.no_grad():
        if weight.is_meta:  # offloaded piece by piece: only its own hooks bring the weights
            with network.dynamic.deaf():
                return embed(projected.to(weight.dtype)).float().cpu()
        return copy.deepcopy(clone_sharing_parameters(embed, hooks=False)).cpu().float()(projected)
