"""Report of the last run of an accelerated pipeline, including the reason if nothing was saved."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowaccel.hooks import COMPUTED, REUSED, CallRecord, Pipeline, Run, macs_by_module, session_of
from flowaccel.recipe.recipe import Recipe
from flowaccel.recipe.verbs import recipe_of

_BY_NETWORK = (COMPUTED, "mixed", REUSED, "unguided", "partly guided")
"""Kinds of calls by the work of the network itself, at least in part; refiners and the like do not count."""
_LETTERS = 16


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Report of one evaluation of the run, with all its network calls."""

    step: int
    timestep: float
    """The scheduler's timestep."""
    sigma: float
    calls: tuple[CallRecord, ...]

    @property
    def computed(self) -> tuple[bool, ...]:
        """Per image, whether an accelerator let it be computed; empty if none decides that."""
        images = [call.computed for call in self.calls if call.computed]
        return tuple(any(image) for image in zip(*images, strict=False))

    @property
    def times(self) -> tuple[float | None, ...]:
        """Per image, its own timestep, None once it is done; empty if all have the scheduler's."""
        return next((call.times for call in self.calls if call.times), ())

    @property
    def guided(self) -> tuple[bool, ...]:
        """Per image, whether it was guided; empty if no accelerator decides that."""
        return next((call.guided for call in self.calls if call.guided), ())

    @property
    def seconds(self) -> float:
        """Time spent in the network calls, on the host's clock."""
        return sum(call.seconds for call in self.calls)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report of one run.

    Seconds are on the host's clock: on a GPU they end when the work is queued, so measure with `flowaccel evaluate`.
    """

    pipeline: str
    recipe: str
    families: tuple[str, ...]
    images: int
    num_steps: int
    """Planned number of evaluations (the branches of guidance count as one); fewer were made if the run ended early."""
    steps: tuple[StepReport, ...]
    seconds: float
    """Time from the start of the run to its end."""
    failed: bool
    """Whether the run ended early, by an exception or `pipe._interrupt`."""
    unsaved: str | None
    """Reason why no network call was saved; None if some were."""
    counted: Callable[[], tuple[int | None, int | None]] = field(repr=False, compare=False)
    """Counts `macs` and `macs_saved` on first access, because it is slow."""

    @property
    def macs(self) -> int | None:
        """Multiply-adds of the networks; None if they cannot be counted (compiled networks)."""
        return self.counted()[0]

    @property
    def macs_saved(self) -> int | None:
        """Multiply-adds saved against a run in which every call is computed; negative if more were done.

        In that run experts take as many tokens as in training, and attention always uses the most mediators of the
        recipe.
        """
        return self.counted()[1]

    @property
    def calls(self) -> list[CallRecord]:
        """All network calls in order."""
        return [call for step in self.steps for call in step.calls]

    def stats(self, name: str) -> list[Any]:
        """Return the statistics of a method, for the calls that it took part in."""
        return [call.stats[name] for call in self.calls if name in call.stats]

    def count(self, what: str) -> int:
        """Return the number of network calls whose `what` is `computed`, `reused`, `refined` and so on."""
        return sum(call.what == what for call in self.calls)

    @property
    def hit_rate(self) -> float:
        """Fraction of the images and steps that was reused, from 0 to 1."""
        images = [computed for step in self.steps for computed in step.computed]
        return images.count(False) / len(images) if images else 0.0

    @property
    def guided_rate(self) -> float | None:
        """Fraction of the images and steps that was guided, from 0 to 1; None if no accelerator decides that."""
        images = [guided for step in self.steps for guided in step.guided]
        return images.count(True) / len(images) if images else None

    @property
    def seconds_saved(self) -> float | None:
        """Estimated time saved, from the mean time of the computed calls; None if all calls or none were computed."""
        computed = [call.seconds for call in self.calls if call.what == COMPUTED]
        others = [call.seconds for call in self.calls if call.what != COMPUTED]
        return len(others) * sum(computed) / len(computed) - sum(others) if computed and others else None

    @property
    def near_ties(self) -> int:
        """Number of decisions so close to the threshold that rounding errors may change them."""
        return sum(call.near_ties for call in self.calls)

    @property
    def host_reads(self) -> int:
        """Number of times the host waited for the device to take a decision."""
        return sum(call.host_reads for call in self.calls)

    @property
    def cache_bytes(self) -> int:
        """Peak size of the computed values that caches held."""
        return max((call.cache_bytes for call in self.calls), default=0)

    @property
    def gate_bytes(self) -> int:
        """Peak size of the data that caches held to decide by."""
        return max((call.gate_bytes for call in self.calls), default=0)

    def rows(self, what: str) -> int:
        """Return the number of rows in all calls of the kind `what`."""
        return sum(call.rows for call in self.calls if call.what == what)

    def __str__(self) -> str:
        """Return a table with a line per evaluation."""
        counts = ", ".join(f"{number} {what}" for what, number in Counter(c.what for c in self.calls).items())
        title = f"{self.pipeline}, recipe {self.recipe!r}: {self.images} images, {len(self.steps)} evaluations"
        lines = [
            f"{title} in {self.seconds:.3f} s; {len(self.calls)} network calls ({counts or 'none'})",
            f"{'step':>4}  {'timestep':>9}  {'sigma':>7}  {'ms':>8}  calls",
        ]
        for step in self.steps:
            calls = ", ".join(_describe(call) for call in step.calls) + _pattern(step)
            where = f"{'by image':>18}" if step.times else f"{step.timestep:>9.2f}  {step.sigma:>7.4f}"
            lines.append(f"{step.step:>4}  {where}  {1000 * step.seconds:>8.2f}  {calls}")
        lines += self._savings()
        lines += [note for stats in self._by_method() for note in type(stats[0]).notes(stats)]
        if self.failed:
            lines.append(f"The run ended early, after {len(self.steps)} of {self.num_steps} evaluations.")
        if self.unsaved is not None:
            lines.append(f"No network call was saved: {self.unsaved}.")
        return "\n".join(lines)

    def _by_method(self) -> list[list[Any]]:
        return [self.stats(name) for name in dict.fromkeys(name for call in self.calls for name in call.stats)]

    def _macs_share(self) -> str | None:
        if self.macs is None or self.macs_saved is None or not self.macs + self.macs_saved:
            return None
        share = self.macs_saved / (self.macs + self.macs_saved)
        compared = next((stats[0].compared for stats in self._by_method() if stats[0].compared), None)
        if compared is not None and not self.macs_saved:
            return None
        if compared is None:
            return f"{share:.0%} of the multiply-adds"
        fewer = "fewer" if share >= 0 else "more"
        return f"{abs(share):.0%} {fewer} multiply-adds than with all calls computed {compared}"

    def _within(self) -> list[str]:
        """Return the savings within calls that methods state, if nothing else was saved."""
        macs = self._macs_share()
        said = [type(stats[0]).summary(stats, len(self.calls), macs or "") for stats in self._by_method()]
        return [line for line in said if line is not None][:1]

    def _savings(self) -> list[str]:
        """Return the savings of caches and guidance, in one or two lines."""
        parts = [f"Reused: {self.hit_rate:.0%}"] if any(step.computed for step in self.steps) else []
        parts += [] if self.guided_rate is None else [f"{'not' if parts else 'Not'} guided: {1 - self.guided_rate:.0%}"]
        if not parts:
            return self._within()
        macs = self._macs_share()
        macs = "" if macs is None else f", {macs}"
        seconds = "" if self.seconds_saved is None else f", about {self.seconds_saved:.3f} s"
        return [
            f"{'; '.join(parts)} of the images and steps{macs}{seconds}.",
            f"Held {self.cache_bytes / 1e6:.1f} MB, and {self.gate_bytes / 1e6:.1f} MB to decide by; "
            f"{self.host_reads} waits for the device, {self.near_ties} near-ties.",
        ]


def _pattern(step: StepReport) -> str:
    """Return which images were computed and which were guided, as text."""
    if step.times and len(step.times) <= _LETTERS:
        pairs = zip(step.times, step.computed, strict=True)
        return "  " + "".join("." if time is None else "C" if on else "r" for time, on in pairs)
    return _letters(step.computed, "Cr", "images") + _letters(step.guided, "G-", "guided")


def _letters(images: Sequence[bool], letters: str, what: str) -> str:
    """Return one of two letters for each image, or the number of the first letter if there are many images."""
    if len(images) > _LETTERS:
        return f"  {sum(images)} of {len(images)} {what}"
    return "  " + "".join(letters[not image] for image in images) if images else ""


def _describe(call: CallRecord) -> str:
    network = "" if call.network == "transformer" else f" on {call.network}"
    return f"{'+'.join(call.branches)} {call.what}{network}{''.join(map(str, call.stats.values()))}"


def report(pipe: Pipeline) -> Report:
    """Return a report of the last run of an accelerated pipeline; print it for a table.

    Raises:
        ValueError: the pipeline is not accelerated, or has not run since.
    """
    session, recipe = session_of(pipe), recipe_of(pipe)
    run = session.last_run
    if run is None:
        raise ValueError(f"this {type(pipe).__name__} has not run since flowaccel.accelerate; call it first")
    return Report(
        pipeline=type(pipe).__name__,
        recipe=recipe.name,
        families=session.families,
        images=run.images or 0,
        num_steps=run.num_steps,
        steps=tuple(_steps(run)),
        seconds=run.seconds,
        failed=run.failed,
        unsaved=None if run.stopped else _unsaved(recipe, run.records),
        counted=functools.cache(lambda: _macs(run)),
    )


def _macs(run: Run) -> tuple[int | None, int | None]:
    """Return the multiply-adds done and saved, from the shapes of every network's first call."""
    done = saved = 0
    for name, (network, shapes, rows) in run.shapes.items():
        counts = macs_by_module(network, shapes)
        if counts is None:
            return None, None
        for record in run.records:
            if record.network == name:
                left_out = int(sum(counts.get(path, 0) * number for path, number in record.not_run.items()))
                left_out += sum(counts.get(path, 0) * by - macs * rows for path, (by, macs) in record.done.items())
                left_out += record.spared * rows
                saved += left_out // rows
                done += (counts[""] * record.rows - left_out) // rows if record.what in _BY_NETWORK else 0
    return done, saved


def _steps(run: Run) -> list[StepReport]:
    return [
        StepReport(
            step=step,
            timestep=run.timesteps[run.position(step)],
            sigma=run.sigmas[run.position(step)],
            calls=tuple(record for record in run.records if record.step == step),
        )
        for step in sorted({record.step for record in run.records})
    ]


def _unsaved(recipe: Recipe, records: Sequence[CallRecord]) -> str | None:
    if any(record.what != COMPUTED for record in records):
        return None
    if not records:
        return "no network call was seen; compiled blocks call the network in ways that are not observed"
    if not recipe.accelerators:
        return "the recipe is empty"
    if all(part.kind != "hook" or part.within_calls for part in recipe.accelerators):
        return "the recipe saves steps or the work within a call, not calls"
    names = ", ".join(repr(accelerator.name) for accelerator in recipe.accelerators)
    return f"{names} had every call computed"
