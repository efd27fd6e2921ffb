"""TeaCache (arXiv 2411.19108)."""

from flowaccel.caching.presets import CachePreset

PRESET = CachePreset(
    name="teacache",
    summary=("Compute where the changes of the timestep-modulated input, through a fitted polynomial, have added up."),
    source="TeaCache (arXiv 2411.19108)",
    avoid=(
        "Uncalibrated: the polynomial is fitted per model and number of steps; without a fit the changes "
        "count as they are, and the threshold means something else."
    ),
    gate={"name": "modulated_input", "threshold": 0.25},
    scope={"name": "stack"},
    predictor={"name": "hold"},
    guard={"name": "guard", "warmup": 1, "last": 1},
    parity={"gate": {"name": "modulated_input", "threshold": 0.25, "bounded": False}},
    fitted_options="flowaccel.caching.gates.teacache_fits:options_of_fit",
    fit="flowaccel.caching.fit.methods:TEACACHE",
)
