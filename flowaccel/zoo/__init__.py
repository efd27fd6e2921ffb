"""Small reference checkpoints that this repository trained itself, each with the command that rebuilds it.

A zoo name is written `zoo:NAME` wherever a path or a Hub id is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flowaccel.errors import WeightsNotFoundError, did_you_mean

PREFIX = "zoo:"
_ROOT = Path(__file__).parent

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint of the zoo."""

    name: str
    kind: str
    """Kind of the checkpoint: `pipeline`, `recipe`, `features` or `clip`."""
    description: str
    features: str | None = None
    """Feature network for this pipeline's images. This and the fields below are the evaluator's defaults."""
    reference: str | None = None
    """Set of reference images."""
    prompts: str | None = None
    """Set of prompts to sample."""
    clip: str | None = None
    """CLIP network for its prompts."""
    attributes: str | None = None
    """Attribute set that reads from prompts what images must show."""
    metrics: tuple[str, ...] | None = None
    """Metrics that are most informative for this pipeline."""
    guidance_scale: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of every pipeline call."""

    @property
    def folder(self) -> Path:
        """Folder of the weights."""
        return _ROOT / self.name

    @property
    def command(self) -> str:
        """Command that rebuilds the checkpoint."""
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
            name="sit-digits-width",
            kind="recipe",
            description="for zoo:sit-digits: half of the heads and channels, fewer at noise than near the image",
        ),
        Entry(
            name="sit-digits-width-tokens",
            kind="recipe",
            description="the same with feed-forwards that leave out tokens too",
        ),
        Entry(
            name="sit-digits-moe",
            kind="recipe",
            description="for zoo:sit-digits: eight experts in every second block, of which a token takes one or so",
        ),
        Entry(
            name="sit-digits-mediators",
            kind="recipe",
            description="for zoo:sit-digits: attention through 4 mediators in the first half of a run, then 16",
        ),
        Entry(
            name="sit-digits-policy",
            kind="recipe",
            description="for zoo:sit-digits: heads that choose every image's steps, and which of them reuse the blocks",
        ),
        Entry(
            name="digits-features",
            kind="features",
            description="convolutional digit classifier; its 32 features serve Frechet distances and class accuracy",
        ),
        Entry(
            name="t2i-shapes",
            kind="pipeline",
            description="stock StableDiffusion3Pipeline: text to 32x32 pictures of coloured shapes",
            features="zoo:shapes-features",
            reference="zoo:shapes",
            prompts="zoo:shapes",
            clip="zoo:shapes-clip",
            attributes="zoo:shapes",
            metrics=("fid", "clip_score", "attribute_accuracy", "rel_l2"),
            guidance_scale=3.0,
            arguments={"max_sequence_length": 16},  # all zeros, as its T5 returns nothing else; 256 by default
        ),
        Entry(
            name="shapes-features",
            kind="features",
            description="classifier of what captions of shapes state; its 64 features serve Frechet distances",
        ),
        Entry(
            name="shapes-clip",
            kind="clip",
            description="CLIP of pictures of shapes and their captions, for the CLIP score",
        ),
    )
}


def find(table: Mapping[str, Found], name: str, what: str) -> Found:
    """Return the entry of `table` under `name`, with or without `zoo:`.

    Args:
        table: entries by names without `zoo:`.
        name: name of the entry.
        what: name of the table's entries, for the message.

    Raises:
        ValueError: no such entry; the message lists the closest one and all names.
    """
    stem = name.removeprefix(PREFIX)
    if stem not in table:
        hint, known = did_you_mean(stem, table, prefix=PREFIX), ", ".join(PREFIX + found for found in table)
        raise ValueError(f"unknown {what} {name!r}: {hint}there are {known}")
    return table[stem]


def entry(name: str) -> Entry:
    """Return the entry called `name`, with or without `zoo:`.

    Raises:
        ValueError: no such entry; the message names those there are.
    """
    return find(ENTRIES, name, "zoo entry")


def folder(name: str) -> Path:
    """Return the folder of an entry's weights.

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


def located(name: str | Path) -> str | Path:
    """Return the folder of `zoo:NAME`, and any other name as it is; raises as `folder`."""
    return folder(str(name)) if str(name).startswith(PREFIX) else name


def recipe_folder(name: str) -> Path:
    """Return the folder of a recipe of the zoo.

    Raises:
        ValueError: no such entry, or one of another kind.
        WeightsNotFoundError: the weights are not installed.
    """
    return folder_of_kind(name, "recipe")


def folder_of_kind(name: str, kind: str) -> Path:
    """Return the folder of an entry that must be of a given kind; raises as `recipe_folder`."""
    if entry(name).kind != kind:
        known = ", ".join(PREFIX + found.name for found in ENTRIES.values() if found.kind == kind)
        wanted = "feature network" if kind == "features" else kind
        raise ValueError(f"{name} is a {entry(name).kind}, not a {wanted}; there are {known}")
    return folder(name)
