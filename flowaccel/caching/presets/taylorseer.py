"""TaylorSeer (arXiv 2503.06923)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="taylorseer",
    summary=("Compute every fifth step and extrapolate between; as published, every module's output on its own."),
    source="TaylorSeer (arXiv 2503.06923); diffusers' TaylorSeerCache and its defaults",
    avoid=(
        "Fewer than about 20 steps: five are a long way to extrapolate. The published form holds two tensors "
        "per module."
    ),
    gate={"name": "interval", "interval": 5, "phase": 4},
    scope={"name": "stack"},
    predictor={"name": "newton", "order": 1},
    guard={"name": "guard", "warmup": 3, "last": 0},
    parity={"scope": {"name": "module"}, "predictor": {"name": "taylor", "order": 1, "axis": "step"}},
)
