"""Presets `safe`, `balanced` and `fast`: the cache that was calibrated for a run, or a generic one."""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from flowaccel.caching import LEVELS
from flowaccel.caching.feature_cache import FeatureCache
from flowaccel.caching.gates import Easy
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Newton
from flowaccel.caching.runtime import Cache
from flowaccel.caching.scopes import Output
from flowaccel.hooks import Call, Identity, Pipeline, Session, denoiser, session_of
from flowaccel.recipe import serialization
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.calibration import Calibration, calibrate_command, identities, warn_once
from flowaccel.recipe.compatibility import Tag

Level = Literal["safe", "balanced", "fast"]
CALIBRATED = Path(__file__).with_name("calibrated.json")
"""File of the calibrated caches, written by `benchmarks/calibrate_levels.py`."""


def _generic(threshold: float, max_run: int) -> FeatureCache:
    guard = Guard(warmup=0.2, last=1, max_run=max_run)
    return FeatureCache(Easy(threshold), Output(residual=True), Newton(order=1), guard)


# Near the thresholds that reach the levels on zoo:sit-digits with 20 evaluations (benchmarks/calibrate_levels.py). That
# says little about other networks, hence the bounds on runs of reuse.
GENERIC: dict[str, FeatureCache] = {
    "safe": _generic(0.03, 1),
    "balanced": _generic(0.06, 2),
    "fast": _generic(0.12, 4),
}
"""Generic caches for runs without a calibration, by level."""


@dataclass(frozen=True)
class LevelCache(Accelerator):
    """Accelerator with the cache calibrated for each run's network, scheduler and number of steps, or else EasyCache.

    The calibrated caches are in `calibrated.json`. All other runs use the generic cache, with thresholds measured on a
    small network, and a warning, once per pipeline, states how to calibrate.

    Args:
        level: `safe`, `balanced` or `fast`, which aim at 1.3, 1.8 and 2.5 times fewer computed network calls.

    Raises:
        ValueError: an unknown level.
    """

    name: ClassVar[str] = "level_cache"

    level: Level = "balanced"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, and the tag of caches."""
        return super().tags | {Tag.CACHE}

    def attach(self, pipe: Pipeline) -> Detach:
        """Attach every candidate cache; one of them is active in each run."""
        session = session_of(pipe)
        chooser = _Chooser(self.level, session, candidates(self.level, Identity.of(denoiser(pipe))))
        with ExitStack() as undo:
            for running in chooser.running:
                undo.callback(running.attach(session))
            return undo.pop_all().close


class _Chooser:
    """Selects the cache that is active in a run."""

    def __init__(self, level: Level, session: Session, calibrated: list[tuple[Calibration, FeatureCache]]) -> None:
        self._level, self._session = level, session
        self._calibrated = [(calibration, cache.running()) for calibration, cache in calibrated]
        self._generic = GENERIC[level].running()
        for running in self.running:
            running.active = functools.partial(self._is_active, running)

    @property
    def running(self) -> list[Cache]:
        """All attached caches."""
        return [*(running for _, running in self._calibrated), self._generic]

    def _is_active(self, running: Cache, call: Call) -> bool:
        chosen = call.run.state.get(self)
        if chosen is None:
            chosen = call.run.state[self] = self._choose(call)
        return chosen is running

    def _choose(self, call: Call) -> Cache:
        pipe = self._session.pipe
        network, scheduler = identities(pipe)
        steps = call.run.num_steps
        for calibration, running in self._calibrated:
            if not calibration.differences(network, scheduler, steps):
                return running
        command = calibrate_command(pipe, call, "teacache")
        warn_once(
            pipe,
            LevelCache.name,
            f"nothing is calibrated for a {network.kind} with {steps} evaluations of {scheduler.kind}, so "
            f"{self._level!r} is a generic EasyCache here, whose threshold was measured on a small network of digits: "
            "how much it saves and what it does to the images is not known. Calibrate with: "
            f"{command} --target-speedup {LEVELS[self._level]} --out FOLDER",
        )
        return self._generic


def candidates(level: Level, network: Identity) -> list[tuple[Calibration, FeatureCache]]:
    """Return the caches calibrated for a network, with any scheduler and number of steps."""
    return [
        (cache.calibration, cache)
        for cache in shipped().get(level, ())
        if cache.calibration is not None and cache.calibration.fits_network(network)
    ]


@functools.cache
def shipped() -> dict[str, tuple[FeatureCache, ...]]:
    """Return the calibrated caches of this release, by level."""
    entries = json.loads(CALIBRATED.read_text(encoding="utf-8"))["entries"]
    found: dict[str, tuple[FeatureCache, ...]] = {}
    source = serialization.Source(CALIBRATED.parent)
    for index, entry in enumerate(entries):
        for part in entry["recipe"]["accelerators"]:
            if part["name"] == FeatureCache.name:
                path = f"{CALIBRATED.name}: entries[{index}]"
                cache = serialization.decode({FeatureCache.name: FeatureCache}, part, path, source)
                found[entry["level"]] = (*found.get(entry["level"], ()), cache)
    return found
