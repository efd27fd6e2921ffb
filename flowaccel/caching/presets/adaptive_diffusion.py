"""AdaptiveDiffusion's step skipping (arXiv 2410.09873)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="adaptive_diffusion",
    summary="Compute where the latents' path bends: where its third difference is large.",
    source="AdaptiveDiffusion (arXiv 2410.09873)",
    avoid="Samplers that add noise, and shifted grids, which bend by themselves (per_time=true).",
    gate={"name": "third_difference", "threshold": 0.01},
    scope={"name": "output"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 4, "last": 0, "max_run": 4},
)
