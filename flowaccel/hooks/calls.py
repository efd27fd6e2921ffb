"""Records of a run and of each of its network calls, as plain data."""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from flowaccel.hooks.families import Family

COND, UNCOND, EXTRA = "cond", "uncond", "extra"
"""Names of the branches; see `Call.branches`."""
COMPUTED, REUSED = "computed", "reused"
"""Common values of `CallRecord.what`."""


class CallStats:
    """Base class of a method's statistics of a network call.

    A subclass is a dataclass that the method enters in `CallRecord.stats` under its own name. Its text is printed on
    the line of the call in a report; `summary` and `notes` on the lines below.
    """

    compared: ClassVar[str] = ""
    """Text that a report appends where it compares multiply-adds with a run in which every call is computed."""

    def __str__(self) -> str:
        return ""

    @classmethod
    def summary(cls, stats: Sequence[Self], calls: int, macs: str) -> str | None:
        """Return a line that states what the method saved within calls, or None.

        Args:
            stats: the statistics of all calls that have them.
            calls: number of all calls.
            macs: saving of multiply-adds in the run, in words; empty if not known.
        """
        return None

    @classmethod
    def notes(cls, stats: Sequence[Self]) -> list[str]:
        """Return further lines for the end of a report."""
        return []


@dataclass
class CallRecord:
    """Record of one network call for the report; plain numbers and text."""

    step: int
    network: str
    branches: tuple[str, ...]
    rows: int
    what: str
    """`computed`, `reused`, or the name of what an accelerator did instead of running the network."""
    seconds: float
    """Time on the host's clock; on a GPU the call may return before it is done."""
    computed: tuple[bool, ...] = ()
    """Per image, whether it was computed, if an accelerator decides that."""
    guided: tuple[bool, ...] = ()
    """Per image, whether it was guided, if an accelerator decides about guidance."""
    not_run: dict[str, float] = field(default_factory=dict)
    """Number of rows for which a module was not run, by the module's name; "" is the whole network. A partly skipped
    module counts as a fraction of the rows."""
    near_ties: int = 0
    """Number of decisions that rounding errors may change."""
    host_reads: int = 0
    """Number of times the host waited for a value from the device."""
    cache_bytes: int = 0
    """Size of the computed values that accelerators held after the call."""
    gate_bytes: int = 0
    """Size of the data that accelerators held to decide by, besides the cached values."""
    done: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows and multiply-adds of modules whose work depends on their input, by the module's name; modules that did
    not run are absent."""
    stats: dict[str, Any] = field(default_factory=dict)
    """Statistics of methods, by method name; see `CallStats`."""
    times: tuple[float | None, ...] = ()
    """Per image, its timestep if images have timesteps of their own; None once the image is done."""
    spared: int = 0
    """Multiply-adds saved within modules that ran, where an accelerator sets the amount of work per row; negative if
    they did more than they are counted with."""


@dataclass
class Run:
    """One pass of the pipeline through its scheduler's timesteps."""

    index: int
    """Number of runs that the session saw before."""
    timesteps: tuple[float, ...] = ()
    """The scheduler's timesteps, including those that image-to-image pipelines skip."""
    sigmas: tuple[float, ...] = ()
    """Noise level at each timestep: the scheduler's sigma (flow models: in [0, 1]) if it has one, else sqrt((1 - a)
    / a) with a the cumulative alpha."""
    begin: int | None = None
    """Index into `timesteps` of the first network call; None before it."""
    planned: int | None = None
    """Number of evaluations that the pipeline states; None if it states none, or counts something else."""
    images: int | None = None
    """Number of images in the batch; None before the first network call."""
    repeats: bool | None = None
    """Whether a batch of more than two rows per image holds copies of the images; None if there was no such batch."""
    steps_done: int = 0
    stepped: bool = False
    """Whether the pipeline's scheduler was seen to step."""
    due: bool = False
    """Whether a network call is still to be followed by the scheduler step that uses it."""
    clock: Any = None
    """Time argument of the last network call; None once the scheduler was seen to step."""
    state: dict[Any, Any] = field(default_factory=dict)
    """State of accelerators during the run, each under its own keys; cleared when the run ends."""
    records: list[CallRecord] = field(default_factory=list)
    shapes: dict[str, tuple[nn.Module, dict[str, Any], int]] = field(default_factory=dict)
    """First call of every network: the network, its arguments as tensors without data, and its number of rows."""
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    only: tuple[int, ...] | None = None
    """Rows set by `Call.only`; None outside of it."""
    ended: bool = False
    failed: bool = False
    """Whether the run ended by an exception."""
    looped: bool = False
    """Whether the pipeline opened its progress bar; calls within compiled blocks are not seen."""
    stopped: bool = False
    """Whether `stop` was called."""
    ordered: bool | None = None
    """Whether the first guided step showed the order of the branches; None before it. Not used for families that are
    registered with an order."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Functions to call when the run has ended, after `state` was cleared."""

    @property
    def num_steps(self) -> int:
        """Number of evaluations in the run; the branches of guidance count as one."""
        return len(self.timesteps) - (self.begin or 0) if self.planned is None else self.planned

    def position(self, step: int) -> int:
        """Return the index into `timesteps` of an evaluation; the last index if the pipeline makes more evaluations."""
        return min((self.begin or 0) + step, len(self.timesteps) - 1)

    @property
    def complete(self) -> bool:
        """Whether the last step was done; steps on an object other than the scheduler are not seen."""
        return self.steps_done + (not self.stepped and bool(self.records)) >= self.num_steps

    def tick(self, clock: Any) -> None:
        """Count a step that was not seen, if the network's timestep changed without one.

        Some pipelines step on copies of their scheduler.
        """
        if self.stepped or not isinstance(clock, Tensor):
            return
        before, self.clock = self.clock, clock.detach().clone()
        if before is not None and before.shape == self.clock.shape and not torch.equal(before, self.clock):
            self.steps_done += 1

    def stop(self) -> None:
        """Mark all images as done, earlier than planned; later calls of the pipeline still belong to the run."""
        self.stopped = True

    def end(self, failed: bool = False) -> None:
        """Clear the state, but keep the records for the report. Idempotent."""
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
    """Noise level; see `Run.sigmas`."""
    branches: tuple[str, ...]
    """`("cond",)` or `("uncond",)` for one branch, both in their order for a batch that holds both, and `("extra",)`
    for calls beyond guidance. `("cond", "extra", ...)` for a batch with other branches than these two: the meaning
    of its first rows is not known, and accelerators decide by them."""
    images: int
    arguments: dict[str, Any]
    """Arguments of the network, by name."""
    record: CallRecord
    forward: Callable[..., Any]
    """The network's forward without any wrapper; calls of it are in no report."""
    kept: tuple[int, ...] | None = None
    """Indices of the rows of the pipeline's batch that a `narrowed` call holds, ascending; None for all."""

    @property
    def places(self) -> Sequence[int]:
        """Per row of this call, its index in the pipeline's batch."""
        return range(self.images * len(self.branches)) if self.kept is None else self.kept

    @property
    def rows(self) -> int:
        """Number of rows of this call."""
        return len(self.places)

    @property
    def row_images(self) -> list[int]:
        """Per row of this call, the index of its image."""
        return [place % self.images for place in self.places]

    @functools.cached_property
    def sample(self) -> Any:
        """First argument of the network: the sample to denoise (rows, ...); a list with a tensor for every row, as
        Z-Image has it, in one tensor."""
        return in_one(next(iter(self.arguments.values())))

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
        """Return the rows of one branch; a `narrowed` call may lack some of them.

        Raises:
            ValueError: the call does not hold that branch.
        """
        start = self.branches.index(branch) * self.images
        return slice(bisect_left(self.places, start), bisect_left(self.places, start + self.images))

    @property
    def ordered(self) -> bool:
        """Whether the order of the branches is certain: it is registered with the family, or the run has shown it."""
        return not self.family.derived or bool(self.run.ordered)

    @property
    def gathers(self) -> bool:
        """Whether the network can be called for a subset of the rows.

        The family must state which arguments rows share, and no ControlNet may add to all rows between the blocks.
        """
        between = ("control", "additional_residual")
        given = [name for name, value in self.arguments.items() if value is not None]
        controlled = any(part in name for name in given for part in between)
        return not self.family.derived and not controlled

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Run the network or its blocks for some rows of this call inside the context; `rows` are their indices.

        Modules that do not treat all rows alike read from it which rows they get.
        """
        outer, self.run.only = self.run.only, tuple(rows.tolist())
        try:
            yield
        finally:
            self.run.only = outer

    def narrowed(self, rows: Tensor) -> Call:
        """Return this call restricted to some of its rows; `rows` are their ascending indices, on the CPU.

        If the call does not `gather`, arguments that rows share would be wrong.
        """
        kept = tuple(self.places[row] for row in rows.tolist())
        return replace(self, arguments=self.take(rows), kept=kept)

    def take(self, rows: Tensor) -> dict[str, Any]:
        """Return the arguments for some of the rows; `rows` are their indices. Arguments that all rows share are
        kept."""
        return {
            name: value if name in self.family.shared else self._take(name, value, rows)
            for name, value in self.arguments.items()
        }

    def _take(self, name: str, value: Any, rows: Tensor) -> Any:
        if isinstance(value, (list, tuple)) and name in self.family.lists:
            return type(value)(value[int(row)] for row in rows)
        return take_rows(value, rows, self.rows)


def in_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return `tensor` expanded to `rows` rows if it has a single row, else unchanged."""
    return tensor.expand(rows, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def in_one(value: Any) -> Any:
    """Return a list of tensors, one per row, as one tensor (rows, ...), smaller ones with zeros at their ends; anything
    else unchanged."""
    if not is_row_list(value):
        return value
    most = [max(sizes) for sizes in zip(*(row.shape for row in value), strict=True)]
    return torch.stack([_filled(row, most) for row in value])


def _filled(row: Tensor, shape: list[int]) -> Tensor:
    missing = [size - own for size, own in zip(shape, row.shape, strict=True)]
    return pad(row, [amount for size in reversed(missing) for amount in (0, size)])  # pad begins at the last axis


def is_row_list(value: Any) -> bool:
    """Return whether `value` is a list of tensors with the same number of axes."""
    tensors = isinstance(value, list) and value and all(isinstance(row, Tensor) for row in value)
    return bool(tensors) and len({row.dim() for row in value}) == 1


def take_rows(value: Any, rows: Tensor, full: int) -> Any:
    """Select rows of the tensors in `value` that have `full` rows; everything else is returned unchanged."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == full else value
    if isinstance(value, dict):
        return {key: take_rows(entry, rows, full) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(entry, rows, full) for entry in value)
    return value
