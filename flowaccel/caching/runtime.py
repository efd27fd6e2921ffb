"""Runtime of caches at a network call, independent of their scope: deciding, accounting, storing."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowaccel.caching.decisions import Decider, Decision, Unit, all_compute
from flowaccel.caching.gates import Gate, Step
from flowaccel.caching.guard import Guard
from flowaccel.caching.history import History, PartialHistory, Value
from flowaccel.caching.predictors import Predictor
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import COMPUTED, COND, EXTRA, REUSED, Call, CallRecord, Session, tensors_of

CallNext = Callable[..., Any]


@dataclass(kw_only=True)
class CacheState:
    """State of one cache during one run."""

    deciders: dict[Any, Decider] = field(default_factory=dict)
    decisions: dict[Any, tuple[int, Decision]] = field(default_factory=dict)
    """Last decision and its step, as (step, decision)."""
    signals: dict[Any, Tensor] = field(default_factory=dict)
    """Last signal (units, ...) that decided, by network, if the predictor needs it."""
    histories: dict[Any, History] = field(default_factory=dict)
    forms: dict[Any, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Shapes of what a UNet's deep blocks return, by network and block."""
    warned: bool = False

    @property
    def bytes(self) -> int:
        """Size of the cached values."""
        return sum(history.bytes for history in self.histories.values())

    @property
    def gate_bytes(self) -> int:
        """Size of the gates' states, including the storage that they keep alive."""
        states = [tensor for decider in self.deciders.values() for tensor in decider.state.values()]
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in states}
        return sum(kept.values())


class Cache(ABC):
    """Runtime of a cache on a session; a subclass per scope replaces what is not computed."""

    def __init__(self, *, gate: Gate, predictor: Predictor, guard: Guard, unit: Unit) -> None:
        self.gate, self.predictor, self.guard, self.unit = gate, predictor, guard, unit
        self.active: Callable[[Call], bool] | None = None
        """Predicate that decides at every call whether the cache takes part; None means always."""

    def attach(self, session: Session) -> Callable[[], None]:
        """Wrap what the scope needs; returns a function that undoes it."""
        return session.on_call(self._intercept_call)

    def _intercept_call(self, call_next: CallNext, call: Call) -> Any:
        if call.branches[0] == EXTRA or not (self.active is None or self.active(call)):
            return call_next()
        require_tensor(call, "a cache")
        cached = CachedCall(self, call.run.state.setdefault(self, CacheState()), call)
        if cached.decision is None and self.gate.signal in ("none", "input"):
            cached.decide(None if self.gate.signal == "none" else cached.of_units(call.sample))
        output = self.run(call_next, cached)
        cached.finish(tensors_of(output))
        return output

    @abstractmethod
    def run(self, call_next: CallNext, cached: CachedCall) -> Any:
        """Return the call's output, calling the network if necessary."""


