"""MagCache (NeurIPS 2025)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="magcache",
    summary="Compute where the magnitude of the residual has drifted, by ratios measured beforehand.",
    source="MagCache (NeurIPS 2025); diffusers' MagCache and its defaults",
    avoid=("Uncalibrated: without measured ratios they are estimated from two computed steps, which is our own rule."),
    gate={"name": "magnitude", "threshold": 0.06},
    scope={"name": "stack"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 0.2, "last": 0, "max_run": 3},
    parity={"guard": {"name": "guard", "warmup": 0.2, "last": 0, "max_run": 3, "rounding": "nearest"}},
    fit="flowaccel.caching.fit.methods:MAGCACHE",
)
