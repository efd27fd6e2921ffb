"""Wall-clock comparison that survives a noisy machine: interleaved rounds and medians of per-round ratios.

One round calls every variant twice, in the order A B C ... C B A. A drift of the machine (another job, a clock that
steps down) that is linear over the round then costs every variant the same, because the mean position of its two
calls is the same. Ratios are taken inside a round, so what is left of the drift cancels as well. On two shared cores
the ratio of two *identical* functions was wrong by up to 80 % with sequential means and by under 1 % this way.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Variant = Callable[[], object]
Clock = Callable[[], float]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median of per-round time ratios (no unit, > 0) and its 95 % interval."""

    value: float
    ci95: tuple[float, float]
    """Percentile bootstrap over rounds. With fewer than 6 rounds even the full range of the rounds covers less than
    95 %, so such an interval is too narrow."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one variant; `seconds[i]` of all variants of one measurement belong to the same round."""

    seconds: tuple[float, ...]
    """One value per round: the mean of the two calls of that round."""
    first_call_s: float
    """The very first call, with compilation, autotuning and lazy allocation; not part of `seconds`."""

    @property
    def rounds(self) -> int:
        """Number of timed rounds."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return float(np.median(self.seconds))

    @property
    def p10(self) -> float:
        """10th percentile of the seconds of a call."""
        return float(np.percentile(self.seconds, 10))

    @property
    def p90(self) -> float:
        """90th percentile of the seconds of a call."""
        return float(np.percentile(self.seconds, 90))

    @property
    def throttled(self) -> bool:
        """Whether the last third of the rounds is more than 5 % slower than the first third (medians).

        Absolute times are then not worth quoting; ratios still are. Fewer than three rounds are never flagged.
        """
        third = self.rounds // 3
        return third > 0 and bool(np.median(self.seconds[-third:]) > 1.05 * np.median(self.seconds[:third]))

    def ratio_to(self, other: Timing, *, resamples: int = 2000, seed: int = 0) -> Ratio:
        """Return the ratio of this variant's time to `other`'s; `baseline.ratio_to(fast)` is the speed-up of `fast`.

        The interval is a percentile bootstrap: rounds are resampled with replacement and the median of their ratios is
        taken again. That is valid here, unlike for FID, because a median of ratios has no bias that resampling would
        add. The same seed gives the same interval.

        Raises:
            ValueError: the two timings have different numbers of rounds, so they are not from one measurement.
        """
        if self.rounds != other.rounds:
            raise ValueError(
                f"other has {other.rounds} rounds and this timing has {self.rounds}: ratios are taken round by round, "
                "so both must come from one call of measure_latency"
            )
        ratios = np.asarray(self.seconds) / np.asarray(other.seconds)
        picks = np.random.default_rng(seed).integers(0, self.rounds, size=(resamples, self.rounds))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        return Ratio(value=float(np.median(ratios)), ci95=(float(low), float(high)))


def measure_latency(
    variants: Mapping[str, Variant],
    *,
    rounds: int = 10,
    max_warmup: int = 5,
    agreement: float = 0.05,
    device: torch.device | str,
    clock: Clock = time.perf_counter,
    on_round: Callable[[int, int], None] | None = None,
    within: Mapping[str, Context] | None = None,
) -> dict[str, Timing]:
    """Time callables against each other; every call does one unit of work (divide by the batch yourself).

    Each variant is first called once (`first_call_s`). Warm-up rounds follow until two successive ones agree within
    `agreement` for every variant, `max_warmup` rounds at most; they take the same path as the timed rounds and are
    thrown away. Then come `rounds` timed rounds. Garbage collection is off inside a timed call only, and the device is
    synchronised at both of its ends.

    Args:
        variants: name to callable, in the order of the round; results are ignored.
        rounds: timed rounds, at least 2. Ten give an interval worth printing.
        max_warmup: most warm-up rounds, 0 for none.
        agreement: relative change between two warm-up rounds that counts as settled, > 0.
        device: device on which the work runs; CUDA and MPS are synchronised, others need nothing.
        clock: returns seconds; a test passes its own.
        on_round: called as `on_round(i, n)` after timed round i of n, i from 1, outside the timed region.
        within: by name, context that is entered before and left after every call of that variant, outside the timed
            region, since switching something on and off is not what is measured.

    Raises:
        ValueError: `variants` is empty, or a number is out of range. An exception of a variant passes through.
    """
    if not variants:
        raise ValueError("variants is empty: give at least one name and a callable without arguments")
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2 (10 for an interval worth printing), got {rounds}")
    if max_warmup < 0:
        raise ValueError(f"max_warmup must be 0 (no warm-up) or more, got {max_warmup}")
    if not agreement > 0:
        raise ValueError(f"agreement must be above 0, for example 0.05 for 5 %, got {agreement}")
    device = torch.device(device)

    contexts = {name: (within or {}).get(name, nullcontext) for name in variants}

    def one_round() -> dict[str, float]:
        return _one_round(variants, contexts, device, clock)

    first = {name: _timed_call(call, contexts[name], device, clock) for name, call in variants.items()}
    previous: dict[str, float] | None = None
    for _ in range(max_warmup):
        current = one_round()
        if previous is not None and _agree(previous, current, agreement):
            break
        previous = current

    collected: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        for name, seconds in one_round().items():
            collected[name].append(seconds)
        if on_round is not None:
            on_round(index + 1, rounds)
    return {name: Timing(seconds=tuple(collected[name]), first_call_s=first[name]) for name in variants}


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all queued work; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _one_round(
    variants: Mapping[str, Variant], contexts: Mapping[str, Context], device: torch.device, clock: Clock
) -> dict[str, float]:
    """Return the mean of the two calls of each variant, called in the order A B C ... C B A."""
    totals = dict.fromkeys(variants, 0.0)
    for name in (*variants, *reversed(list(variants))):
        totals[name] += _timed_call(variants[name], contexts[name], device, clock)
    return {name: total / 2 for name, total in totals.items()}


def _timed_call(call: Variant, context: Context, device: torch.device, clock: Clock) -> float:
    with context(), _no_garbage_collection():
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        return clock() - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _agree(previous: Mapping[str, float], current: Mapping[str, float], tolerance: float) -> bool:
    return all(abs(current[name] - previous[name]) <= tolerance * previous[name] for name in current)
