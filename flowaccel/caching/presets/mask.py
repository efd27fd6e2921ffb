"""Step computation masks (cache-dit)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="mask",
    summary="Compute the steps that a mask names, many at first.",
    source="step computation masks (cache-dit), stretched to any number of steps",
    avoid="Where images differ: a mask treats all alike. In return nothing is measured and nothing waits.",
    gate={"name": "mask", "mask": "medium"},
    scope={"name": "stack"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 1, "last": 1},
)
