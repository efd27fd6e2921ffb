"""EasyCache (arXiv 2507.02860)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="easycache",
    summary="Compute where the output's change, predicted from the input's, has added up.",
    source="EasyCache (arXiv 2507.02860)",
    avoid="Fewer than about 15 steps: the first five and the last are always computed.",
    gate={"name": "easy", "threshold": 0.025},
    scope={"name": "output", "residual": True},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 5, "last": 1},
    parity={"decide": "image"},
    fit="flowaccel.caching.fit.methods:EASYCACHE",
)
