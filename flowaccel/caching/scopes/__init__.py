"""Scopes of a feature cache: what is replaced, each with its runtime."""

from __future__ import annotations

from typing import Any

from flowaccel.caching.guard import GUARDS, Guard
from flowaccel.caching.runtime import Cache
from flowaccel.caching.scopes.base import SCOPES, Module, Output, Range, Scope, Stack
from flowaccel.caching.scopes.module import ModuleCache
from flowaccel.caching.scopes.output import OutputCache
from flowaccel.caching.scopes.stack import StackCache


def runtime_of(scope: Scope, **parts: Any) -> Cache:
    """Return the runtime for a scope; `parts` are the arguments of `Cache`."""
    if isinstance(scope, Output):
        return OutputCache(scope, **parts)
    return ModuleCache(scope, **parts) if isinstance(scope, Module) else StackCache(scope, **parts)


__all__ = [
    "GUARDS",
    "SCOPES",
    "Cache",
    "Guard",
    "Module",
    "Output",
    "Range",
    "Scope",
    "Stack",
    "runtime_of",
]
