"""Wrapping a method of one object, and taking the wrapper off again without harming neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Around = Callable[..., Any]
# where other wrappers (accelerate's offload hooks) keep the method that they wrapped
_NEIGHBOURS = ("_old_forward",)


class Wrapped:
    """A method of one instance, surrounded; made by `wrap`."""

    def __init__(self, owner: Any, name: str, around: Around) -> None:
        self._owner, self._name = owner, name
        self._shadowed = owner.__dict__.get(name)
        original = getattr(owner, name)
        self._armed = True

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._armed else original(*args, **kwargs)

        method.__dict__["flowaccel_wrapped"] = self
        self._method = method
        setattr(owner, name, method)

    def remove(self) -> None:
        """Switch the wrapper off, and unlink it wherever that cannot drop somebody else's wrapper. Idempotent."""
        self._armed = False
        if self._owner.__dict__.get(self._name) is self._method:
            shadowed = self._live_below()
            if shadowed is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, shadowed)
        for neighbour in _NEIGHBOURS:
            if self._owner.__dict__.get(neighbour) is self._method:
                setattr(self._owner, neighbour, self._method.__wrapped__)

    def _live_below(self) -> Any:
        """The instance's own method below this wrapper and below those of ours that were switched off meanwhile."""
        below = self._shadowed
        while True:
            # Compared with the method itself, because `functools.wraps` copies the attribute to whoever wraps it.
            wrapped = getattr(below, "flowaccel_wrapped", None)
            if wrapped is None or wrapped._method is not below or wrapped._armed:
                return below
            below = wrapped._shadowed


def wrap(owner: Any, name: str, around: Around) -> Wrapped:
    """Replace `owner.name` by `around(original, *args, **kwargs)`, on this instance only and with its signature kept.

    Args:
        owner: a module, scheduler or pipeline.
        name: the method.
        around: called in its place with the method it surrounds as the first argument.

    Returns:
        The handle whose `remove` undoes it.
    """
    return Wrapped(owner, name, around)


def denoiser(pipe: Any) -> Any:
    """The network that a pipeline calls at every step: its `transformer` or `unet`.

    Raises:
        TypeError: the pipeline has neither.
    """
    for name in ("transformer", "unet"):
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return network
    raise TypeError(f"{type(pipe).__name__} has neither a transformer nor a unet to accelerate")
