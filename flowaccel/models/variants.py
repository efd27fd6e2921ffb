"""Base class of variants of stock networks."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from flowaccel.models.clone import clone_sharing_parameters


class VariantMixin:  # no ABC: stock networks become variants by __class__, for which the layouts must be alike
    """Mixin for a variant of a stock network, whose constructor takes one more argument.

    A subclass defines the `argument`, its conversion (`settings_of`) and what is built from it (`install`); its other
    base class is the stock one.
    """

    stock: ClassVar[type[nn.Module]]
    """Class of the stock network."""
    argument: ClassVar[str]
    """Name of the constructor's argument, and of the entry in the configuration."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next((base for base in cls.__mro__[1:] if not issubclass(base, VariantMixin)), object)
        if issubclass(stock, nn.Module):
            cls.stock = stock
            _add_argument(cls)

    @classmethod
    def settings_of(cls, given: Any) -> Any:
        """Convert the constructor's argument to the settings that `install` takes."""
        raise NotImplementedError

    def install(self, settings: Any) -> None:
        """Turn the stock network into its variant."""
        raise NotImplementedError

    @classmethod
    def sharing_parameters(cls, base: nn.Module) -> Any:
        """Return a stock network of this class that shares the weights of `base`, without calling `install`."""
        network: Any = clone_sharing_parameters(base)
        network.__class__ = cls
        own = {name: value for name, value in network._internal_dict.items() if name != "_name_or_path"}
        network._internal_dict = FrozenDict(own)  # without the path of the stock network
        return network

    @classmethod
    def own_config(cls, network: Any) -> dict[str, Any]:
        """Return the configuration without the variant's argument."""
        return {name: value for name, value in network.config.items() if name != cls.argument}

    def routing(self) -> list[Tensor]:
        """Return the parameters and buffers that decide what is computed."""
        raise NotImplementedError

    def place(self, device: Any, dtype: torch.dtype) -> Self:
        """Move the network to a device and floating-point dtype, except for the dtype of the `routing` tensors.

        In another dtype they might decide otherwise, which changes the network.
        """
        network: Any = self
        kept = {id(tensor) for tensor in self.routing()}
        for tensor in (*network.parameters(), *network.buffers()):
            floating = tensor.is_floating_point() and id(tensor) not in kept
            tensor.data = tensor.data.to(device, dtype if floating else tensor.dtype)
        return self


def _add_argument(cls: type[VariantMixin]) -> None:
    """Give `cls` the constructor of its stock class with one more argument."""
    original: Any = cls.stock.__init__
    name = cls.argument

    def __init__(self: Any, **config: Any) -> None:
        settings = cls.settings_of(config.pop(name, None))
        original(self, **config)
        self.install(settings)

    signature = inspect.signature(original)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]


def stock_class(network: nn.Module) -> Any:
    """Return the class of the network that a variant is based on, or the network's own class."""
    return getattr(network, "stock", type(network))
