"""AdaptiveDiffusion's step skipping (arXiv 2410.09873)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flowaccel.accelerators.base import Accelerator, Detach
from flowaccel.accelerators.caching import Guard, Output
from flowaccel.accelerators.caching.decisions import Unit
from flowaccel.accelerators.feature_cache import FeatureCache
from flowaccel.accelerators.serial import component
from flowaccel.gates import ThirdDifference
from flowaccel.predictors import PREDICTORS, Hold, Predictor


@dataclass(frozen=True)
class StepSkip(Accelerator):
    """Skip network calls where the latents' path is straight; a `FeatureCache` at output scope under the paper's name.

    The scheduler steps at every timestep, with the last computed prediction.

    Args:
        threshold: compute from this relative third difference on (published: 0.01 for SD and SDXL at 50 steps, 0.008
            for video).
        mode: `scalar`, as the released code; `vector`, the paper's norm.
        max_run: the most steps skipped in a row.
        per_time: divide the latents' steps by their times, for uneven grids.
        predictor: what stands for a skipped prediction; `Newton()` extrapolates instead.
        decide: `image`, `row` or `batch`.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "step_skip"

    threshold: float = 0.01
    mode: Literal["scalar", "vector"] = "scalar"
    max_run: int = 4
    per_time: bool = False
    predictor: Predictor = component(PREDICTORS, default=Hold())
    decide: Unit = "image"

    def __post_init__(self) -> None:
        _ = self.cache

    @property
    def cache(self) -> FeatureCache:
        """The same as a `FeatureCache`."""
        gate = ThirdDifference(self.threshold, self.mode, self.per_time)
        return FeatureCache(gate, Output(), self.predictor, Guard(warmup=4, last=0, max_run=self.max_run), self.decide)

    @property
    def tags(self) -> frozenset[str]:
        """Those of every accelerator, and of a cache that decides so."""
        return super().tags | (self.cache.tags - {FeatureCache.name})

    def attach(self, pipe: Any) -> Detach:
        """Surround the network's calls."""
        return self.cache.attach(pipe)