class CachedCall:
    """One network call as a cache sees it: which rows are computed, and which values are stored."""

    def __init__(self, cache: Cache, state: CacheState, call: Call) -> None:
        self.cache, self.state, self.call = cache, state, call
        self.step: Step = Step(
            index=call.step,
            count=call.run.num_steps,
            time=call.timestep,
            sigma=call.sigma,
            grid=call.grid if cache.gate.needs_grid else None,
        )
        self.decision: Decision | None = None
        """Decision for this call; None until it is taken."""
        self._lacking: frozenset[int] = frozenset()
        """Rows that are computed against the decision, because there is no value to predict them from."""
        self._signal: Tensor | None = None
        self._feedback: Tensor | None = None
        if not self.decides:
            self.decision = self._followed()

    @property
    def decides(self) -> bool:
        """Whether the decision is taken in this call, rather than in the conditional call of the step."""
        return self.cache.unit != "image" or COND in self.call.branches

    def _followed(self) -> Decision:
        step, decision = self.state.decisions.get(self.call.network, (-1, None))
        # Without an earlier conditional call there is no decision to skip this one.
        return decision if decision is not None and step == self.call.step else all_compute(self.call.images)

    @property
    def _key(self) -> Any:
        return self.call.network if self.cache.unit == "image" else (self.call.network, self.call.branches)

    @property
    def _units(self) -> int:
        return {"image": self.call.images, "row": self.call.rows, "batch": 1}[self.cache.unit]

    def of_units(self, tensor: Tensor) -> Tensor:
        """Reduce (rows, ...) to (units, ...): the conditional rows of the images, every row, or all rows in one."""
        if self.cache.unit == "image":
            return tensor[self.call.rows_of(COND)]
        return tensor.flatten(0, 1)[None] if self.cache.unit == "batch" else tensor

    # -- deciding

    def decide(self, signal: Tensor | None) -> Decision:
        """Take the decision; `signal` (units, ...) is what the gate reads, see `of_units`."""
        self._signal = signal
        if signal is not None and self.cache.predictor.needs_signal:
            self.state.signals[self.call.network] = signal
        decider = self._decider
        decision = decider.decide(self._units, self._signal, self.step)
        if decision.not_finite:
            self._forget(decision.not_finite)
        self.decision = decision
        self.state.decisions[self.call.network] = (self.call.step, decision)
        return decision

    def _forget(self, units: tuple[int, ...]) -> None:
        """Discard the values computed for those units."""
        if not self.state.warned:
            self.state.warned = True
            _warn_not_finite()
        for (network, branches, _), history in self.state.histories.items():
            if self.cache.unit == "batch":
                rows = list(range(self.call.images * len(branches)))
            elif self.cache.unit == "row":
                rows = list(units)
            else:
                rows = [unit + branch * self.call.images for branch in range(len(branches)) for unit in units]
            if network == self.call.network and (self.cache.unit == "image" or branches == self.call.branches):
                history.forget(torch.tensor(rows))

    @property
    def _decider(self) -> Decider:
        made = self.state.deciders.get(self._key)
        if made is None:
            made = self.state.deciders[self._key] = Decider(gate=self.cache.gate, guard=self.cache.guard)
        return made

    def give_back(self, feedback: Tensor) -> None:
        """Pass feedback (rows, ...) of a step that was computed for some rows to the gate."""
        if self.decides:
            self._feedback = self.of_units(feedback)

    def finish(self, outputs: tuple[Tensor, ...]) -> None:
        """Finish the call: update the gate, with the first of `outputs`, and the report."""
        assert self.decision is not None
        decider, decision = self._decider, self.decision
        if len(self.computing):
            for output in outputs:
                if len(output) == self.call.rows:
                    self._note_finite(decider, torch.isfinite(output.flatten(1).sum(dim=1, dtype=torch.float32)))
            if self.cache.gate.feedback == "output":
                self.give_back(outputs[0])
        if self.decides:
            feedback = self._feedback if any(decision.compute) else None
            decider.update(self._signal, feedback, decision, self.step)
        _account(self.call.record, self.call, decision, self.decided, self.decides)
        self.call.record.cache_bytes += self.state.bytes
        self.call.record.gate_bytes += self.state.gate_bytes

    def _note_finite(self, decider: Decider, finite: Tensor) -> None:
        """Record per unit whether all values computed for it in this step are finite."""
        call = self.call
        if self.cache.unit == "batch":
            finite = finite.all()[None]
        elif self.cache.unit == "image":
            if call.kept is not None:  # rows that are not requested count as finite
                kept = torch.tensor(call.kept, device=finite.device)
                finite = finite.new_ones(call.images * len(call.branches)).index_copy(0, kept, finite)
            finite = finite.view(len(call.branches), call.images).all(dim=0)
        decider.finite = finite if decider.finite is None else decider.finite & finite

    # -- rows

    @property
    def decided(self) -> tuple[bool, ...]:
        """Per row, whether the decision is to compute it."""
        assert self.decision is not None
        compute = self.decision.compute
        if len(compute) == 1:
            return compute * self.call.rows
        return compute if self.cache.unit == "row" else tuple(compute[image] for image in self.call.row_images)

    @functools.cached_property
    def computing(self) -> Tensor:
        """Indices (n,) of the rows that are computed, on the CPU; valid after the decision and `require`."""
        computed = [row for row, decided in enumerate(self.decided) if decided or row in self._lacking]
        return torch.tensor(computed, dtype=torch.long)

    # -- values

    def history(self, what: str = "") -> History | PartialHistory:
        """Return the computed values of the rows of this call; `what` distinguishes several values."""
        key = (self.call.network, self.call.branches, what)
        made = self.state.histories.get(key)
        if made is None:
            made = self.state.histories[key] = History(self.cache.predictor)
        if self.call.kept is None:
            return made
        return PartialHistory(made, self.call.kept, self.call.images * len(self.call.branches))

    def store(self, value: Value, what: str = "", rows: Tensor | None = None) -> None:
        """Store values that were computed in this call, of all rows or of `rows`, see `History.store`."""
        signal = self._signal_of_rows
        signal = signal if signal is None or rows is None else signal[rows.to(signal.device)]
        self.history(what).store(value, self._place, rows, signal)

    def predict(self, what: str = "") -> Value:
        """Predict the values of all rows in this call."""
        return self.history(what).predict(self._place, self._signal_of_rows)

    @property
    def _place(self) -> float:
        """Position of the call on the predictor's axis."""
        return self.cache.predictor.place(self.call.step, self.call.timestep)

    @property
    def _signal_of_rows(self) -> Tensor | None:
        """Signal (rows, ...) that decided, for a predictor that needs it: of a row, of its image, or of the batch."""
        signal = self.state.signals.get(self.call.network)
        if signal is None or self.cache.unit == "row":
            return signal
        units = self.call.row_images if self.cache.unit == "image" else [0] * self.call.rows
        return signal[torch.tensor(units, device=signal.device)]

    def require(self, history: History | PartialHistory) -> None:
        """Compute rows that have no value to predict from: all of them, or those that no earlier call held."""
        assert self.decision is not None
        if all(self.decision.compute):
            return
        if history.empty:
            self.decision = Decision(compute=(True,) * len(self.decision.compute))
        reused = (row for row, decided in enumerate(self.decided) if not decided)
        self._lacking = frozenset(row for row in reused if not history.covers(row))


def _account(record: CallRecord, call: Call, decision: Decision, rows: tuple[bool, ...], decides: bool) -> None:
    computed = {image for image, row in zip(call.row_images, rows, strict=True) if row}
    present = set(call.row_images)
    record.computed = tuple(image in computed for image in range(call.images))
    record.what = COMPUTED if computed == present else "mixed" if computed else REUSED
    if decides:
        record.near_ties += decision.near_ties
        record.host_reads += decision.host_reads


def require_tensor(call: Call, what: str) -> None:
    """Raise an UnsupportedModelError if an image comes to the network in parts; `what` is the accelerator to remove."""
    if not isinstance(call.sample, Tensor):
        raise UnsupportedModelError(
            f"{type(call.module).__name__} is called with images in parts, and {what} needs a tensor for each; leave "
            "it off"
        )


def not_run(record: CallRecord, path: str, rows: int) -> None:
    """Record that the module `path` was not run for `rows` rows."""
    if rows:
        record.not_run[path] = record.not_run.get(path, 0) + rows


def _warn_not_finite() -> None:
    warnings.warn(
        "a network output that was not finite (NaN or infinite) cannot be reused, so those images are computed in full",
        RuntimeWarning,
        stacklevel=2,
    )
