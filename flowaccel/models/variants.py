"""What another form of a stock network has in common with every other such form."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from flowaccel.models.clone import twin


class VariantMixin:
    """A form of a stock network whose constructor takes one more argument.

    A subclass names the `argument` and says what it becomes (`settings_of`) and what is built of that (`install`); its
    other base class is the stock one.
    """

    stock: ClassVar[type[nn.Module]]
    """The class that it is a form of."""
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
        """What `install` takes, of the argument."""
        raise NotImplementedError

    def install(self, settings: Any) -> None:
        """Make the stock network what it is a form of."""
        raise NotImplementedError

    @classmethod
    def around(cls, base: nn.Module) -> Any:
        """A stock network of this class around the very weights of `base`, which stays as it is; not installed."""
        network: Any = twin(base)
        network.__class__ = cls
        own = {name: value for name, value in network._internal_dict.items() if name != "_name_or_path"}
        network._internal_dict = FrozenDict(own)  # not where the stock network was loaded from
        return network

    @classmethod
    def own_config(cls, network: Any) -> dict[str, Any]:
        """The stock network's arguments."""
        return {name: value for name, value in network.config.items() if name != cls.argument}

    def routing(self) -> list[Tensor]:
        """The parameters and buffers that decide what is computed."""
        raise NotImplementedError

    def place(self, device: Any, dtype: torch.dtype) -> Self:
        """To a device and a floating-point type, but for what decides, which keeps its type: another decision changes
        the network.
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
    """The class that a network would have if it were no other form of it."""
    return getattr(network, "stock", type(network))
