"""The published training-free caches as points of gate x scope x predictor x guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowaccel.accelerators.caching import Guard, Module, Output, Stack
from flowaccel.accelerators.feature_cache import FeatureCache
from flowaccel.gates import Codebook, Easy, FirstBlock, Interval, Magnitude, Mask, ModulatedInput, ThirdDifference
from flowaccel.gates.teacache_fits import PUBLISHED
from flowaccel.predictors import AdamsBashforth, Hold, Newton, Taylor


@dataclass(frozen=True, kw_only=True)
class CachePreset:
    """A published method."""

    summary: str
    """Its rule in a sentence."""
    source: str
    """Where it was published."""
    avoid: str
    """When not to use it."""
    cache: FeatureCache
    """The published rule and its default numbers, deciding per image."""
    parity: FeatureCache
    """As published: decisions for the whole batch where the published code takes them so, forecasts over the numbers of
    the steps, and nothing that ours corrects."""


CACHE_PRESETS: dict[str, CachePreset] = {}
"""By the names that `accelerate` and recipes take."""


def _add(name: str, cache: FeatureCache, parity: dict[str, Any] | None = None, **texts: str) -> None:
    published = FeatureCache(**(_parts(cache) | {"decide": "batch"} | (parity or {})))
    CACHE_PRESETS[name] = CachePreset(cache=cache, parity=published, **texts)


def _parts(cache: FeatureCache) -> dict[str, Any]:
    return {name: getattr(cache, name) for name in ("gate", "scope", "predictor", "guard", "decide")}


_add(
    "fbcache",
    FeatureCache(FirstBlock(threshold=0.05), Stack(), Hold(), Guard(warmup=1, last=0)),
    summary="Compute where the residual of the first block has moved since the last computed step.",
    source="First Block Cache (ParaAttention); diffusers' FirstBlockCache and its default threshold",
    avoid="A shallow network: the first block always runs. Long runs of reuse drift; set max_run.",
)
_add(
    "dbcache",
    FeatureCache(FirstBlock(threshold=0.08, blocks=8), Stack(), Hold(), Guard(warmup=8, last=0)),
    summary="First Block Cache with the first 8 blocks as the probe.",
    source="DBCache F8B0 (cache-dit) and its defaults",
    avoid="Fewer than about 16 blocks, where the probe is most of the network, and fewer than about 16 steps.",
)
_add(
    "teacache",
    FeatureCache(ModulatedInput(threshold=0.25), Stack(), Hold(), Guard(warmup=1, last=1)),
    {"gate": ModulatedInput(threshold=0.25, bounded=False)},
    summary="Compute where the changes of the timestep-modulated input, through a fitted polynomial, have added up.",
    source="TeaCache (arXiv 2411.19108)",
    avoid="Uncalibrated: the polynomial is fitted per model and number of steps; without a fit the changes count as "
    "they are, and the threshold means something else.",
)
_add(
    "magcache",
    FeatureCache(Magnitude(threshold=0.06), Stack(), Hold(), Guard(warmup=0.2, last=0, max_run=3)),
    {"guard": Guard(warmup=0.2, last=0, max_run=3, rounding="nearest")},
    summary="Compute where the magnitude of the residual has drifted, by ratios measured beforehand.",
    source="MagCache (NeurIPS 2025); diffusers' MagCache and its defaults",
    avoid="Uncalibrated: without measured ratios they are estimated from two computed steps, which is our own rule.",
)
_add(
    "easycache",
    FeatureCache(Easy(threshold=0.025), Output(residual=True), Hold(), Guard(warmup=5, last=1)),
    {"decide": "image"},  # the published code makes one video at a time, and its unconditional call follows the other
    summary="Compute where the output's change, predicted from the input's, has added up.",
    source="EasyCache (arXiv 2507.02860)",
    avoid="Fewer than about 15 steps: the first five and the last are always computed.",
)
_add(
    "taylorseer",
    FeatureCache(Interval(interval=5, phase=4), Stack(), Newton(order=1), Guard(warmup=3, last=0)),
    {"scope": Module(), "predictor": Taylor(order=1, axis="step")},
    summary="Compute every fifth step and extrapolate between; as published, every module's output on its own.",
    source="TaylorSeer (arXiv 2503.06923); diffusers' TaylorSeerCache and its defaults",
    avoid="Fewer than about 20 steps: five are a long way to extrapolate. The published form holds two tensors per "
    "module.",
)
_add(
    "adacache",
    FeatureCache(Codebook("fast"), Stack(), Hold(), Guard(warmup=1, last=2)),
    summary="At computed steps the change of the middle block sets after how many steps to compute again.",
    source="AdaCache (arXiv 2411.02397), without motion regularisation",
    avoid="Uncalibrated: the codebook is that of one video model at 30 steps.",
)
_add(
    "ab_cache",
    FeatureCache(Interval(interval=2), Output(), Newton(order=1, reach=2.0), Guard(warmup=3, last=1)),
    {"predictor": AdamsBashforth(order=1)},
    summary="Compute every second step and extrapolate the network's output linearly.",
    source="AB-Cache (arXiv 2504.10540), from its abstract; interval and warm-up are ours",
    avoid="Samplers that add noise. Against a solver of higher order with half the steps it has little to offer.",
)
_add(
    "adaptive_diffusion",
    FeatureCache(ThirdDifference(threshold=0.01), Output(), Hold(), Guard(warmup=4, last=0, max_run=4)),
    summary="Compute where the latents' path bends: where its third difference is large.",
    source="AdaptiveDiffusion (arXiv 2410.09873)",
    avoid="Samplers that add noise, and shifted grids, which bend by themselves (per_time=true).",
)
_add(
    "mask",
    FeatureCache(Mask("medium"), Stack(), Hold(), Guard(warmup=1, last=1)),
    summary="Compute the steps that a mask names, many at first.",
    source="step computation masks (cache-dit), stretched to any number of steps",
    avoid="Where images differ: a mask treats all alike. In return nothing is measured and nothing waits.",
)


def cache_preset(name: str, *, parity: bool = False, **options: Any) -> FeatureCache:
    """A published cache.

    Args:
        name: `fbcache`, `dbcache`, `teacache`, `magcache`, `easycache`, `taylorseer`, `adacache`, `ab_cache`,
            `adaptive_diffusion` or `mask`.
        parity: as published, rather than deciding per image and forecasting on the true times.
        options: fields of its parts, such as `threshold=0.1` or `max_run=2`, or the parts themselves. A published
            polynomial of TeaCache, such as `coefficients="flux"`, brings its threshold and guard with it.

    Raises:
        ValueError: an unknown name, or a value out of range.
        TypeError: an option that no part of it has.
    """
    if name not in CACHE_PRESETS:
        raise ValueError(f"cache must be one of {', '.join(CACHE_PRESETS)}, got {name!r}")
    preset = CACHE_PRESETS[name].parity if parity else CACHE_PRESETS[name].cache
    return FeatureCache(**(_parts(preset) | _with_fit(preset, options) | options))


def _with_fit(preset: FeatureCache, options: dict[str, Any]) -> dict[str, Any]:
    """Threshold and guard that belong to the published fit which the options name, if they do."""
    fit = PUBLISHED.get(str(options.get("coefficients")))
    if fit is None or not isinstance(preset.gate, ModulatedInput) or {"gate", "guard"} & set(options):
        return {}
    return {"threshold": min(fit.speedups), "warmup": fit.warmup, "last": fit.last}
