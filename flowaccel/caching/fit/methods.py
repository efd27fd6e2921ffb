"""Calibration methods: the signals that each records in a run, and the gate that it fits to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowaccel.caching.fit.observe import Seen, Trace, Watch, some_numbers
from flowaccel.caching.fit.search import least, replay, speedup
from flowaccel.caching.gates import Codebook, Easy, Gate, Magnitude, Mask, ModulatedInput
from flowaccel.caching.gates.base import relative_change
from flowaccel.caching.gates.magnitude import magnitudes
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Hold, Newton, Predictor
from flowaccel.caching.scopes import Output, Scope, Stack

DEGREE = 4
"""Degree of TeaCache's polynomial."""
REUSES = (6, 5, 4, 3, 2, 1)
"""Numbers of steps after which AdaCache computes again, from the least change to the greatest (the published 30-step
book)."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A gate for every threshold, and the quality of the fit behind it."""

    gate: Callable[[float], Gate]
    """Builds the gate for a threshold; for a codebook, for a factor of its bounds."""
    seen: Callable[[int], Seen]
    """Returns the signal and feedback that the gate would have read at an evaluation."""
    r_squared: float | None = None
    """Coefficient of determination of the fit, at most 1."""
    fitted_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """A method that fits a cache to recorded runs."""

    name: str
    watch: Watch
    guard: Guard
    """The published guard."""
    predictor: Predictor
    fit: Callable[[Trace], Fit] | None
    """Fits the gate; None if the computed steps are spread evenly, and nothing is fitted."""

    @property
    def scope(self) -> Scope:
        """Scope of the cache."""
        return self.watch.scope

    def choose(self, trace: Trace, guard: Guard, target: float) -> tuple[Gate, Fit | None, float]:
        """Return the gate that reaches a target in computed network calls, its fit, and the predicted speed-up.

        Raises:
            ValueError: the target is out of reach under the guard, or there is nothing to fit to.
        """
        allowed = f"{self.name} with {guard} at {trace.steps} evaluations"
        if self.fit is None:
            gate: Gate = spread(trace.steps, guard, target, allowed)
            return gate, None, speedup(replay(gate, guard, trace, lambda index: Seen(None, None)))
        fit = self.fit(trace)

        def speed(threshold: float) -> float:
            return speedup(replay(fit.gate(threshold), guard, trace, fit.seen))

        threshold = least(speed, target, allowed)
        return fit.gate(threshold), fit, speed(threshold)


# -- teacache


def _changes(now: Seen, before: Seen | None) -> dict[str, Tensor]:
    """Return the relative L1 changes since the previous step, 0 at the first."""
    assert now.signal is not None and now.feedback is not None
    if before is None:
        zeros = torch.zeros(len(now.signal))
        return {"input_change": zeros, "output_change": zeros}
    assert before.signal is not None and before.feedback is not None
    return {
        "input_change": relative_change(now.signal, before.signal),
        "output_change": relative_change(now.feedback, before.feedback),
    }


def _fit_teacache(trace: Trace) -> Fit:
    followed = _followed(trace)
    x = trace.kept["input_change"][:, followed].flatten().double().numpy()
    y = trace.kept["output_change"][:, followed].flatten().double().numpy()
    finite = np.isfinite(x) & np.isfinite(y)
    coefficients, r_squared = polynomial(x[finite], y[finite])
    low, high = float(x[finite].min()), float(x[finite].max())
    fitted_range = (low, high) if low < high else None
    path = as_path(trace.kept["input_change"])
    return Fit(
        gate=lambda threshold: ModulatedInput(threshold, coefficients, fitted_range),
        seen=lambda index: Seen(path[:, index, None], None),
        r_squared=r_squared,
        fitted_range=fitted_range,
    )


