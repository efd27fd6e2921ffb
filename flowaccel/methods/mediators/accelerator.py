"""Accelerator for networks with mediator attention (Attention Mediators, arXiv 2408.05710), and its schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor, nn

from flowaccel.hooks import Call, CallStats, Pipeline, Session, denoiser, session_of
from flowaccel.methods.mediators.attention import GridAttention, MediatorAttention
from flowaccel.methods.mediators.networks import (
    MediatorSiTTransformer2DModel,
    check_mediators,
    mediator_layers,
    set_mediators,
)
from flowaccel.methods.mediators.schedule import MediatorSchedule, Switching, check_count
from flowaccel.models.rows import grouped
from flowaccel.recipe.accelerator import Detach
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.loading import load_network
from flowaccel.recipe.serialization import component, learned
from flowaccel.recipe.variant import Variant, put_in_place

FOLDER = "mediators"
SCHEDULES: dict[str, type[MediatorSchedule]] = {MediatorSchedule.name: MediatorSchedule}


_MANY = 16
"""Images, above which their numbers are not listed."""


@dataclass(frozen=True)
class Mediators(Variant):
    """Accelerator that replaces the network by one with mediator attention (arXiv 2408.05710).

    What the network was set to before comes back with `restore`. Rows of one call that use different numbers of
    mediators share all of the network but the attention itself.

    Args:
        network: the network with mediators, or its folder. None takes the folder `mediators` beside the pipeline's
            components. Without `schedule` and `count` it may be the form with full attention, which mediators are
            fairly compared with.
        schedule: number of mediators at each step.
        count: number of mediators at all steps. With neither, the most that each layer was made for: its own number in
            a network with one per layer.

    Raises:
        TypeError: a network or schedule that is none.
        ValueError: a number that is no square, or both `schedule` and `count`.
    """

    name: ClassVar[str] = "mediators"
    what = "network with mediators"
    advice = (
        "make one with flowaccel.methods.mediators.networks.MediatorSiTTransformer2DModel.from_base, and train it with "
        "flowaccel.methods.mediators.train"
    )

    network: nn.Module | str | Path | None = learned(FOLDER, lambda folder: load_mediators(folder), default=None)
    schedule: MediatorSchedule | None = component(SCHEDULES, default=None)
    count: int | None = None

    def __post_init__(self) -> None:
        self.check_network()
        if self.schedule is not None and not isinstance(self.schedule, MediatorSchedule):
            raise TypeError(f"schedule must be a MediatorSchedule or None, got {self.schedule!r}")
        if self.count is not None:
            check_count("count", self.count)
            if self.schedule is not None:
                raise ValueError(f"give schedule or count, not both, got count={self.count} and {self.schedule}")

    @staticmethod
    def is_form(network: nn.Module) -> bool:
        """Whether a network is of the class that can have mediators."""
        return isinstance(network, MediatorSiTTransformer2DModel)

    def stand_in(self, pipe: Pipeline) -> Any:
        """Return the network with mediators, on the device and in the dtype of the pipeline's network.

        Raises:
            ValueError: it is a form of another network.
        """
        return self.fitted_to(self.resolve(pipe), denoiser(pipe))

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, and whether the number of mediators follows the loop's time."""
        return super().tags | ({Tag.LOOP_TIME} if self.schedule is not None else set())

    def attach(self, pipe: Pipeline) -> Detach:
        """Replace the network; detaching restores the original object and the numbers of mediators.

        Raises:
            ValueError: numbers of mediators that the network cannot use, or an attention backend that cannot add its
                biases.
        """
        network = self.stand_in(pipe)
        layers = mediator_layers(network)
        self._check(network, layers)
        with ExitStack() as undo:
            for layer in layers.values():
                undo.callback(setattr, layer, "count", layer.count)
            set_mediators(network, self.count if self.schedule is None else max(self.schedule.counts))
            runs = _CountSetter(self.schedule, session_of(pipe), network, layers)
            undo.callback(put_in_place(pipe, network, runs))
            if self.schedule is not None and self.schedule.fixed is None:
                undo.callback(session_of(pipe).on_step(runs.observe))
            return undo.pop_all().close

    def _check(self, network: nn.Module, layers: Mapping[str, MediatorAttention]) -> None:
        given = "count" if self.count is not None else "schedule"
        wanted = (self.count,) if self.count is not None else self.schedule.counts if self.schedule is not None else ()
        if wanted and not layers:
            raise ValueError(f"{given} is for networks with mediators, and this one has none; leave it out")
        for count in wanted:
            try:
                check_mediators(network, count)
            except ValueError as error:
                raise ValueError(f"{given} asks for {count} mediators: {error}") from error
        for module in network.modules():
            if isinstance(module, GridAttention):
                module.check_backend()


