"""DBCache (cache-dit)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="dbcache",
    summary="First Block Cache with the first 8 blocks as the probe.",
    source="DBCache F8B0 (cache-dit) and its defaults",
    avoid=("Fewer than about 16 blocks, where the probe is most of the network, and fewer than about 16 steps."),
    gate={"name": "first_block", "threshold": 0.08, "blocks": 8},
    scope={"name": "stack"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 8, "last": 0},
)
