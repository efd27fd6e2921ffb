"""Accelerator that skips the unconditional prediction for images that no longer need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flowaccel.caching.predictors import Hold, Newton, Predictor
from flowaccel.hooks import Pipeline, session_of
from flowaccel.methods.guidance.runtime import Guiding
from flowaccel.methods.guidance.when import WHENS, AdaptiveGuidance, When
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.parts import chosen_part, with_options
from flowaccel.recipe.serialization import component

Mode = Literal["drop", "hold", "extrapolate"]
_PREDICTORS: dict[str, Predictor | None] = {"drop": None, "hold": Hold(), "extrapolate": Newton(order=1)}


@dataclass(frozen=True, init=False)
class GuidanceSkip(Accelerator):
    """Accelerator that skips classifier-free guidance, image by image, where it no longer matters.

    The unconditional rows of images that are not guided do not go through the network; where all images of a separate
    unconditional call are not guided, the call is not made. What the pipeline gets in their place makes its own
    guidance formula come out as `mode` says. Sources: Adaptive Guidance (arXiv 2312.12487), guidance interval (arXiv
    2404.07724).

    Args:
        when: `adaptive`, which measures when it ends, or `interval`, which is told; or such an object
            (`AdaptiveGuidance`, `GuidanceInterval`).
        mode: the difference of the conditional and the unconditional output where guidance is off: `drop`, none, so
            that the conditional output is left; `hold`, the last computed one; `extrapolate`, linear in the timestep
            through the last two computed ones. Before anything was computed all of them drop.
        options: fields of `when`: `threshold`, `space` and `warmup`, or `start` and `stop`.

    Raises:
        ValueError: an unknown name, or a value out of range.
        TypeError: an option that `when` does not have.
    """

    name: ClassVar[str] = "guidance_skip"

    when: When = component(WHENS)
    mode: Mode = "drop"

    def __init__(self, when: When | str = AdaptiveGuidance.name, mode: Mode = "drop", **options: Any) -> None:
        chosen = with_options({"when": chosen_part("when", when, WHENS)}, options)
        object.__setattr__(self, "when", chosen["when"])
        object.__setattr__(self, "mode", mode)
        if mode not in _PREDICTORS:
            raise ValueError(f"mode must be one of {', '.join(_PREDICTORS)}, got {mode!r}")

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, and whether this one depends on the time of a call."""
        timed = self.mode == "extrapolate" or getattr(self.when, "space", None) == "x0"
        return super().tags | {Tag.GUIDANCE} | ({Tag.LOOP_TIME} if timed else set())

    def attach(self, pipe: Pipeline) -> Detach:
        """Wrap the network's calls."""
        return Guiding(self.when, _PREDICTORS[self.mode], session_of(pipe)).attach()
