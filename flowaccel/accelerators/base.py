"""What every accelerator is: a frozen configuration that can attach itself to a pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

Detach = Callable[[], None]


@dataclass(frozen=True)
class Accelerator(ABC):
    """Abstract base. A subclass is final: a frozen dataclass that defines the methods below."""

    name: ClassVar[str]
    """The name in recipes."""

    @abstractmethod
    def attach(self, pipe: Any) -> Detach:
        """Switch the accelerator on for `pipe` and return the function that undoes it exactly.

        Raises:
            ValueError: the accelerator does not fit the pipeline; nothing was changed.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-serialisable data, without learned parts."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any], folder: Path | None = None) -> Self:
        """The inverse of `to_dict`; `folder` is where `save_parts` wrote, if anywhere."""

    def loaded(self, pipe: Any) -> Accelerator:
        """This accelerator with its learned parts in memory, so that attaching it costs nothing; without any,
        itself.
        """
        return self

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that it calls besides the pipeline's own, by name; known once `loaded`."""
        return {}

    def save_parts(self, folder: Path) -> None:
        """Write learned parts below `folder`; without any, nothing."""
        return None

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps that this accelerator prescribes, or None."""
        return None
