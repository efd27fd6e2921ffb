"""Runtimes of `FeatureCache`, one for each scope."""

from __future__ import annotations

from flowaccel.caching.guard import GUARDS as GUARDS
from flowaccel.caching.guard import Guard as Guard
from flowaccel.caching.runtime import Cache as Cache
from flowaccel.caching.runtime import Rules as Rules
from flowaccel.caching.scopes.base import SCOPES as SCOPES
from flowaccel.caching.scopes.base import Module as Module
from flowaccel.caching.scopes.base import Output as Output
from flowaccel.caching.scopes.base import Range as Range
from flowaccel.caching.scopes.base import Scope as Scope
from flowaccel.caching.scopes.base import Stack as Stack
from flowaccel.caching.scopes.module import ModuleCache
from flowaccel.caching.scopes.output import OutputCache
from flowaccel.caching.scopes.stack import StackCache


def cache_of(rules: Rules, scope: Scope) -> Cache:
    """Return the runtime of a cache for a scope."""
    if isinstance(scope, Output):
        return OutputCache(rules, scope)
    return ModuleCache(rules, scope) if isinstance(scope, Module) else StackCache(rules, scope)


__all__ = [
    "GUARDS",
    "SCOPES",
    "Cache",
    "Guard",
    "Module",
    "Output",
    "Range",
    "Rules",
    "Scope",
    "Stack",
    "cache_of",
]
