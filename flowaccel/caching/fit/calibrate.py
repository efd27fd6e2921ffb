"""A complete calibration: observe, fit, choose, verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flowaccel.caching.feature_cache import FeatureCache
from flowaccel.caching.fit.methods import Calibrator
from flowaccel.caching.fit.observe import Trace, observe
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Predictor
from flowaccel.errors import did_you_mean
from flowaccel.evaluation.metrics.pixel_metrics import rel_l2
from flowaccel.evaluation.samples.prompt_lengths import check_prompt_lengths
from flowaccel.hooks import Pipeline, Run, session_of
from flowaccel.recipe import Recipe, accelerated, registry
from flowaccel.recipe.calibration import Calibration
from flowaccel.training.sampling import Notify, Sampling


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Data recorded from runs of a pipeline without a cache."""

    trace: Trace
    images: Tensor
    """uint8 (N, C, H, W)."""
    facts: dict[str, Any]
    """Fields of a `Calibration` that describe the runs."""


def find_method(name: str) -> Calibrator:
    """Return a calibration method for caches by its name.

    Raises:
        ValueError: unknown name, or that of a method that searches step grids.
    """
    known = registry.entries("fit")
    if name not in known:
        raise ValueError(
            f"method must be one of {', '.join(known)}, got {name!r}; {did_you_mean(name, known)}".rstrip("; ")
        )
    found = registry.load(known[name])
    if not isinstance(found, Calibrator):
        raise ValueError(f"method {name!r} searches a step grid, not a cache; call calibrate_grid")
    return found


def check_target(target: float) -> None:
    """Raise a ValueError unless a speed-up is above 1."""
    if not 1 < target < float("inf"):
        raise ValueError(f"the speed-up aimed at must be a number above 1, got {target:g}")


def calibrate(
    pipe: Pipeline,
    method: str,
    target: float,
    sampling: Sampling,
    *,
    base: Recipe | None = None,
    guard: Guard | None = None,
    predictor: Predictor | None = None,
    model: str | None = None,
    notify: Notify = lambda *_: None,
) -> Recipe:
    """Fit a cache to the user's own runs, and measure it in as many runs with the cache.

    Args:
        pipe: a pipeline that is not accelerated.
        method: `teacache`, `magcache`, `adacache`, `easycache` or `ab_cache`.
        target: speed-up aimed at in computed network calls, above 1.
        sampling: the runs.
        base: recipe that the cache is appended to, such as another sampler.
        guard: replaces the method's own.
        predictor: replaces the method's own.
        model: the name of the pipeline, for the record.
        notify: called as work proceeds.

    Returns:
        `base` with the calibrated `FeatureCache` at its end, whose `calibration` holds the measurements.

    Raises:
        ValueError: an unknown method, a target that is not above 1 or out of reach under the guard, fewer than 3 steps,
            or prompts that the pipeline would cut off.
        RecipeConflictError: `base` holds a cache already, or the pipeline is accelerated.
        UnsupportedModelError: the method reads blocks that are not known.
    """
    chosen = find_method(method)
    check_target(target)
    check_prompt_lengths(pipe, sampling.conditions.texts(range(sampling.num_samples)), sampling.arguments)
    base = base or Recipe()
    with_cache(base, FeatureCache())  # raises now what would otherwise be raised at the end
    observation = observe_methods(pipe, sampling, [chosen], base=base, model=model, notify=notify)
    cache = fitted(chosen, observation, target, guard=guard, predictor=predictor)
    return verified(pipe, cache, observation, sampling, base=base, notify=notify)


def observe_methods(
    pipe: Pipeline,
    sampling: Sampling,
    methods: Sequence[Calibrator],
    *,
    base: Recipe | None = None,
    model: str | None = None,
    notify: Notify = lambda *_: None,
) -> Observation:
    """Sample without a cache, and record what the methods need; see `calibrate`."""
    if sampling.steps < 3:
        raise ValueError(f"steps must be at least 3, got {sampling.steps}: with fewer there is nothing to reuse")
    with accelerated(pipe, base or Recipe()):
        trace, images = observe(pipe, sampling, [method.watch for method in methods], notify)
        facts = sampling.facts(pipe, trace.steps, model)
    return Observation(trace=trace, images=images, facts=facts)


def fitted(
    method: Calibrator,
    observation: Observation,
    target: float,
    *,
    guard: Guard | None = None,
    predictor: Predictor | None = None,
) -> FeatureCache:
    """Fit a method's cache to the recorded runs; see `calibrate`."""
    check_target(target)
    guard = guard or method.guard
    gate, fit, predicted = method.choose(observation.trace, guard, target)
    calibration = Calibration(
        method=method.name,
        target_speedup=target,
        predicted_speedup=round(predicted, 4),
        r_squared=None if fit is None or fit.r_squared is None else round(fit.r_squared, 4),
        fitted_range=None if fit is None else fit.fitted_range,
        **observation.facts,
    )
    return FeatureCache(gate, method.scope, predictor or method.predictor, guard, calibration=calibration)


def verified(
    pipe: Pipeline,
    cache: FeatureCache,
    observation: Observation,
    sampling: Sampling,
    *,
    base: Recipe | None = None,
    notify: Notify = lambda *_: None,
) -> Recipe:
    """Repeat the sampling with the cache, and return the recipe with the measurements in its calibration."""
    recipe = with_cache(base or Recipe(), cache)
    computed = decided = 0
    error = 0.0
    untouched = iter(observation.images.split(sampling.batch_size))
    with accelerated(pipe, recipe):
        session = session_of(pipe)
        for images in sampling.run(pipe, notify, "verifying"):
            error += float(rel_l2(images, next(untouched)).sum())
            assert session.last_run is not None
            done, of = _computed(session.last_run)
            computed, decided = computed + done, decided + of
    assert cache.calibration is not None
    calibration = replace(
        cache.calibration,
        measured_speedup=round(decided / computed, 4),
        rel_l2=float(f"{error / sampling.num_samples:.4g}"),
    )
    name = f"{calibration.method}-{calibration.target_speedup:g}x"
    final = with_cache(base or Recipe(), replace(cache, calibration=calibration))
    return replace(final, name=name, num_inference_steps=sampling.steps)


def with_cache(base: Recipe, cache: FeatureCache) -> Recipe:
    """Return a recipe with a cache appended.

    Raises:
        RecipeConflictError: they are incompatible.
    """
    return Recipe([*base.accelerators, cache], name=base.name, num_inference_steps=base.num_inference_steps)


def _computed(run: Run) -> tuple[int, int]:
    """Return the number of computed network calls, and of all network calls, counted per image."""
    decided = [record.computed for record in run.records if record.computed]
    return sum(map(sum, decided)), sum(map(len, decided))
