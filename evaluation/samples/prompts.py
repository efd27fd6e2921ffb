"""Conditions of samples: classes or prompts, assigned to sample ids in turn."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaccel import zoo
from flowaccel.data import PROMPT_SETS
from flowaccel.evaluation.samples.store import write_atomically

PROMPTS = "prompts.json"


class Conditions(ABC):
    """Abstract base of conditions, the pipeline arguments of every sample id."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in the result file."""

    @abstractmethod
    def arguments(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the keyword arguments of a pipeline call that makes the samples `ids`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return a JSON-serialisable description that identifies these conditions."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of different conditions."""

    def labels(self, ids: Sequence[int]) -> Tensor | None:
        """Return the classes (N,), or None where there are no classes."""
        return None

    def texts(self, ids: Sequence[int]) -> tuple[str, ...] | None:
        """Return the N prompts, or None where there are none."""
        return None

    def save(self, folder: Path) -> None:
        """Write to a run folder what `describe` only hashes; nothing for classes."""
        return


@dataclass(frozen=True)
class Classes(Conditions):
    """Class ids, assigned in turn: sample i shows `classes[i % len(classes)]`.

    Raises:
        ValueError: no class.
    """

    classes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("classes must name at least one class")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def name(self) -> str:
        """Name such as `"10 classes"`."""
        return f"{len(self.classes)} classes"

    def arguments(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return `{"class_labels": [...]}`."""
        return {"class_labels": self._of(ids)}

    def describe(self) -> dict[str, Any]:
        """Return the list of classes."""
        return {"classes": list(self.classes)}

    def labels(self, ids: Sequence[int]) -> Tensor:
        """Return the classes (N,), int64."""
        return torch.tensor(self._of(ids))

    def _of(self, ids: Sequence[int]) -> list[int]:
        return [self.classes[sample_id % len(self.classes)] for sample_id in ids]


@dataclass(frozen=True)
class Prompts(Conditions):
    """Prompts, assigned in turn: sample i shows `prompts[i % len(prompts)]`.

    Raises:
        ValueError: no prompt.
    """

    prompts: tuple[str, ...]
    source: str = "prompts"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"{self.source} holds no prompt")

    @classmethod
    def from_file(cls, path: str | Path) -> Prompts:
        """Read one prompt per line of a UTF-8 text file.

        Empty lines do not count, all others do, also if they are equal.

        Lines end with a line feed, a carriage return or both; the other characters at which `str.splitlines` would cut,
        such as U+2028, belong to the prompt.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not UTF-8, or no prompt in it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there is no file of prompts {path}; give a UTF-8 text file with one prompt a line"
            )
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # a byte order mark is no text; newlines become \n
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        return cls(tuple(line.strip() for line in text.split("\n") if line.strip()), source=Path(path).name)

    @classmethod
    def from_zoo(cls, name: str) -> Prompts:
        """Load one of `flowaccel.data.PROMPT_SETS`, with or without `zoo:`.

        Raises:
            ValueError: unknown set; the message names those there are.
        """
        prompts = zoo.find(PROMPT_SETS, name, "set of prompts")()
        return cls(tuple(prompts), source=zoo.PREFIX + name.removeprefix(zoo.PREFIX))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def name(self) -> str:
        """Name such as `"FILE, 5000 prompts"`."""
        return f"{self.source}, {len(self.prompts)} prompts"

    def arguments(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return `{"prompt": [...]}`."""
        return {"prompt": list(self.texts(ids))}

    def texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the N prompts."""
        return tuple(self.prompts[sample_id % len(self.prompts)] for sample_id in ids)

    def describe(self) -> dict[str, Any]:
        """Return the number of prompts and a hash of their text."""
        return {
            "prompts": len(self.prompts),
            "sha256": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
        }

    def save(self, folder: Path) -> None:
        """Write `prompts.json`."""
        write_atomically(folder / PROMPTS, json.dumps(self.prompts, ensure_ascii=False).encode())


def load_conditions(described: dict[str, Any], folder: Path) -> Conditions:
    """Load the conditions of a finished run from their description in the result file.

    Raises:
        ValueError: `prompts.json` of the run is missing or holds other prompts.
    """
    if "classes" in described:
        return Classes(tuple(described["classes"]))
    path = folder / PROMPTS
    try:
        prompts = Prompts(tuple(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the prompts of the run cannot be read from {path} ({error}); evaluate again") from error
    if prompts.describe() != described:
        raise ValueError(f"{path} does not hold the prompts that the run used; evaluate again")
    return prompts
