"""The dynamic forms of stock networks."""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel, SD3Transformer2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from flowaccel.models.dynamic.importance import channel_groups, head_groups
from flowaccel.models.dynamic.network import Dynamics
from flowaccel.models.dynamic.rules import rule_of
from flowaccel.models.dynamic.settings import DynamicSettings
from flowaccel.models.dynamic.twins import twin
from flowaccel.models.sit import SiTTransformer2DModel


class DynamicMixin:
    """What the dynamic networks add to the stock ones: the routers, called `dynamic`, and their configuration."""

    dynamic: Dynamics
    _keep_in_fp32_modules: ClassVar[list[str]] = ["dynamic"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _add_argument(cls)

    def install(self, settings: DynamicSettings) -> None:
        """Add the routers and wire them."""
        network: Any = self
        network.register_to_config(dynamic_config=asdict(settings))
        network.dynamic = Dynamics(network, settings)
        network.get_submodule(network.dynamic.rule.time_embed).register_forward_hook(network.dynamic.timed)
        network.register_forward_hook(network.dynamic.ended, always_call=True)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers'.

        Raises:
            ValueError: there is a TD-LoRA, whose layers `from_pretrained` would not find.
        """
        if self.dynamic.timed_lora is not None:
            raise ValueError(
                "a network with a TD-LoRA is saved as what was trained, beside its base: "
                "WidthAdapter.of(network).save_pretrained(folder)"
            )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_base(cls, base: nn.Module, settings: DynamicSettings | dict[str, Any] | None = None) -> Any:
        """A dynamic network around the very weights of `base`, which stays as it is.

        Heads and hidden channels are ranked by the size of their weights: the strongest are always on. Everything is
        on at first, so that the result computes what `base` computes.

        Args:
            base: a network of the class that this one is a dynamic form of.
            settings: what is dynamic.

        Raises:
            UnsupportedModelError: no rules for its class, or layers that cannot be sliced.
            ValueError: settings that are not known or do not fit.
        """
        network: Any = twin(base)
        network.__class__ = cls
        network._internal_dict = FrozenDict(dict(network._internal_dict))
        cls.install(network, DynamicSettings.of(settings))
        network.dynamic.to(base.device)
        rank(network)
        return network


def rank(network: Any) -> None:
    """Assign heads and channels to gates by the size of their weights, the strongest to the gate that is always on."""
    for wire in network.dynamic.wires:
        grouping = head_groups if wire.rule.kind == "heads" else channel_groups
        found = grouping(wire.rows, wire.columns, wire.gate.units)
        wire.gate.group_of.copy_(found)


def _add_argument(cls: type) -> None:
    """Give `cls` the constructor of its stock class with one more argument."""
    stock: Any = next(base for base in cls.__mro__[1:] if base is not DynamicMixin)
    original = stock.__init__

    def __init__(self: Any, dynamic_config: dict[str, Any] | None = None, **config: Any) -> None:
        settings = DynamicSettings.of(dynamic_config)
        original(self, **config)
        self.install(settings)

    signature = inspect.signature(original)
    extra = inspect.Parameter("dynamic_config", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]


class DynamicSiTTransformer2DModel(DynamicMixin, SiTTransformer2DModel):
    """`SiTTransformer2DModel` with dynamic width and tokens."""


class DynamicDiTTransformer2DModel(DynamicMixin, DiTTransformer2DModel):
    """`DiTTransformer2DModel` with dynamic width and tokens."""


class DynamicSD3Transformer2DModel(DynamicMixin, SD3Transformer2DModel):
    """`SD3Transformer2DModel` with dynamic width and tokens."""


class DynamicFluxTransformer2DModel(DynamicMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` with dynamic width and tokens."""


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
"""By the class name of the stock network."""


def make_dynamic(base: nn.Module, settings: DynamicSettings | dict[str, Any] | None = None) -> Any:
    """`DynamicMixin.from_base` of the class that fits `base`.

    Raises:
        UnsupportedModelError: no rules for its class.
    """
    return DYNAMIC[rule_of(base).base].from_base(base, settings)


def time_embedding(network: Any, times: Tensor) -> Tensor:
    """Embeddings (T, D) in float32 on the CPU of times (T,), as given to the network's `timestep`."""
    rule = network.dynamic.rule
    projected = network.get_submodule(rule.time_proj)(rule.time_scale * times.float().cpu())
    embed = copy.deepcopy(twin(network.get_submodule(rule.time_embed), hooks=False)).cpu().float()
    with torch.no_grad():
        return embed(projected)
