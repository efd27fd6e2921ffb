"""Base class of accelerators that replace a network by another form of it."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from flowaccel.errors import RecipeConflictError
from flowaccel.hooks import CallInterceptor, Pipeline, denoiser, session_of, swap
from flowaccel.models import stock_class
from flowaccel.models.attention import attend_like
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.loading import beside
from flowaccel.recipe.serialization import storage_of


class Variant(Accelerator):
    """Abstract base class of accelerators that replace the network by a variant.

    A subclass has a learned field `network`: the variant, or the folder that it is stored in. With None it is loaded
    from the folder of the field's name next to the pipeline's components.
    """

    kind = "variant"
    network: Any
    what: ClassVar[str]
    """Name of the network in error messages."""
    advice: ClassVar[str]
    """Advice in error messages if there is no network."""

    @staticmethod
    @abstractmethod
    def is_form(network: nn.Module) -> bool:
        """Return whether a network is a variant of this kind, or makes one."""

    def check_network(self) -> None:
        """Raise a TypeError unless the network is a module of the right form, a folder or None."""
        if not isinstance(self.network, (nn.Module, str, Path, type(None))):
            raise TypeError(f"network must be a module, a folder or None, got {type(self.network).__name__}")
        if isinstance(self.network, nn.Module) and not self.is_form(self.network):
            raise TypeError(f"network must be a {self.what}, got a {type(self.network).__name__}; {self.advice}")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Empty: the variant is the pipeline's own network while it is attached."""
        return {}

    def loaded(self, pipe: Pipeline) -> Self:
        """Return this accelerator with the network as a module."""
        changes: dict[str, Any] = {"network": self.resolve(pipe)}
        return replace(self, **changes)

    def resolve(self, pipe: Pipeline | None = None) -> nn.Module:
        """Return the network as a module, loaded if a folder was given.

        Raises:
            WeightsNotFoundError, CheckpointError: as for `load_network`, or there is none beside the components.
            TypeError: the network is not such a variant.
        """
        if isinstance(self.network, nn.Module):
            return self.network
        stored = storage_of(type(self), "network")
        folder = self.network
        if folder is None:
            advice = f"{self.advice}, or pass {type(self).__name__}(network=FOLDER)"
            folder = beside(pipe, stored.folder, self.what, advice)
        return stored.load(Path(folder))

    def fitted_to(self, network: Any, base: Any) -> Any:
        """Return the network that replaces `base`, on its device and of its dtype, in evaluation mode.

        Raises:
            ValueError: it is a variant of another network.
            RecipeConflictError: the weights of `base` are offloaded piece by piece.
        """
        stock = stock_class(network)
        if stock is not type(base):
            other_form = stock is stock_class(base)
            todo = f"put the {stock.__name__} back first" if other_form else f"{self.advice} for this pipeline"
            raise ValueError(
                f"the {self.what} is a form of {stock.__name__}, and the pipeline has a {type(base).__name__}; {todo}"
            )
        own = network.own_config(network)
        misfits = [
            f"{name} is {own[name]}, must be {value}"
            for name, value in base.config.items()
            if not name.startswith("_") and name in own and own[name] != value
        ]
        if misfits:
            raise ValueError(f"the {self.what} does not fit the pipeline: {'; '.join(misfits)}")
        if base.device.type == "meta":
            raise RecipeConflictError(
                f"the weights of the {type(base).__name__} are offloaded piece by piece; accelerate first, then switch "
                "offloading on"
            )
        return network.place(base.device, base.dtype).eval()


def put_in_place(pipe: Pipeline, network: nn.Module, interceptor: CallInterceptor) -> Detach:
    """Replace the pipeline's network by `network`, and wrap its calls in `interceptor`.

    The network takes over the attention backend that was chosen for the old one. On failure nothing is changed. Undoing
    puts back the old object, and the backend that the network had.

    Raises:
        ValueError: the network cannot compute attention by that backend.
        RecipeConflictError: the network is another accelerated pipeline's.
    """
    session, base = session_of(pipe), denoiser(pipe)
    with ExitStack() as undo:
        undo.callback(attend_like(network, base))
        undo.callback(swap(pipe, base, network))
        session.follow()
        undo.callback(session.on_call(interceptor))
        return undo.pop_all().close
