"""Recording of the signals that gates read, in runs with every step computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flowaccel.caching.feature_cache import FeatureCache
from flowaccel.caching.gates import Gate, Step
from flowaccel.caching.gates.base import Feedback, Signal, State
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Hold
from flowaccel.caching.scopes import Scope
from flowaccel.hooks import Pipeline, session_of
from flowaccel.training.sampling import Notify, Sampling

_NUMBERS = 2**14


class Seen(NamedTuple):
    """Signal and feedback that a gate read at one step."""

    signal: Tensor | None
    """Signal (images, ...), or None."""
    feedback: Tensor | None
    """Feedback (images, ...), or None."""


Measure = Callable[[Seen, Seen | None], dict[str, Tensor]]
"""Function that returns what to record of a step, as tensors (images, ...), from the step and the previous one.

The previous step is None at the first step of a network.
"""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Specification of what to record: the signal and feedback of a gate in its scope."""

    signal: Signal
    feedback: Feedback
    scope: Scope
    measure: Measure


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Values recorded in all runs."""

    times: tuple[float, ...]
    """The scheduler's timestep at each evaluation."""
    networks: tuple[str, ...]
    """Name of the network that was called at each evaluation."""
    images: int
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Recorded values (images, evaluations, ...), on the CPU."""

    @property
    def steps(self) -> int:
        """Number of evaluations of a run."""
        return len(self.times)

    def step(self, index: int) -> Step:
        """Return the position of evaluation `index` in the run."""
        return Step(index=index, count=self.steps, time=self.times[index])


class Recorder(Gate):
    """Gate that computes every step and records its signal and feedback."""

    name = "recorder"

    def __init__(self, watch: Watch) -> None:
        for name, value in (("signal", watch.signal), ("feedback", watch.feedback), ("watch", watch), ("kept", [])):
            object.__setattr__(self, name, value)

    watch: Watch
    kept: list[dict[str, Tensor]]
    """Records of every evaluation of the current run, in order."""

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return infinite scores, so that every unit is computed."""
        images = next(iter(state.values())).shape[0]
        return torch.full((images,), torch.inf), state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Record this step, and keep it in the state for the next."""
        now = Seen(signal, feedback)
        before = Seen(state.get("signal"), state.get("feedback")) if state else None
        self.kept.append({name: value.float().cpu() for name, value in self.watch.measure(now, before).items()})
        return {name: value for name, value in now._asdict().items() if value is not None}


def observe(
    pipe: Pipeline, sampling: Sampling, watches: Sequence[Watch], notify: Notify = lambda *_: None
) -> tuple[Trace, Tensor]:
    """Sample with every step computed, and record the signals.

    Args:
        pipe: an accelerated pipeline (an empty recipe will do) without a cache.
        sampling: what to sample.
        watches: what to record; names of records must differ between watches.
        notify: called as work proceeds.

    Returns:
        The records, and the images, uint8 (N, C, H, W), bit for bit equal to those without recording.

    Raises:
        UnsupportedModelError: the network has no known blocks, and one of the watches needs them.
    """
    session = session_of(pipe)
    # A recorder inside of another never sees the aborted run of a block that reads the modulated input.
    ordered = sorted(watches, key=lambda watch: watch.signal != "modulated_input")
    recorders = [Recorder(watch) for watch in ordered]
    batches: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    calls: dict[int, str] = {}
    with ExitStack() as undo:
        for recorder in recorders:
            undo.callback(FeatureCache(recorder, recorder.watch.scope, Hold(), Guard()).running().attach(session))
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
    """Stack records (images, ...) of every evaluation to (images, evaluations, ...)."""
    return {name: torch.stack([step[name] for step in kept], dim=1) for name in (kept[0] if kept else ())}


def some_numbers(tensor: Tensor) -> Tensor:
    """Subsample (images, ...) evenly to (images, n) with n at most 2**14, to bound the memory."""
    flat = tensor.flatten(1)
    return flat[:, :: -(-flat.shape[1] // _NUMBERS)]
