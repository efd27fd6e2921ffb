"""Candidates of an evaluation, one for each row: the untouched pipeline, a recipe, or another library's accelerator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from flowaccel import Recipe, accelerated
from flowaccel.evaluation.baselines.baselines import NATIVE, Baseline, check_native, native
from flowaccel.evaluation.baselines.subprocess_worker import loaded_from
from flowaccel.evaluation.features.extractors import fingerprint
from flowaccel.hooks import Pipeline

BASELINE = "baseline"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Way of making a row's images; this class is the untouched pipeline, at some number of steps."""

    name: str
    """Name of its row."""
    steps: int
    family: str = BASELINE
    """Rows of one family have one colour in plots."""
    baseline: Baseline | None = None
    """The other library's accelerator, for the report."""

    @property
    def by_batch(self) -> bool:
        """Whether it decides for the whole batch by its content, so that images depend on their batch."""
        return False

    @property
    def own_process(self) -> bool:
        """Whether it is made and timed in a process of its own."""
        return False

    @property
    def afresh(self) -> bool:
        """Whether it is switched on for one call at a time, because its state may outlive a call."""
        return False

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Learned networks beside the pipeline's own, by name."""
        return {}

    def stand_ins(self, pipe: Pipeline) -> list[nn.Module]:
        """Return the networks that take the place of the pipeline's."""
        return []

    def describe(self) -> list[dict[str, Any]]:
        """Return what its samples depend on besides the pipeline, JSON-serialisable."""
        return []

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of its learned parts."""
        return {}

    def check_early(self, pipe: Pipeline) -> None:
        """Raise an error where something is missing; before anything is computed."""

    def check(self, pipe: Pipeline, sample: Callable[[int], object]) -> None:
        """Raise an UnsupportedModelError where it does not work with the pipeline; `sample(steps)` makes one image."""

    def switched_on(self, pipe: Pipeline, **settings: Any) -> AbstractContextManager[Any]:
        """Return a context in which the pipeline is accelerated; `settings` are those of a calibration."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class RecipeCandidate(Candidate):
    """Recipe of this library."""

    recipe: Recipe

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Learned networks of the recipe, by name."""
        return self.recipe.networks

    def stand_ins(self, pipe: Pipeline) -> list[nn.Module]:
        """Return the networks that its variants put in the place of the pipeline's."""
        return [module for a in self.recipe.accelerators if (module := a.stand_in(pipe)) is not None]

    def describe(self) -> list[dict[str, Any]]:
        """Return its accelerators with their options."""
        return [{"name": a.name, **a.to_dict()} for a in self.recipe.accelerators]

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the accelerators' parts."""
        return {name: fingerprint(part.network) for a in self.recipe.accelerators for name, part in a.parts.items()}

    def switched_on(self, pipe: Pipeline, **settings: Any) -> AbstractContextManager[Any]:
        """Return a context with the recipe; even an empty one is observed, which the untouched pipeline must not be."""
        return accelerated(pipe, self.recipe) if self.recipe.accelerators else nullcontext()


@dataclass(frozen=True, kw_only=True)
class BaselineCandidate(Candidate):
    """Accelerator of another library, with its defects."""

    baseline: Baseline

    @property
    def by_batch(self) -> bool:
        """Whether its library decides for the whole batch."""
        return self.baseline.by_batch

    @property
    def afresh(self) -> bool:
        """Whether it is switched on for one call at a time, True."""
        return True

    @property
    def own_process(self) -> bool:
        """Whether its library patches classes, as all do but diffusers itself."""
        return self.baseline.family != NATIVE

    def describe(self) -> list[dict[str, Any]]:
        """Return its options and its package's version."""
        return [self.baseline.describe()]

    def check_early(self, pipe: Pipeline) -> None:
        """Raise a MissingExtraError without its package, a ValueError if its process could not load the pipeline."""
        self.baseline.describe()
        if self.own_process:
            loaded_from(pipe, self.baseline)

    def check(self, pipe: Pipeline, sample: Callable[[int], object]) -> None:
        """Try a cache of diffusers on a short call; another process checks what it runs itself."""
        if not self.own_process:
            check_native(pipe, self.baseline, sample, self.steps)

    def switched_on(self, pipe: Pipeline, **settings: Any) -> AbstractContextManager[Any]:
        """Return a context with diffusers' cache."""
        return native(pipe, self.baseline, **settings)
