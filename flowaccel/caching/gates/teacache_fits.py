"""Published polynomials of TeaCache, each with what it was fitted to and how it is meant to be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowaccel.caching.gates.base import Signal


@dataclass(frozen=True, kw_only=True)
class PublishedFit:
    """A published polynomial of a checkpoint."""

    coefficients: tuple[float, ...]
    """Coefficients of the polynomial, highest power first."""
    changes: tuple[float, float]
    """Relative changes for which the polynomial is positive and below 1.2, up to where it turns away from the data.
    Read off the polynomial, because the fitted range was not published."""
    speedups: dict[float, float | None]
    """Published thresholds in order of savings, with the measured speed-ups, if any."""
    signal: Signal = "modulated_input"
    """Signal whose changes the polynomial was fitted to."""
    warmup: int = 1
    """Number of first steps that are always computed."""
    last: int = 1
    """Number of last steps that are always computed."""
    steps: int = 50
    """Number of steps of the runs that they were published for."""
    source: str
    """Place of publication; all are under the Apache licence."""


_TEACACHE = "github.com/ali-vilab/TeaCache"

PUBLISHED: dict[str, PublishedFit] = {
    "flux": PublishedFit(
        coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        changes=(0.02, 0.3),
        speedups={0.25: 1.5, 0.4: 1.8, 0.6: 2.0, 0.8: 2.25},
        steps=28,
        source=f"{_TEACACHE}, TeaCache4FLUX",
    ),
    "flux-kontext": PublishedFit(
        coefficients=(-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863),
        changes=(0.01, 0.18),
        speedups={0.22: 2.0},
        steps=20,
        source="github.com/welltop-cn/ComfyUI-TeaCache",
    ),
    "hunyuan-video": PublishedFit(
        coefficients=(733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
        changes=(0.01, 0.3),
        speedups={0.1: 1.6, 0.15: 2.1},
        source=f"{_TEACACHE}, TeaCache4HunyuanVideo",
    ),
    "ltx-video": PublishedFit(
        coefficients=(21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
        changes=(0.005, 0.4),
        speedups={0.03: 1.6, 0.05: 2.1},
        source=f"{_TEACACHE}, TeaCache4LTX-Video",
    ),
    "mochi": PublishedFit(
        coefficients=(-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
        changes=(0.005, 0.1),
        speedups={0.06: 1.5, 0.09: 2.1},
        steps=64,
        source=f"{_TEACACHE}, TeaCache4Mochi",
    ),
    "cogvideox-2b": PublishedFit(
        coefficients=(-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
        changes=(0.005, 0.4),
        speedups={0.1: None, 0.2: None},
        source=f"{_TEACACHE}, eval/teacache/experiments/cogvideox.py",
        signal="time_embedding",
    ),
    "cogvideox-5b": PublishedFit(
        coefficients=(-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
        changes=(0.01, 0.25),
        speedups={0.1: 1.6, 0.15: 2.1, 0.2: 2.5},
        source=f"{_TEACACHE}, TeaCache4ConsisID and eval/teacache/experiments/cogvideox.py",
        signal="time_embedding",
    ),
    "cogvideox1.5-5b": PublishedFit(
        coefficients=(250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
        changes=(0.005, 0.35),
        speedups={0.1: 1.4, 0.2: 1.8, 0.3: 2.3},
        source=f"{_TEACACHE}, TeaCache4CogVideoX1.5",
        signal="time_embedding",
    ),
    "cogvideox1.5-5b-i2v": PublishedFit(
        coefficients=(122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
        changes=(0.005, 0.4),
        speedups={0.1: 1.5, 0.2: 2.0, 0.3: 2.3},
        source=f"{_TEACACHE}, TeaCache4CogVideoX1.5",
        signal="time_embedding",
    ),
    "wan2.1-t2v-1.3b": PublishedFit(
        coefficients=(2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
        changes=(0.02, 0.12),
        speedups={0.05: 1.5, 0.07: 1.6, 0.08: 2.0},
        source=f"{_TEACACHE}, TeaCache4Wan2.1",
        signal="time_embedding",
    ),
    "wan2.1-t2v-14b": PublishedFit(
        coefficients=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
        changes=(0.14, 0.3),
        speedups={0.14: 1.4, 0.15: 1.8, 0.2: 2.0},
        source=f"{_TEACACHE}, TeaCache4Wan2.1",
        signal="time_embedding",
    ),
    "wan2.1-i2v-480p": PublishedFit(
        coefficients=(-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
        changes=(0.06, 0.34),
        speedups={0.13: 1.6, 0.19: 2.0, 0.26: 2.5},
        steps=40,
        source=f"{_TEACACHE}, TeaCache4Wan2.1",
        signal="time_embedding",
    ),
    "wan2.1-i2v-720p": PublishedFit(
        coefficients=(-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
        changes=(0.06, 0.27),
        speedups={0.18: 1.7, 0.2: 1.9, 0.3: 2.4},
        steps=40,
        source=f"{_TEACACHE}, TeaCache4Wan2.1",
        signal="time_embedding",
    ),
    "wan2.1-t2v-1.3b-ret": PublishedFit(
        coefficients=(-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
        changes=(0.005, 0.08),
        speedups={0.05: 1.6, 0.1: 2.4},
        source=f"{_TEACACHE}, TeaCache4Wan2.1, --use_ret_steps",
        signal="time_projection",
        warmup=5,
        last=0,
    ),
    "wan2.1-t2v-14b-ret": PublishedFit(
        coefficients=(-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
        changes=(0.01, 0.07),
        speedups={0.1: 2.0, 0.2: 3.2},
        source=f"{_TEACACHE}, TeaCache4Wan2.1, --use_ret_steps",
        signal="time_projection",
        warmup=5,
        last=0,
    ),
    "wan2.1-i2v-480p-ret": PublishedFit(
        coefficients=(257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
        changes=(0.005, 0.035),
        speedups={0.2: 1.8, 0.3: 2.3},
        steps=40,
        source=f"{_TEACACHE}, TeaCache4Wan2.1, --use_ret_steps",
        signal="time_projection",
        warmup=5,
        last=0,
    ),
    "wan2.1-i2v-720p-ret": PublishedFit(
        coefficients=(8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
        changes=(0.005, 0.08),
        speedups={0.2: 2.1, 0.3: 2.7},
        steps=40,
        source=f"{_TEACACHE}, TeaCache4Wan2.1, --use_ret_steps",
        signal="time_projection",
        warmup=5,
        last=0,
    ),
}
"""Published fits by name, each for one checkpoint."""

UNUSABLE: dict[str, str] = {
    "cosmos": "it was fitted to the modulated input without the positions that the blocks add to the tokens, and "
    "diffusers' CosmosTransformerBlock adds these before it modulates",
    "lumina2": "it was fitted to the modulated input of the main blocks, text and image together, and diffusers' "
    "Lumina2Transformer2DModel runs its refiners before them",
    "hidream": "it was fitted to the time embedding before the text is added to it, and the blocks of "
    "HiDreamImageTransformer2DModel are not known",
}
"""Published fits whose signal is not available, with the reason."""


def options_of_fit(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the threshold and guard of the published polynomial that `options` name, if they name one."""
    fit = PUBLISHED.get(str(options.get("coefficients")))
    if fit is None or {"gate", "guard"} & set(options):
        return {}
    return {"threshold": min(fit.speedups), "warmup": fit.warmup, "last": fit.last}
