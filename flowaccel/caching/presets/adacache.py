"""AdaCache (arXiv 2411.02397)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="adacache",
    summary="At computed steps the change of the middle block sets after how many steps to compute again.",
    source="AdaCache (arXiv 2411.02397), without motion regularisation",
    avoid="Uncalibrated: the codebook is that of one video model at 30 steps.",
    gate={"name": "codebook", "codebook": "fast"},
    scope={"name": "stack"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 1, "last": 2},
    fit="flowaccel.caching.fit.methods:ADACACHE",
)
