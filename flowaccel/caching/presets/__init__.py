"""Published training-free caches as combinations of gate, scope, predictor and guard, one file each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowaccel.recipe.registry import load

if TYPE_CHECKING:
    from flowaccel.caching.feature_cache import FeatureCache


@dataclass(frozen=True, kw_only=True)
class CachePreset:
    """A published method as plain data; its parts are in the JSON form of recipes.

    Args:
        name: the name in `accelerate` and recipes.
        summary: its rule in a sentence.
        source: where it was published.
        avoid: when not to use it.
        gate, scope, predictor, guard: the published rule and its default numbers, deciding per image.
        parity: what differs in the cache as published: decisions for the whole batch where the published code takes
            them so (`decide`, "batch" unless given), forecasts over the numbers of the steps, and nothing that ours
            corrects.
        fitted_options: `"module:name"` of a function of the options that returns further ones, such as the threshold
            that belongs to a published polynomial.
        fit: `"module:name"` of the `Calibrator` that fits it to a model.
    """

    name: str
    summary: str
    source: str
    avoid: str
    gate: Mapping[str, Any]
    scope: Mapping[str, Any]
    predictor: Mapping[str, Any]
    guard: Mapping[str, Any]
    parity: Mapping[str, Any] = field(default_factory=dict)
    fitted_options: str | None = None
    fit: str | None = None

    @property
    def cache(self) -> FeatureCache:
        """The cache with its default options, deciding per image."""
        return self._made({})

    @property
    def as_published(self) -> FeatureCache:
        """The cache as published; see `parity`."""
        return self._made({"decide": "batch", **self.parity})

    def _made(self, changes: Mapping[str, Any]) -> FeatureCache:
        parts = {part: getattr(self, part) for part in ("gate", "scope", "predictor", "guard")}
        made: FeatureCache = load("flowaccel.caching.feature_cache:cache_from_data")({**parts, **changes}, self.name)
        return made


def _preset(name: str) -> CachePreset:
    """Return the preset of a file in this folder."""
    found = getattr(importlib.import_module(f"{__name__}.{name}"), "PRESET", None)
    if not isinstance(found, CachePreset) or found.name != name:
        raise TypeError(f"{__path__[0]}/{name}.py must define PRESET = CachePreset(name={name!r}, ...), got {found!r}")
    return found


CACHE_PRESETS: dict[str, CachePreset] = {found.name: _preset(found.name) for found in pkgutil.iter_modules(__path__)}
"""Presets by name."""