class _CountSetter:
    """Wrapper around the network's calls that sets every row's number of mediators, and observes the steps."""

    def __init__(
        self,
        schedule: MediatorSchedule | None,
        session: Session,
        network: nn.Module,
        layers: Mapping[str, MediatorAttention],
    ) -> None:
        self.schedule, self.session, self.network = schedule, session, network
        self.most = {layer: layer.count for layer in layers.values()}  # set between calls, and used for counting

    def __call__(self, call_next: Callable[..., Any], call: Call) -> Any:
        if call.module is not self.network or not self.most:
            return call_next()
        counts = self._counts(call)
        rows = tuple(counts[image % len(counts)] for image in call.row_images) if counts else ()
        with self._set(call, rows):
            output = call_next()
            self._note(call, rows)
        return output

    def _counts(self, call: Call) -> tuple[int, ...]:
        """Return the number of mediators per image, or one for all; empty where layers keep their own."""
        if self.schedule is None:
            return ()
        if self.schedule.fixed is None:
            return self._switching.counts
        scale = self.session.pipe.scheduler.config.get("num_train_timesteps", 1000)
        return (self.schedule.at(1 - call.timestep / scale),)

    @property
    def _switching(self) -> Switching:
        run = self.session.run
        assert run is not None and self.schedule is not None
        found: Switching = run.state.setdefault(self, Switching(self.schedule))
        return found

    def observe(self, velocity: Tensor, sample: Tensor, result: Tensor) -> None:
        """Observe a step of the scheduler, which decides the number of mediators of the next call."""
        run = self.session.run
        assert run is not None
        if run.steps_done + 1 < run.num_steps and self._switching.observe(velocity, sample, result):
            run.records[-1].host_reads += 1

    @contextmanager
    def _set(self, call: Call, rows: tuple[int, ...]) -> Iterator[None]:
        mixed = len(set(rows)) > 1
        groups = functools.cache(functools.partial(_grouped, rows))
        for layer, most in self.most.items():
            layer.ran = []
            layer.groups = (lambda: groups(call.run.only)) if mixed else None
            layer.count = rows[0] if rows and not mixed else most
        try:
            yield
        finally:
            for layer, most in self.most.items():
                layer.ran, layer.groups, layer.count = None, None, most

    def _note(self, call: Call, rows: Sequence[int]) -> None:
        ran = [(layer, count, number) for layer in self.most for count, number in layer.ran or ()]
        for layer, count, number in ran:
            call.record.spared += number * (layer.attention_macs(self.most[layer]) - layer.attention_macs(count))
        if ran:
            numbers: Sequence[float] = rows or [_average(self.most.values())] * len(call.row_images)
            images = dict(zip(call.row_images, numbers, strict=True))
            call.record.stats[Mediators.name] = MediatorStats(tuple(images[image] for image in sorted(images)))


@dataclass
class MediatorStats(CallStats):
    """Numbers of mediators in a network call."""

    counts: tuple[float, ...]
    """Number of mediators per image of the call; the mean over layers where each has a number of its own."""
    compared = "with the most mediators"

    def __str__(self) -> str:
        """Return every image's number, or the range where they are many and differ."""
        if len(set(self.counts)) > 1 and len(self.counts) > _MANY:
            return f", {min(self.counts)} to {max(self.counts)} mediators"
        numbers = self.counts if len(set(self.counts)) > 1 else self.counts[:1]
        return f", {' '.join(f'{number:.1f}'.removesuffix('.0') for number in numbers)} mediators" if numbers else ""

    @classmethod
    def summary(cls, stats: Sequence[MediatorStats], calls: int, macs: str) -> str:
        """Return the mean number."""
        return f"{mean_mediators(stats):.1f} mediators on average{f', {macs}' if macs else ''}."


def mean_mediators(stats: Sequence[MediatorStats]) -> float:
    """Return how many mediators attention went through, on average over images, calls and layers."""
    return fmean(number for found in stats for number in found.counts)


def _average(numbers: Collection[int]) -> float:
    """Return the mean of the numbers, as an integer where they are equal."""
    return next(iter(numbers)) if len(set(numbers)) == 1 else fmean(numbers)


def _grouped(rows: Sequence[int], only: tuple[int, ...] | None) -> dict[int, Tensor]:
    """Group the indices of the rows that run by their number of mediators."""
    return grouped(rows if only is None else [rows[row] for row in only])


def load_mediators(folder: Path) -> nn.Module:
    """Load a network with mediators; raises as `load_network` does."""
    return load_network(folder, Mediators.what)


def mediators_with(**options: Any) -> Mediators:
    """Return `Mediators` with the options of a preset: those that are not its fields belong to its schedule."""
    own = {field.name for field in fields(Mediators)}
    given = {name: value for name, value in options.items() if name in own}
    schedule = {name: value for name, value in options.items() if name not in own}
    if schedule:
        given["schedule"] = MediatorSchedule(**schedule)
    return Mediators(**given)
