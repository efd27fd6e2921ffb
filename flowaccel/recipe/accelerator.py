"""What every accelerator is: a frozen configuration that can attach itself to a pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from flowaccel.recipe import serialization
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.serialization import Part

Detach = Callable[[], None]


@dataclass(frozen=True)
class Accelerator(ABC):
    """Abstract base. A subclass is final: a frozen dataclass with a `name`, entered in the registry
    (`flowaccel.recipe.registry`).

    Its fields are its configuration, and are written to recipes as they are; fields with components or learned parts
    are declared with `serialization.component` and `serialization.learned`.
    """

    name: ClassVar[str]
    """The name in recipes."""
    kind: ClassVar[Literal["scheduler", "variant", "hook"]] = "hook"
    """What it exchanges: the scheduler, the network (a variant), or nothing (a hook, which leaves all in place)."""

    within_calls: ClassVar[bool] = False
    """Whether a hook saves work within network calls rather than calls, or parts of them that are reused."""

    @abstractmethod
    def attach(self, pipe: Any) -> Detach:
        """Switch the accelerator on for `pipe` and return the function that undoes it exactly.

        Raises:
            ValueError: the accelerator does not fit the pipeline; nothing was changed.
        """

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-serialisable data; a learned part is the name of its sub-folder."""
        return serialization.encode(self, {})

    @property
    def parts(self) -> dict[str, Part]:
        """The learned parts that it holds, by the sub-folder that they are written to."""
        parts: dict[str, Part] = {}
        serialization.encode(self, parts)
        return parts

    @property
    def fitted(self) -> bool:
        """Whether it holds what was trained or fitted on one network and fits no other; then its recipe names that
        network.
        """
        return bool(self.parts)

    @property
    def tags(self) -> frozenset[str]:
        """What the rules of `flowaccel.recipe.compatibility` know it by: its name and its kind."""
        return frozenset({self.name, Tag(self.kind)})

    def loaded(self, pipe: Any) -> Self:
        """This accelerator with its learned parts in memory, so that attaching it costs nothing; without any,
        itself.
        """
        loaded: Self = serialization.load_parts(self)
        return loaded

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that it calls besides the pipeline's own, by name; known once `loaded`."""
        return {name: part.value for name, part in self.parts.items() if isinstance(part.value, nn.Module)}

    def stand_in(self, pipe: Any) -> nn.Module | None:
        """The network that it will put in the place of the pipeline's own, the same object every time; None for those
        that leave it. Known once `loaded`.
        """
        return None

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps that this accelerator prescribes, or None."""
        return None
