"""What is known of a run and of each of its network calls, as plain data."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flowaccel.hooks.families import Family

COND, UNCOND, EXTRA = "cond", "uncond", "extra"
"""Branches, see `Call.branches`."""
COMPUTED, REUSED = "computed", "reused"
"""What most calls did, see `CallRecord.what`."""


class CallStats:
    """Base class of what a method says that it did in a network call: a dataclass of its own, which it enters in
    `CallRecord.stats` under its name. Its text goes to the line of the call in a report; `summary` and `notes` to the
    lines below.
    """

    compared: ClassVar[str] = ""
    """What a report adds where it compares multiply-adds with a run of computed calls."""

    def __str__(self) -> str:
        return ""

    @classmethod
    def summary(cls, stats: Sequence[Self], calls: int, macs: str) -> str | None:
        """Return a line that says what the method saved within calls, or None.

        Args:
            stats: of all calls that have them.
            calls: number of all calls.
            macs: what the run saved of the multiply-adds, in words; empty where that is not known.
        """
        return None

    @classmethod
    def notes(cls, stats: Sequence[Self]) -> list[str]:
        """Return further lines for the end of a report."""
        return []


@dataclass
class CallRecord:
    """What one network call did, for the report; plain numbers and text."""

    step: int
    network: str
    branches: tuple[str, ...]
    rows: int
    what: str
    """`computed`, `reused`, or what an accelerator says that it did instead of the network's work."""
    seconds: float
    """Host clock; on a GPU the call may return before it is done."""
    computed: tuple[bool, ...] = ()
    """Per image, where an accelerator decides whether to compute: what it decided."""
    guided: tuple[bool, ...] = ()
    """Per image, where an accelerator decides about guidance: whether it was guided."""
    not_run: dict[str, float] = field(default_factory=dict)
    """Rows for which a module of the network was not run, by its name in the network; "" is the network itself. A part
    of a module counts as a part of the rows."""
    near_ties: int = 0
    """Decisions that rounding may take otherwise."""
    host_reads: int = 0
    """How often the host waited for a number from the device."""
    cache_bytes: int = 0
    """Computed values that accelerators held after the call."""
    gate_bytes: int = 0
    """What they held besides to decide by."""
    done: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of modules that do as much as their input asks for, by name in the network: rows of the call that came by, and
    multiply-adds that they did; those that did not run are not there."""
    stats: dict[str, Any] = field(default_factory=dict)
    """What methods did besides, by their names, see `CallStats`."""
    times: tuple[float | None, ...] = ()
    """Per image, its timestep where images have times of their own; None where it is done and idle."""
    spared: int = 0
    """Multiply-adds that modules which ran did less than they are counted with, where an accelerator sets by row how
    much they do; negative where they did more."""


@dataclass
class Run:
    """One walk of the pipeline through its scheduler's timesteps."""

    index: int
    """How many runs the session saw before."""
    timesteps: tuple[float, ...] = ()
    """The scheduler's timesteps, those that image to image leaves out included."""
    sigmas: tuple[float, ...] = ()
    """Noise level at each of them: the scheduler's sigma (flow models: in [0, 1]) where it has one, else
    sqrt((1 - a) / a) with a the cumulative alpha."""
    begin: int | None = None
    """Position in `timesteps` of the first network call; None before it."""
    planned: int | None = None
    """How many evaluations the pipeline says that it makes; None where it does not, or counts something else."""
    images: int | None = None
    """Images in the batch; None before the first network call."""
    repeats: bool | None = None
    """Whether a batch of more than two rows per image holds copies of the images; None where there was none."""
    steps_done: int = 0
    stepped: bool = False
    """Whether the pipeline's scheduler was seen to step."""
    due: bool = False
    """Whether a network call waits for the step that uses it."""
    clock: Any = None
    """The time of the last network call as its network got it, until the scheduler is seen to step."""
    state: dict[Any, Any] = field(default_factory=dict)
    """What accelerators remember during the run, each under keys of its own; cleared when the run ends."""
    records: list[CallRecord] = field(default_factory=list)
    shapes: dict[str, tuple[nn.Module, dict[str, Any], int]] = field(default_factory=dict)
    """Of every network's first call: the network, its arguments without their data, and its rows."""
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    only: tuple[int, ...] | None = None
    """See `Call.only`; None outside of it."""
    ended: bool = False
    failed: bool = False
    """Whether an exception ended it."""
    looped: bool = False
    """Whether the pipeline opened its progress bar; compiled blocks call no network that is seen."""
    stopped: bool = False
    """See `stop`."""
    ordered: bool | None = None
    """Whether the first guided step showed which branch is which; None before it. Nobody asks where a written row
    says."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """What accelerators have to do once it has ended; `state` is gone by then."""

    @property
    def num_steps(self) -> int:
        """How many evaluations the run is going to make (guidance does not count twice)."""
        return len(self.timesteps) - (self.begin or 0) if self.planned is None else self.planned

    def position(self, step: int) -> int:
        """Where in `timesteps` an evaluation stands; the last one for those of a pipeline that makes more."""
        return min((self.begin or 0) + step, len(self.timesteps) - 1)

    @property
    def complete(self) -> bool:
        """Whether the last step was done; it is not seen where the pipeline steps on something else."""
        return self.steps_done + (not self.stepped and bool(self.records)) >= self.num_steps

    def tick(self, clock: Any) -> None:
        """Count a step that was not seen, if the network's time changed without one: some pipelines step on copies of
        their scheduler.
        """
        if self.stepped or not isinstance(clock, Tensor):
            return
        before, self.clock = self.clock, clock.detach().clone()
        if before is not None and before.shape == self.clock.shape and not torch.equal(before, self.clock):
            self.steps_done += 1

    def stop(self) -> None:
        """All images are done, sooner than planned. Calls that a pipeline still makes belong to the run as well."""
        self.stopped = True

    def end(self, failed: bool = False) -> None:
        """Forget all state; what was recorded stays for the report. Idempotent."""
        if not self.ended:
            self.ended, self.failed = True, failed
            self.seconds = time.perf_counter() - self.started
            self.state.clear()
            while self.at_end:
                self.at_end.pop()()


@dataclass(frozen=True, kw_only=True)
class Call:
    """One network call.

    Row r of the pipeline's batch belongs to image `r % images` and to branch `branches[r // images]`.
    """

    run: Run
    network: str
    """Component name, `transformer` or `transformer_2`."""
    module: nn.Module
    family: Family
    step: int
    """Index of this evaluation in the run, 0 .. `run.num_steps` - 1."""
    timestep: float
    """The scheduler's timestep."""
    sigma: float
    """Noise level, see `Run.sigmas`."""
    branches: tuple[str, ...]
    """`("cond",)` or `("uncond",)` for one branch, both in their order for a batch that holds both, and `("extra",)`
    for calls beyond guidance. `("cond", "extra", ...)` for a batch that holds others than these two: what its first
    rows are is not known, and they decide."""
    images: int
    arguments: dict[str, Any]
    """What the network was called with, by name."""
    record: CallRecord
    forward: Callable[..., Any]
    """The network with nobody around it; what it does then is in no report."""
    kept: tuple[int, ...] | None = None
    """The rows of the pipeline's batch that a `narrowed` call still holds, ascending; None for all."""

    @property
    def places(self) -> Sequence[int]:
        """Per row of this call, which row of the pipeline's batch it is."""
        return range(self.images * len(self.branches)) if self.kept is None else self.kept

    @property
    def rows(self) -> int:
        """Rows of this call."""
        return len(self.places)

    @property
    def row_images(self) -> list[int]:
        """Per row of this call, the image that it belongs to."""
        return [place % self.images for place in self.places]

    @property
    def sample(self) -> Any:
        """The network's first argument: what is denoised (rows, ...), in some families a list with an entry per row."""
        return next(iter(self.arguments.values()))

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Height and width of the latents, for videos with the frames before them. Of latents that are packed into
        tokens it is read from their `img_ids`, for which the host waits; None where nothing tells.
        """
        if not isinstance(self.sample, Tensor):
            return None
        if self.sample.dim() > 3:
            return tuple(self.sample.shape[2:])
        places = self.arguments.get("img_ids")
        if not isinstance(places, Tensor):
            return None
        height, width = (int(column.max()) + 1 for column in (places[..., 1], places[..., 2]))
        return height, width

    def rows_of(self, branch: str) -> slice:
        """The rows of one branch; all of them are there but in a `narrowed` call.

        Raises:
            ValueError: the call does not hold that branch.
        """
        start = self.branches.index(branch) * self.images
        return slice(bisect_left(self.places, start), bisect_left(self.places, start + self.images))

    @property
    def ordered(self) -> bool:
        """Whether it is certain which branch is which: a written row says so, or the run has shown it."""
        return not self.family.derived or bool(self.run.ordered)

    @property
    def gathers(self) -> bool:
        """Whether a part of the rows can be called alone: the family's row says what rows share, and no ControlNet adds
        to all rows between the blocks.
        """
        controlled = any("control" in name and value is not None for name, value in self.arguments.items())
        return not self.family.derived and not controlled

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Within, the network or its blocks run for some rows of this call alone, so that what does not treat all rows
        alike can tell which they are: `rows` are their indices.
        """
        outer, self.run.only = self.run.only, tuple(rows.tolist())
        try:
            yield
        finally:
            self.run.only = outer

    def narrowed(self, rows: Tensor) -> Call:
        """This call for some of its rows only: `rows` are their ascending indices, on the CPU. Where the call does not
        `gather`, what rows share would come out wrong.
        """
        kept = tuple(self.places[row] for row in rows.tolist())
        return replace(self, arguments=self.take(rows), kept=kept)

    def take(self, rows: Tensor) -> dict[str, Any]:
        """The arguments of a call for some of the rows only: `rows` are their indices. What all rows share is kept."""
        return {
            name: value if name in self.family.shared else self._take(name, value, rows)
            for name, value in self.arguments.items()
        }

    def _take(self, name: str, value: Any, rows: Tensor) -> Any:
        if isinstance(value, (list, tuple)) and name in self.family.lists:
            return type(value)(value[int(row)] for row in rows)
        return take_rows(value, rows, self.rows)


def in_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with a row for each of `rows`, where it has one that all share; else as it is."""
    return tensor.expand(rows, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def take_rows(value: Any, rows: Tensor, full: int) -> Any:
    """The tensors in `value` that have `full` rows, for the rows of those indices only; all else as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == full else value
    if isinstance(value, dict):
        return {key: take_rows(entry, rows, full) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(entry, rows, full) for entry in value)
    return value
