"""Feature caches: skip network calls, or parts of them, and reuse or extrapolate earlier results.

A cache is gate x scope x predictor x guard; a published method is a file in `presets`.
"""

from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.recipe.registry import Method, Preset

LEVELS: dict[str, float] = {"safe": 1.3, "balanced": 1.8, "fast": 2.5}
"""Target speed-ups of the presets: network calls over computed network calls."""

METHOD = Method(
    accelerators={
        "feature_cache": "flowaccel.caching.feature_cache:FeatureCache",
        "level_cache": "flowaccel.caching.level_cache:LevelCache",
    },
    presets={
        **{
            name: Preset(
                summary=preset.summary,
                source=preset.source,
                make="flowaccel.caching.feature_cache:cache_preset",
                arguments={"name": name},
            )
            for name, preset in CACHE_PRESETS.items()
        },
        **{
            name: Preset(
                summary=f"A cache calibrated for model and steps, {speedup}x fewer computed calls; or a generic one.",
                make="flowaccel.caching.level_cache:LevelCache",
                arguments={"level": name},
                options=False,
            )
            for name, speedup in LEVELS.items()
        },
    },
    former={"step_skip": "flowaccel.caching.former:feature_cache_of_step_skip"},
    fit={name: preset.fit for name, preset in CACHE_PRESETS.items() if preset.fit is not None},
)
