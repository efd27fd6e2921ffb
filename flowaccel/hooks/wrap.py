"""Wrapping a method of one object, and removing the wrapper without harming other wrappers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

Interceptor = Callable[..., Any]


def _same(method: Any) -> Any:
    return method


class _Method:
    """Callable that replaces the wrapped method."""

    def __init__(self, wrapped: Wrapped, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._wrapped, self.stock = wrapped, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._wrapped.armed:
            return self._wrapped.interceptor(self.stock, *args, **kwargs)
        return self.stock(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Reduce to the method below, of the copied owner: a copy (an EMA, a teacher) must not run the original."""
        return _same, (self.stock,)


class Wrapped:
    """A wrapped method of one instance; made by `wrap`."""

    def __init__(self, owner: Any, name: str, interceptor: Interceptor) -> None:
        self.owner, self.name, self.interceptor = owner, name, interceptor
        self.armed = True
        self._shadowed = owner.__dict__.get(name)
        self._method = _Method(self, getattr(owner, name))
        setattr(owner, name, self._method)
        _PlainState.of(owner)

    @property
    def reachable(self) -> bool:
        """Whether a call of the method still reaches this wrapper; removing another wrapper may remove this one too."""
        return any(method is self._method for method in _layers(self.owner.__dict__.get(self.name)))

    def remove(self) -> None:
        """Disable the wrapper, and unlink it unless that would drop another library's wrapper. Idempotent."""
        self.armed = False
        if self.owner.__dict__.get(self.name) is self._method:
            shadowed = self._live_below()
            if shadowed is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, shadowed)
        for holder, attribute in _kept_by_neighbours(self.owner):
            if getattr(holder, attribute) is self._method:
                setattr(holder, attribute, self._method.stock)
        _PlainState.of(self.owner).tidy()

    def _live_below(self) -> Any:
        """Return the instance's own method below this wrapper and below our own wrappers that are disabled."""
        below = self._shadowed
        while isinstance(below, _Method) and not below._wrapped.armed:
            below = below._wrapped._shadowed
        return below


class _PlainState:
    """Callable installed as `__getstate__` of a wrapped object, so that copies and pickles contain no wrapper.

    A copy equals the object as it was before wrapping.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self.lent: set[str] = set()
        self.swapped: dict[str, tuple[Any, Any]] = {}

    @classmethod
    def of(cls, owner: Any) -> _PlainState:
        found: _PlainState = owner.__dict__.setdefault("__getstate__", cls(owner))
        return found

    def tidy(self) -> None:
        """Uninstall itself if the object holds no wrapper or lent attribute any more."""
        ours = self.lent or self.swapped or any(isinstance(value, _Method) for value in vars(self._owner).values())
        if not ours:
            self._owner.__dict__.pop("__getstate__", None)

    def __call__(self) -> Any:
        kind: Any = type(self._owner)
        state = {}
        for name, value in kind.__getstate__(self._owner).items():
            before = _before(name, value)
            if not (value is self or name in self.lent or before is None is not value):
                state[name] = before
        if not self.swapped:
            return state
        clone = kind.__new__(kind)  # its `setattr` updates the configuration too
        clone.__dict__.update(state)
        for name, (old, new) in self.swapped.items():
            if getattr(clone, name) is new:  # unless the user swapped it meanwhile
                setattr(clone, name, old)
        return vars(clone)


def _before(name: str, value: Any) -> Any:
    """Return an instance's attribute as it was before wrapping, or None if there was none.

    It is the method below if another library keeps the wrapper under another name.
    """
    while isinstance(value, _Method):
        value = value._wrapped._shadowed if value._wrapped.name == name else value.stock
    return value


def lend(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute that copies of the object do not get; returns a function that removes it."""
    state = _PlainState.of(owner)
    state.lent.add(name)
    owner.__dict__[name] = value

    def take() -> None:
        owner.__dict__.pop(name, None)
        state.lent.discard(name)
        state.tidy()

    return take


def swapped(owner: Any, attributes: Mapping[str, tuple[Any, Any]]) -> Callable[[], None]:
    """Make copies of an object take the old values of attributes (old, new); returns a function that undoes that."""
    state = _PlainState.of(owner)
    state.swapped.update(attributes)

    def undo() -> None:
        state.swapped.clear()
        state.tidy()

    return undo


def _layers(method: Any) -> Iterator[Any]:
    while method is not None:
        yield method
        method = getattr(method, "__wrapped__", None)


def _kept_by_neighbours(owner: Any) -> Iterator[tuple[Any, str]]:
    """Yield where accelerate's offload hooks and diffusers' hook registry keep the method that they wrapped."""
    if "_old_forward" in owner.__dict__:
        yield owner, "_old_forward"
    for reference in getattr(owner.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        yield from ((reference, "forward"), (reference, "original_forward"))


def wrap(owner: Any, name: str, interceptor: Interceptor) -> Wrapped:
    """Replace `owner.name` by `interceptor(original, *args, **kwargs)`, on this instance only; its signature is kept.

    Args:
        owner: a module, scheduler or pipeline.
        name: the method.
        around: called instead, with the original method as the first argument.

    Returns:
        The handle whose `remove` undoes it.
    """
    return Wrapped(owner, name, interceptor)


def entry_point(module: nn.Module) -> str:
    """Return the name of the method to wrap on a module: `forward`, or the compiled call of `module.compile()`.

    A wrapper of `forward` would be traced into the compiled graph; a wrapper of the compiled call is not.
    """
    return "forward" if module.__dict__.get("_compiled_call_impl") is None else "_compiled_call_impl"
