"""Wrapping a method of one object, and taking the wrapper off again without harming neighbours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Around = Callable[..., Any]


class _Method:
    """What stands in the place of the wrapped method."""

    def __init__(self, wrapped: Wrapped, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._wrapped, self._original = wrapped, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._wrapped.armed:
            return self._wrapped.around(self._original, *args, **kwargs)
        return self._original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method below, bound to the copied owner: a copy (an EMA, a teacher) must not run the original."""
        return copy.deepcopy(self._original, memo)


class Wrapped:
    """A method of one instance, surrounded; made by `wrap`."""

    def __init__(self, owner: Any, name: str, around: Around) -> None:
        self.owner, self.name, self.around = owner, name, around
        self.armed = True
        self._shadowed = owner.__dict__.get(name)
        self._method = _Method(self, getattr(owner, name))
        setattr(owner, name, self._method)

    @property
    def reachable(self) -> bool:
        """Whether a call of the method still comes by here; who removes a wrapper of theirs may take ours along."""
        return any(method is self._method for method in _layers(self.owner.__dict__.get(self.name)))

    def remove(self) -> None:
        """Switch the wrapper off, and unlink it wherever that cannot drop somebody else's wrapper. Idempotent."""
        self.armed = False
        if self.owner.__dict__.get(self.name) is self._method:
            shadowed = self._live_below()
            if shadowed is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, shadowed)
        for holder, attribute in _kept_by_neighbours(self.owner):
            if getattr(holder, attribute) is self._method:
                setattr(holder, attribute, self._method._original)

    def _live_below(self) -> Any:
        """The instance's own method below this wrapper and below those of ours that were switched off meanwhile."""
        below = self._shadowed
        while isinstance(below, _Method) and not below._wrapped.armed:
            below = below._wrapped._shadowed
        return below


def _layers(method: Any) -> Iterator[Any]:
    while method is not None:
        yield method
        method = getattr(method, "__wrapped__", None)


def _kept_by_neighbours(owner: Any) -> Iterator[tuple[Any, str]]:
    """Where others keep the method that they wrapped: accelerate's offload hooks and diffusers' hook registry."""
    if "_old_forward" in owner.__dict__:
        yield owner, "_old_forward"
    for reference in getattr(owner.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        yield from ((reference, "forward"), (reference, "original_forward"))


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


def entry_point(module: nn.Module) -> str:
    """The method to wrap on a module: `forward`, or what `module.compile()` put before it.

    A wrapper of `forward` would be traced into the compiled graph; around the compiled call it stays outside.
    """
    return "forward" if module.__dict__.get("_compiled_call_impl") is None else "_compiled_call_impl"
