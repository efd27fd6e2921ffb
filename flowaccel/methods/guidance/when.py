"""Rules for the evaluations of a run at which an image is guided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flowaccel.checks import is_number, is_whole

Space = Literal["v", "x0"]


@dataclass(frozen=True)
class AdaptiveGuidance:
    """Guide an image until its two predictions point the same way (Adaptive Guidance, arXiv 2312.12487).

    Once the cosine between the conditional and the unconditional prediction of an image reaches `threshold`, it is not
    guided any more from the next evaluation to the end of the run.

    Args:
        threshold: the cosine, above -1 and at most 1, which never ends guidance (published: 0.991).
        space: of what the cosine is taken: `v`, the network's output, or `x0`, the clean sample that it predicts. The
            outputs of networks that predict noise are alike from the first step on: use `x0` for these.
        warmup: evaluations that are guided whatever the cosine, at least 2.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "adaptive"

    threshold: float = 0.991
    space: Space = "v"
    warmup: int = 2

    def __post_init__(self) -> None:
        if not is_number(self.threshold, -1, 1) or self.threshold == -1:
            raise ValueError(
                "threshold must be a cosine, above -1 and at most 1 (which never ends guidance), "
                f"got {self.threshold!r}"
            )
        if self.space not in ("v", "x0"):
            raise ValueError(f"space must be 'v' or 'x0', got {self.space!r}")
        if not is_whole(self.warmup, 2):
            raise ValueError(f"warmup must be a whole number of evaluations, at least 2, got {self.warmup!r}")

    def compares(self, step: int, count: int) -> bool:
        """Whether the predictions of evaluation `step` of `count` may end guidance."""
        return self.threshold < 1 and self.warmup <= step + 1 < count


@dataclass(frozen=True)
class GuidanceInterval:
    """Guide all images in one part of the run (guidance interval, arXiv 2404.07724), as diffusers' guiders count it.

    Args:
        start: where guidance begins, as a part of the run: 0 is its first evaluation.
        stop: where it ends, above `start`: 0.5 guides the first half of the evaluations, rounded down, and 1 all.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "interval"

    start: float = 0.0
    stop: float = 0.5

    def __post_init__(self) -> None:
        if not (is_number(self.start, 0, 1) and is_number(self.stop, 0, 1) and self.start < self.stop):
            raise ValueError(
                "start and stop must be parts of the run with 0 <= start < stop <= 1, got "
                f"start={self.start!r}, stop={self.stop!r}"
            )

    def guides(self, step: int, count: int) -> bool:
        """Whether evaluation `step` of `count` is guided."""
        return _evaluations(self.start, count) <= step < _evaluations(self.stop, count)


def _evaluations(part: float, count: int) -> int:
    return int(part * count + 1e-6)  # 0.29 * 100 is a little less than 29


When = AdaptiveGuidance | GuidanceInterval
WHENS: dict[str, type[When]] = {kind.name: kind for kind in (AdaptiveGuidance, GuidanceInterval)}
