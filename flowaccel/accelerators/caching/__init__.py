"""The machinery behind `FeatureCache`: who computes, what is remembered, and how a scope is surrounded."""

from __future__ import annotations

from flowaccel.accelerators.caching.guard import GUARDS as GUARDS
from flowaccel.accelerators.caching.guard import Guard as Guard
from flowaccel.accelerators.caching.modules import ModuleCache
from flowaccel.accelerators.caching.output import OutputCache
from flowaccel.accelerators.caching.runtime import Cache as Cache
from flowaccel.accelerators.caching.runtime import Rules as Rules
from flowaccel.accelerators.caching.scopes import SCOPES as SCOPES
from flowaccel.accelerators.caching.scopes import Module as Module
from flowaccel.accelerators.caching.scopes import Output as Output
from flowaccel.accelerators.caching.scopes import Range as Range
from flowaccel.accelerators.caching.scopes import Scope as Scope
from flowaccel.accelerators.caching.scopes import Stack as Stack
from flowaccel.accelerators.caching.stack import StackCache


def cache_of(rules: Rules, scope: Scope) -> Cache:
    """The running cache of a scope."""
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
