"""Search for the threshold that reaches a target, by replaying recorded signals through the real gate and guard."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowaccel.caching.decisions import Decider
from flowaccel.caching.fit.observe import Seen, Trace
from flowaccel.caching.gates import Gate
from flowaccel.caching.guard import Guard

_LEAST, _MOST, _HALVINGS = 1e-6, 1e9, 40


def replay(gate: Gate, guard: Guard, trace: Trace, seen: Callable[[int], Seen]) -> Tensor:
    """Return which evaluations would be computed for recorded signals, (images, evaluations) bool, on the CPU.

    Reuse changes the later signals, so a real run deviates as far as its signals deviate from the recorded ones.

    Args:
        gate: the gate.
        guard: the guard.
        trace: the run.
        seen: returns the signal and feedback of an evaluation.
    """
    deciders: dict[str, Decider] = {}
    computed = []
    for index in range(trace.steps):
        decider = deciders.setdefault(trace.networks[index], Decider(gate=gate, guard=guard))
        signal, feedback = seen(index)
        step = trace.step(index)
        decision = decider.decide(trace.images, signal, step)
        decider.update(signal, feedback if any(decision.compute) else None, decision, step)
        computed.append(decision.mask.expand(trace.images))
    return torch.stack(computed, dim=1)


def speedup(computed: Tensor) -> float:
    """Return network calls over computed network calls, from (images, evaluations) bool."""
    return computed.numel() / int(computed.sum())


def least(speed: Callable[[float], float], target: float, allowed: str) -> float:
    """Return the least value, to three digits, at which `speed` reaches the target.

    Args:
        speed: speed-up at a threshold; it rises, though not strictly.
        target: above 1.
        allowed: description of what limits it, for the message.

    Raises:
        ValueError: it is never reached; the message states the maximum.
    """
    most = speed(_MOST)
    if most < target:
        raise ValueError(
            f"a speed-up of {target:g} in computed network calls is out of reach: {allowed} allows {most:.2f} at most; "
            "aim lower, let fewer steps be forced (--warmup, --last) or longer runs of reuse (--max-run), or take more "
            "steps"
        )
    high = _LEAST
    while speed(high) < target:
        high = min(2 * high, _MOST)
    low = high / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if speed(middle) >= target else (middle, high)
    # Rounded upwards: the bound itself is an image's score, which rounding errors may put on either side.
    unit = 10.0 ** (math.floor(math.log10(high)) - 2)
    rounded = float(f"{math.ceil(high / unit) * unit:.3g}")
    return rounded if speed(rounded) >= target else high