def polynomial(x: Any, y: Any) -> tuple[tuple[float, ...], float]:
    """Fit a least-squares polynomial of degree 4; returns its coefficients, highest power first, and R^2.

    The degree is lower if there are too few distinct x.

    Args:
        x: (n,) float array.
        y: (n,) float array.

    Raises:
        ValueError: no points.
    """
    if not len(x):
        raise ValueError("nothing to fit to: no change was finite")
    scale = float(np.abs(x).max()) or 1.0
    x = x / scale  # powers of numbers around 0.1 are nearly parallel
    degree = min(DEGREE, len(np.unique(x.round(6))) - 1)
    scaled = np.polyfit(x, y, degree)
    coefficients = scaled / scale ** np.arange(degree, -1, -1)
    residual, total = float(((np.polyval(scaled, x) - y) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return tuple(map(float, coefficients)), 1 - residual / total if total else 1.0


def as_path(changes: Tensor) -> Tensor:
    """Return a sequence with the given relative changes from one number to the next, (images, evaluations) float32.

    It replaces the recorded signal of a gate that reads only relative changes.
    """
    return (1 + changes.double()).cumprod(dim=1).float()


def _followed(trace: Trace) -> list[int]:
    """Return the indices of the evaluations that follow one of the same network."""
    first = {network: trace.networks.index(network) for network in trace.networks}
    return [index for index, network in enumerate(trace.networks) if index != first[network]]


# -- magcache


def _ratios(now: Seen, before: Seen | None) -> dict[str, Tensor]:
    assert now.feedback is not None
    if before is None:
        return {"ratio": torch.ones(len(now.feedback))}
    assert before.feedback is not None
    return {"ratio": (magnitudes(now.feedback) / magnitudes(before.feedback)).mean(dim=1)}


def _fit_magcache(trace: Trace) -> Fit:
    measured = trace.kept["ratio"].double()
    mean = measured.mean(dim=0)
    total = (measured - measured.mean()).square().sum()
    explained = 1 - float((measured - mean).square().sum() / total) if total else 1.0
    ratios = tuple(float(f"{value:.6g}") for value in mean.tolist())
    return Fit(
        gate=lambda threshold: Magnitude(threshold, ratios),
        seen=lambda index: Seen(None, None),
        r_squared=explained,
        fitted_range=(float(measured.min()), float(measured.max())),
    )


# -- adacache


def _middle(now: Seen, before: Seen | None) -> dict[str, Tensor]:
    assert now.feedback is not None
    change = torch.zeros(len(now.feedback))
    if before is not None:
        assert before.feedback is not None
        change = relative_change(now.feedback, before.feedback)
    return {"middle_change": change, "middle": some_numbers(now.feedback)}


def _fit_adacache(trace: Trace) -> Fit:
    changes = trace.kept["middle_change"][:, _followed(trace)].flatten().double()
    changes = changes[changes.isfinite() & (changes > 0)]
    if not len(changes):
        raise ValueError("nothing to fit to: the middle block's residual does not change from step to step")
    shares = torch.arange(1, len(REUSES) + 1, dtype=torch.float64) / len(REUSES)
    bounds = changes.quantile(shares).unique().tolist()  # rising; as many as differ
    middle = trace.kept["middle"]
    return Fit(
        gate=lambda factor: Codebook(tuple(zip((b * factor for b in bounds), REUSES[-len(bounds) :], strict=True))),
        seen=lambda index: Seen(None, middle[:, index]),
        fitted_range=(float(changes.min()), float(changes.max())),
    )


# -- easycache


def _ends(now: Seen, before: Seen | None) -> dict[str, Tensor]:
    assert now.signal is not None and now.feedback is not None
    return {"input": some_numbers(now.signal), "output": some_numbers(now.feedback)}


def _fit_easycache(trace: Trace) -> Fit:
    inputs, outputs = trace.kept["input"], trace.kept["output"]
    return Fit(gate=Easy, seen=lambda index: Seen(inputs[:, index], outputs[:, index]))


# -- ab_cache


def spread(steps: int, guard: Guard, target: float, allowed: str) -> Mask:
    """Return a mask that reuses as few evaluations as reach the target, spread evenly.

    The evaluations that the guard forces are computed.

    Raises:
        ValueError: the target is out of reach.
    """
    free = [index for index in range(steps) if not guard.forces(index, steps)]
    run = len(free) if guard.max_run is None else guard.max_run
    reused = steps - int(steps / target + 1e-9)
    most = len(free) - len(free) // (run + 1)
    if reused > most:
        raise ValueError(
            f"a speed-up of {target:g} in computed network calls is out of reach: {allowed} allows "
            f"{steps / (steps - most):.2f} at most; aim lower, let fewer steps be forced (--warmup, --last), or take "
            "more steps"
        )
    mask = [1] * steps
    for place in range(reused):
        mask[free[int((place + 0.5) * len(free) / reused)]] = 0
    return Mask(mask)


TEACACHE = Calibrator(
    name="teacache",
    watch=Watch(signal="modulated_input", feedback="output", scope=Stack(), measure=_changes),
    guard=Guard(warmup=1, last=1),
    predictor=Hold(),
    fit=_fit_teacache,
)
MAGCACHE = Calibrator(
    name="magcache",
    watch=Watch(signal="none", feedback="feature", scope=Stack(), measure=_ratios),
    guard=Guard(warmup=0.2, last=0, max_run=3),
    predictor=Hold(),
    fit=_fit_magcache,
)
ADACACHE = Calibrator(
    name="adacache",
    watch=Watch(signal="none", feedback="middle_block", scope=Stack(), measure=_middle),
    guard=Guard(warmup=1, last=2),
    predictor=Hold(),
    fit=_fit_adacache,
)
EASYCACHE = Calibrator(
    name="easycache",
    watch=Watch(signal="input", feedback="output", scope=Output(residual=True), measure=_ends),
    guard=Guard(warmup=0.2, last=1),
    predictor=Hold(),
    fit=_fit_easycache,
)
AB_CACHE = Calibrator(
    name="ab_cache",
    watch=Watch(signal="none", feedback="output", scope=Output(), measure=lambda now, before: {}),
    guard=Guard(warmup=3, last=1),
    predictor=Newton(order=1, reach=2.0),
    fit=None,
)
