"""What a run with every step computed shows to a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowaccel.caching.gates import Gate, Step
from flowaccel.caching.gates.base import Feedback, Signal, State
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Hold
from flowaccel.caching.runtime import Rules
from flowaccel.caching.scopes import Scope, cache_of
from flowaccel.hooks import session_of
from flowaccel.training.sampling import Notify, Sampling

_NUMBERS = 2**14


class Seen(NamedTuple):
    """What a gate saw of one step."""

    signal: Tensor | None
    """(images, ...)"""
    feedback: Tensor | None
    """(images, ...)"""


Measure = Callable[[Seen, Seen | None], dict[str, Tensor]]
"""What to keep of a step, from it and the step before (None at the first one of a network): tensors (images, ...)."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What to look at: the signal and feedback of a gate in its scope."""

    signal: Signal
    feedback: Feedback
    scope: Scope
    measure: Measure


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was kept of all runs."""

    times: tuple[float, ...]
    """The scheduler's timestep at each evaluation."""
    networks: tuple[str, ...]
    """The network that was called at each evaluation."""
    images: int
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """(images, evaluations, ...) on the CPU."""

    @property
    def steps(self) -> int:
        """Evaluations of a run."""
        return len(self.times)

    def step(self, index: int) -> Step:
        """Where in the run evaluation `index` is."""
        return Step(index=index, count=self.steps, time=self.times[index])


class Recorder(Gate):
    """A gate that computes every step, and keeps what it sees."""

    name = "recorder"

    def __init__(self, watch: Watch) -> None:
        for name, value in (("signal", watch.signal), ("feedback", watch.feedback), ("watch", watch), ("kept", [])):
            object.__setattr__(self, name, value)

    watch: Watch
    kept: list[dict[str, Tensor]]
    """Of every evaluation of the present run, in order."""

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Infinite."""
        images = next(iter(state.values())).shape[0]
        return torch.full((images,), torch.inf), state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Keep this step, and remember it for the next."""
        now = Seen(signal, feedback)
        before = Seen(state.get("signal"), state.get("feedback")) if state else None
        self.kept.append({name: value.float().cpu() for name, value in self.watch.measure(now, before).items()})
        return {name: value for name, value in now._asdict().items() if value is not None}


def observe(
    pipe: Any, sampling: Sampling, watches: Sequence[Watch], notify: Notify = lambda *_: None
) -> tuple[Trace, Tensor]:
    """Sample with every step computed.

    Args:
        pipe: an accelerated pipeline (an empty recipe will do) without a cache.
        sampling: what to sample.
        watches: what to look at; what they keep has different names.
        notify: called as work proceeds.

    Returns:
        What was kept, and the images, uint8 (N, C, H, W): those of the untouched pipeline, bit for bit.

    Raises:
        UnsupportedModelError: the network has no known blocks, and one of the watches needs them.
    """
    session = session_of(pipe)
    # Around whom another one stands never sees the aborted run of a block that reads the modulated input.
    ordered = sorted(watches, key=lambda watch: watch.signal != "modulated_input")
    recorders = [Recorder(watch) for watch in ordered]
    batches: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    calls: dict[int, str] = {}
    with ExitStack() as undo:
        for recorder in recorders:
            rules = Rules(gate=recorder, predictor=Hold(), guard=Guard(), unit="image")
            undo.callback(cache_of(rules, recorder.watch.scope).attach(session))
        for made in sampling.run(pipe, notify, "observing"):
            images.append(made)
            batches.append({name: value for recorder in recorders for name, value in _stacked(recorder.kept).items()})
            for recorder in recorders:
                recorder.kept.clear()
            run = session.last_run
            assert run is not None
            calls = {record.step: record.network for record in run.records}
            times = run.timesteps[run.begin or 0 :][: len(calls)]
    kept = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    trace = Trace(
        times=times, networks=tuple(calls[step] for step in sorted(calls)), images=sampling.num_samples, kept=kept
    )
    return trace, torch.cat(images)


def _stacked(kept: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """(images, ...) of every evaluation -> (images, evaluations, ...)."""
    return {name: torch.stack([step[name] for step in kept], dim=1) for name in (kept[0] if kept else ())}


def some_numbers(tensor: Tensor) -> Tensor:
    """(images, ...) -> (images, n), evenly spread over each image's numbers: at most 2**14, for memory."""
    flat = tensor.flatten(1)
    return flat[:, :: -(-flat.shape[1] // _NUMBERS)]
