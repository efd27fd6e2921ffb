"""First Block Cache (ParaAttention)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="fbcache",
    summary="Compute where the residual of the first block has moved since the last computed step.",
    source="First Block Cache (ParaAttention); diffusers' FirstBlockCache and its default threshold",
    avoid="A shallow network: the first block always runs. Long runs of reuse drift; set max_run.",
    gate={"name": "first_block", "threshold": 0.05},
    scope={"name": "stack"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 1, "last": 0},
)
