"""Small reference checkpoints that this repository trained itself, each with the command that rebuilds it.

A zoo name is written `zoo:NAME` wherever a path or a Hub id is accepted.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from flowaccel.errors import WeightsNotFoundError
from flowaccel.models import DigitsClassifier

PREFIX = "zoo:"
_ROOT = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint of the zoo."""

    name: str
    kind: str
    """`pipeline` or `features`."""
    description: str
    features: str | None = None
    """The feature network that fits this pipeline's images."""
    reference: str | None = None
    """The reference images that fit them."""

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        return _ROOT / self.name

    @property
    def command(self) -> str:
        """The command that rebuilds it."""
        return f"flowaccel zoo build {self.name} --out DIR"


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            name="sit-digits",
            kind="pipeline",
            description="SiT with 64 tokens and 12 blocks on 8x8 handwritten digits, with its velocity refiner",
            features="zoo:digits-features",
            reference="zoo:digits",
        ),
        Entry(
            name="digits-features",
            kind="features",
            description="convolutional digit classifier; its 32 features serve Frechet distances and class accuracy",
        ),
    )
}


def entry(name: str) -> Entry:
    """The entry called `name`, with or without `zoo:`.

    Raises:
        ValueError: no such entry; the message names those there are.
    """
    stem = name.removeprefix(PREFIX)
    if stem not in ENTRIES:
        near = difflib.get_close_matches(stem, ENTRIES, n=1)
        hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
        raise ValueError(
            f"unknown zoo entry {name!r}: {hint}there are {', '.join(PREFIX + known for known in ENTRIES)}"
        )
    return ENTRIES[stem]


def folder(name: str) -> Path:
    """The folder of an entry's weights.

    Raises:
        ValueError: no such entry.
        WeightsNotFoundError: the weights are not installed.
    """
    found = entry(name)
    if not found.folder.is_dir():
        raise WeightsNotFoundError(
            f"the weights of {PREFIX}{found.name} are missing at {found.folder}; `{found.command}`"
        )
    return found.folder


def load_classifier(name: str) -> DigitsClassifier:
    """A feature network of the zoo in float32, ready for evaluation.

    Raises:
        ValueError: no such entry, or one of another kind.
        WeightsNotFoundError: the weights are not installed.
    """
    if entry(name).kind != "features":
        known = ", ".join(PREFIX + found.name for found in ENTRIES.values() if found.kind == "features")
        raise ValueError(f"{name} is a {entry(name).kind}, not a feature network; there are {known}")
    return DigitsClassifier.from_pretrained(folder(name)).float().eval()
