"""AB-Cache (arXiv 2504.10540)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="ab_cache",
    summary="Compute every second step and extrapolate the network's output linearly.",
    source="AB-Cache (arXiv 2504.10540), from its abstract; interval and warm-up are ours",
    avoid=("Samplers that add noise. Against a solver of higher order with half the steps it has little to offer."),
    gate={"name": "interval", "interval": 2},
    scope={"name": "output"},
    predictor={"name": "newton", "order": 1, "reach": 2.0},
    guard={"name": "guard", "warmup": 3, "last": 1},
    parity={"predictor": {"name": "adams_bashforth", "order": 1}},
    fit="flowaccel.caching.fit.methods:AB_CACHE",
)
