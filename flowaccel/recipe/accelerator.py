"""Base class of accelerators: a frozen configuration that can attach itself to a pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from flowaccel.hooks import Pipeline
from flowaccel.recipe import serialization
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.serialization import Part

Detach = Callable[[], None]


@dataclass(frozen=True)
class Accelerator(ABC):
    """Abstract base class of accelerators.

    A subclass is final: a frozen dataclass with a `name`, entered in the registry (`flowaccel.recipe.registry`).

    Its fields are its configuration, and are written to recipes as they are; fields with components or learned parts
    are declared with `serialization.component` and `serialization.learned`.
    """

    name: ClassVar[str]
    """Name in recipes."""
    kind: ClassVar[Literal["scheduler", "variant", "hook"]] = "hook"
    """Component that it replaces: the scheduler, the network (a variant), or none (a hook)."""

    within_calls: ClassVar[bool] = False
    """Whether a hook saves work within network calls, instead of skipping calls or reusing parts of them."""

    @abstractmethod
    def attach(self, pipe: Pipeline) -> Detach:
        """Enable the accelerator on `pipe` and return a function that undoes it exactly.

        Raises:
            ValueError: the accelerator does not fit the pipeline; nothing was changed.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-serialisable data; a learned part is the name of its sub-folder."""
        return serialization.encode(self, {})

    @property
    def parts(self) -> dict[str, Part]:
        """Learned parts of the accelerator, by the sub-folder that they are written to."""
        parts: dict[str, Part] = {}
        serialization.encode(self, parts)
        return parts

    @property
    def fitted(self) -> bool:
        """Whether the accelerator was trained or fitted for one network; its recipe then names that network."""
        return bool(self.parts)

    @property
    def tags(self) -> frozenset[str]:
        """Tags by which the rules of `flowaccel.recipe.compatibility` select the accelerator: its name and its kind."""
        return frozenset({self.name, Tag(self.kind)})

    def loaded(self, pipe: Pipeline) -> Self:
        """Return this accelerator with its learned parts in memory, or itself if it has none.

        Attaching the result reads nothing from disk.
        """
        loaded: Self = serialization.load_parts(self)
        return loaded

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Networks that the accelerator calls besides the pipeline's own, by name; known once `loaded`."""
        return {name: part.value for name, part in self.parts.items() if isinstance(part.value, nn.Module)}

    def stand_in(self, pipe: Pipeline) -> nn.Module | None:
        """Return the network that will replace the pipeline's own, the same object every time, or None.

        Known once `loaded`.
        """
        return None

    @property
    def num_inference_steps(self) -> int | None:
        """Number of steps that this accelerator prescribes, or None."""
        return None
