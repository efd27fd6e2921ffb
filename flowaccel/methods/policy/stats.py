"""Statistics of the paths on which a policy led the images of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowaccel.hooks import CallRecord, CallStats

NAME = "learned_policy"
"""Name of the accelerator in recipes, and of its stats."""
_MANY = 16
ImagePath = tuple[tuple[float, bool, int], ...]
"""Path of an image: its timesteps, whether its blocks were computed there, and the level of sparse attention."""


@dataclass
class PathStats(CallStats):
    """Paths of a policy's images in a network call."""

    record: CallRecord = field(repr=False, compare=False)
    """Record of the call; which images were computed is known once it has ended."""
    sparsity: tuple[int, ...] = ()
    """Level of sparse attention per image, 0 for dense; empty where the policy does not set it."""

    @classmethod
    def notes(cls, stats: Sequence[PathStats]) -> list[str]:
        """Return the path of every image; of many, only the numbers of steps."""
        paths = paths_of(stats)
        if not paths:
            return []
        steps = [len(path) for path in paths]
        computed = [sum(ran for _, ran, _ in path) for path in paths]
        if len(paths) > _MANY:
            means = f"{sum(steps) / len(steps):.1f} steps on average, {sum(computed) / len(computed):.1f} computed"
            return [f"{min(steps)} to {max(steps)} steps an image, {means}."]
        return [
            f"image {image}: {len(path)} steps, {computed[image]} computed: "
            + " ".join(f"{time:.0f}{_mark(ran, level)}" for time, ran, level in path)
            for image, path in enumerate(paths)
        ]


def paths_of(stats: Sequence[PathStats]) -> tuple[ImagePath, ...]:
    """Return the path of every image; empty where the policy did not choose their times."""
    steps: dict[int, list[tuple[float | None, bool, int]]] = {}
    for found in stats:
        record = found.record
        if not record.times:
            continue
        ran = record.computed or (True,) * len(record.times)
        here = list(zip(record.times, ran, found.sparsity or (0,) * len(record.times), strict=True))
        before = steps.get(record.step)
        steps[record.step] = (
            here
            if before is None
            else [(time, was or is_, level) for (time, was, level), (_, is_, _) in zip(before, here, strict=True)]
        )
    images = zip(*steps.values(), strict=True)
    return tuple(tuple((time, *what) for time, *what in image if time is not None) for image in images)


def _mark(ran: bool, level: int) -> str:
    if not ran:
        return "r"
    return f"s{level}" if level else ""
