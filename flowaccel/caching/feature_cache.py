"""Feature caches: skip network calls, or parts of them, and reuse or extrapolate earlier results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flowaccel.caching.decisions import UNITS, Unit
from flowaccel.caching.gates import GATES, Easy, Gate
from flowaccel.caching.gates.base import INSIDE
from flowaccel.caching.guard import GUARDS, Guard
from flowaccel.caching.predictors import PREDICTORS, Hold, Predictor
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.caching.runtime import Cache
from flowaccel.caching.scopes import SCOPES, Output, Scope, Stack, runtime_of
from flowaccel.hooks import Pipeline, session_of
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.calibration import CALIBRATIONS, Calibration, watch
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.parts import chosen_part, with_options
from flowaccel.recipe.registry import load
from flowaccel.recipe.serialization import Source, component, decode

_PARTS: dict[str, Mapping[str, type]] = {"gate": GATES, "scope": SCOPES, "predictor": PREDICTORS, "guard": GUARDS}
_KINDS: dict[str, type] = {"gate": Gate, "predictor": Predictor}
"""Base classes of the parts. Custom subclasses must be entered in the registry to be saved in a recipe."""


@dataclass(frozen=True, init=False)
class FeatureCache(Accelerator):
    """Accelerator that reuses results of earlier steps: gate x scope x predictor x guard.

    The published training-free caches are points in this space; `CACHE_PRESETS` names them. Each part is an object, or
    the name of one, and then keywords go to the part that has them:
    `FeatureCache(gate="first_block", threshold=0.08, predictor="newton", order=2)`.

    Args:
        gate: when to compute: `interval`, `mask`, `first_block`, `modulated_input`, `magnitude`, `easy`, `codebook`,
            `third_difference`.
        scope: what is replaced: `output`, `stack`, `range`, `module`. None takes `output` for gates that read
            nothing inside of the network, else `stack`.
        predictor: what replaces it: `hold`, `newton`, `taylor`, `hermite`, `adams_bashforth`.
        guard: bounds on the gate.
        decide: unit that decides: every `image` by its conditional rows, so that it does not depend on the other images
            of the batch; every `row`; or the whole `batch`, as most published code does.
        calibration: what its numbers were fitted on, as `flowaccel calibrate` writes it. On another network, scheduler
            or number of steps it still runs, and warns once per pipeline.
        options: fields of these parts.

    Raises:
        ValueError: an unknown name, a value out of range, or a gate that cannot work in the scope.
        TypeError: a keyword that no chosen part has.
    """

    name: ClassVar[str] = "feature_cache"

    gate: Gate = component(GATES)
    scope: Scope = component(SCOPES)
    predictor: Predictor = component(PREDICTORS)
    guard: Guard = component(GUARDS)
    decide: Unit = "image"
    calibration: Calibration | None = component(CALIBRATIONS, default=None)

    def __init__(
        self,
        gate: Gate | str = Easy.name,
        scope: Scope | str | None = None,
        predictor: Predictor | str = Hold.name,
        guard: Guard | str = Guard.name,
        decide: Unit = "image",
        calibration: Calibration | None = None,
        **options: Any,
    ) -> None:
        chosen = {
            "gate": _part("gate", gate),
            "predictor": _part("predictor", predictor),
            "guard": _part("guard", guard),
        }
        chosen["scope"] = _part("scope", _usual_scope(chosen["gate"]) if scope is None else scope)
        for part, value in with_options(chosen, options).items():
            object.__setattr__(self, part, value)
        object.__setattr__(self, "decide", decide)
        object.__setattr__(self, "calibration", calibration)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TypeError(f"calibration must be a Calibration or None, got {calibration!r}")
        if decide not in UNITS:
            raise ValueError(f"decide must be one of {', '.join(UNITS)}, got {decide!r}")
        self._check_parts()

    def _check_parts(self) -> None:
        needs_blocks = self.gate.signal in INSIDE or self.gate.feedback == "middle_block"
        if needs_blocks and self.scope.name not in ("stack", "range"):
            raise ValueError(
                f"gate {self.gate.name!r} reads blocks of the network, so it works in the scopes 'stack' and 'range', "
                f"got {self.scope.name!r}"
            )
        if self.gate.feedback == "feature" and self.scope.name == "module":
            raise ValueError(
                f"gate {self.gate.name!r} reads the one feature that is cached, and scope 'module' caches many; use "
                "'stack', 'range' or 'output', or a gate that reads nothing, such as 'interval'"
            )

        if self.predictor.needs_signal and self.gate.signal == "none":
            raise ValueError(
                f"predictor {self.predictor.name!r} reads the gate's signal, and gate {self.gate.name!r} has none; use "
                "a gate that reads something, such as 'first_block' or 'easy'"
            )

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, the tag of caches, and one for whether images decide."""
        return super().tags | {Tag.CACHE} | (set() if self.decide == "image" else {Tag.DECIDES_FOR_MANY})

    def attach(self, pipe: Pipeline) -> Detach:
        """Wrap the network's calls, and its blocks or modules if the scope needs them."""
        session = session_of(pipe)
        detach = self.running().attach(session)
        if self.calibration is None:
            return detach
        removers = [watch(session, self.calibration), detach]
        return lambda: [remove() for remove in removers].clear()

    def running(self) -> Cache:
        """Return the runtime of this cache, not attached yet."""
        return runtime_of(self.scope, gate=self.gate, predictor=self.predictor, guard=self.guard, unit=self.decide)


def _part(kind: str, value: Any) -> Any:
    return chosen_part(kind, value, _PARTS[kind], _KINDS.get(kind))


def _usual_scope(gate: Any) -> Scope:
    inside = gate.signal in INSIDE or gate.feedback in ("middle_block", "feature")
    return Stack() if inside or gate.name == "magnitude" else Output(residual=gate.name == Easy.name)


def cache_from_data(data: Mapping[str, Any], name: str) -> FeatureCache:
    """Return the cache whose parts `data` describes in the JSON form of recipes; errors refer to it as `name`."""
    known = {FeatureCache.name: FeatureCache}
    cache: FeatureCache = decode(known, {"name": FeatureCache.name, **data}, name, Source(Path()))
    return cache


def cache_preset(name: str, *, parity: bool = False, **options: Any) -> FeatureCache:
    """Return a published cache.

    Args:
        name: one of `flowaccel.caching.presets`, such as `fbcache` or `teacache`.
        parity: as published, rather than deciding per image and forecasting on the true times.
        options: fields of its parts, such as `threshold=0.1` or `max_run=2`, or the parts themselves. A published
            polynomial of TeaCache, such as `coefficients="flux"`, brings its threshold and guard with it.

    Raises:
        ValueError: an unknown name, or a value out of range.
        TypeError: an option that none of its parts has.
    """
    if name not in CACHE_PRESETS:
        raise ValueError(f"cache must be one of {', '.join(CACHE_PRESETS)}, got {name!r}")
    preset = CACHE_PRESETS[name]
    cache = preset.as_published if parity else preset.cache
    parts = {part: getattr(cache, part) for part in (*_PARTS, "decide")}
    fitted = load(preset.fitted_options)(options) if preset.fitted_options else {}
    return FeatureCache(**(parts | fitted | options))
