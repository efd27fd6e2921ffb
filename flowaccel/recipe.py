"""Recipes: ordered accelerators, as objects, JSON and preset names; and the three verbs that put them on a pipeline."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from flowaccel.accelerators import ACCELERATORS, Accelerator, Sampler, VelocityRefiner
from flowaccel.accelerators.base import Detach
from flowaccel.accelerators.sampler import SAMPLERS
from flowaccel.errors import RecipeConflictError
from flowaccel.samplers import Blocks

FILE_NAME = "flowaccel.json"
SCHEMA = 1
_KEYS = {"schema", "name", "num_inference_steps", "accelerators"}
_ATTACHED = "_flowaccel_attached"


@dataclass(frozen=True)
class Recipe:
    """Accelerators in the order in which they are attached.

    Args:
        accelerators: the accelerators; an empty list is the untouched pipeline.
        name: how tables and plots call it.
        num_inference_steps: the number of steps to run it with, where it prescribes one; None leaves it to the caller.

    Raises:
        RecipeConflictError: two accelerators that exclude each other, or a step count that one of them contradicts.
        ValueError: a name that is not text, or a step count that is not a whole number of at least 1.
    """

    accelerators: Sequence[Accelerator] = field(default_factory=tuple)
    name: str = "recipe"
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "accelerators", tuple(self.accelerators))
        if not isinstance(self.name, str):
            raise ValueError(f"name must be text, got {self.name!r}")
        steps = self.num_inference_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, or None, got {steps!r}")
        kinds = [type(accelerator) for accelerator in self.accelerators]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise RecipeConflictError(f"recipe {self.name!r} holds {twice.name!r} twice; one of a kind works at a time")
        prescribed = {a.num_inference_steps for a in self.accelerators if a.num_inference_steps is not None}
        if self.num_inference_steps is not None:
            prescribed.add(self.num_inference_steps)
        if len(prescribed) > 1:
            raise RecipeConflictError(f"recipe {self.name!r} asks for different numbers of steps: {sorted(prescribed)}")
        object.__setattr__(self, "num_inference_steps", next(iter(prescribed), None))

    def loaded(self, pipe: Any) -> Recipe:
        """This recipe with all learned parts in memory, so that putting it on `pipe` costs no disk access."""
        return Recipe([a.loaded(pipe) for a in self.accelerators], self.name, self.num_inference_steps)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that its accelerators call besides the pipeline's own; complete once `loaded`."""
        return {name: network for a in self.accelerators for name, network in a.networks.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, without learned parts."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "num_inference_steps": self.num_inference_steps,
            "accelerators": [{"name": a.name, **a.to_dict()} for a in self.accelerators],
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `flowaccel.json` and the learned parts to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for accelerator in self.accelerators:
            accelerator.save_parts(folder)
        (folder / FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Recipe:
        """Read a recipe from a folder written by `save_pretrained`, or from a JSON file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a recipe, of a newer schema, or with an accelerator that is not known.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no recipe at {file}")
        try:
            data = json.loads(file.read_text())
            schema, entries = data["schema"], [dict(entry) for entry in data["accelerators"]]
        except (
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # ValueError: not JSON, not UTF-8, or an entry of another kind
            raise ValueError(f"{file} is not a recipe: {type(error).__name__}: {error}") from error
        if schema != SCHEMA:
            raise ValueError(f"{file} has recipe schema {schema!r}; this version of flowaccel reads {SCHEMA}")
        unknown = sorted(set(data) - _KEYS)
        if unknown:
            raise ValueError(f"{file} has unknown keys: {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
        return cls(
            accelerators=[_accelerator(entry, file.parent) for entry in entries],
            name=data.get("name", file.parent.name),
            num_inference_steps=data.get("num_inference_steps"),
        )


def _accelerator(entry: dict[str, Any], folder: Path) -> Accelerator:
    name = entry.pop("name", None)
    if not isinstance(name, str) or name not in ACCELERATORS:
        raise ValueError(f"unknown accelerator {name!r} in the recipe; known are {sorted(ACCELERATORS)}")
    try:
        return ACCELERATORS[name].from_dict(entry, folder)
    except TypeError as error:
        raise ValueError(f"accelerator {name!r} in the recipe: {error}") from error


PRESETS = {
    **{name: f"the {name} sampler" for name in SAMPLERS if name != "flowturbo"},
    "flowturbo-BLOCKS": "FlowTurbo with BLOCKS such as H2P4R2; append -consistent or -single for other refiner steps",
}
"""Preset names and what they are. `@N` after a name asks for N steps."""


def preset(name: str) -> Recipe:
    """The recipe of a preset name, such as `heun@8` or `flowturbo-H2P4R2`.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    stem, at, steps = name.partition("@")
    if at and not re.fullmatch(r"0*[1-9][0-9]*", steps):
        raise ValueError(f"the part after @ must be a number of steps, at least 1, got {name!r}")
    count = int(steps) if at else None
    if stem in SAMPLERS and stem != "flowturbo":
        return Recipe([Sampler(stem)], name=name, num_inference_steps=count)
    match = re.fullmatch(r"flowturbo-([^-]+)(?:-(released|consistent|single))?", stem)
    if match:
        options = {"blocks": match[1], "refiner_mode": match[2] or "released"}
        sampler = Sampler("flowturbo", options)
        parts: list[Accelerator] = [sampler] if _refines_nothing(match[1]) else [sampler, VelocityRefiner()]
        return Recipe(parts, name=name, num_inference_steps=count)
    near = difflib.get_close_matches(stem, PRESETS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"unknown recipe {name!r}: {hint}presets are {', '.join(PRESETS)}; or give a recipe file or folder"
    )


def _refines_nothing(blocks: str) -> bool:
    return Blocks.parse(blocks).refine == 0


RecipeLike = Recipe | Accelerator | Sequence[Accelerator] | str | Path


def resolve(recipe: RecipeLike) -> Recipe:
    """Whatever names a recipe, as a `Recipe`: itself, an accelerator, a list of them, a preset name, a file or a
    folder.

    Raises:
        ValueError, TypeError, FileNotFoundError: it names none.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Accelerator):
        return Recipe([recipe], name=recipe.name)
    if isinstance(recipe, Path) or (isinstance(recipe, str) and Path(recipe).exists()):
        return Recipe.from_pretrained(recipe)
    if isinstance(recipe, str):
        return preset(recipe)
    parts = [part for part in recipe if isinstance(part, Accelerator)] if isinstance(recipe, (list, tuple)) else None
    if parts is not None and len(parts) == len(recipe):
        return Recipe(parts)
    raise TypeError(f"recipe must be a Recipe, an accelerator, a list of them, a preset name or a path, got {recipe!r}")


def accelerate(pipe: Any, recipe: RecipeLike) -> Any:
    """Make `pipe` faster, in place; `restore` undoes it exactly.

    Args:
        pipe: a diffusers pipeline.
        recipe: a `Recipe`, an accelerator, a list of them, a preset name, or the path of a saved recipe.

    Returns:
        `pipe`.

    Raises:
        RecipeConflictError: the pipeline is accelerated already.
        ValueError: the recipe does not fit; the pipeline is left as it was.
    """
    if is_accelerated(pipe):
        raise RecipeConflictError("the pipeline is accelerated already; call flowaccel.restore(pipe) first")
    detachers: list[Detach] = []
    try:
        for accelerator in resolve(recipe).accelerators:
            detachers.append(accelerator.attach(pipe))
    except BaseException:
        _detach(detachers)
        raise
    pipe.__dict__[_ATTACHED] = detachers
    return pipe


def is_accelerated(pipe: Any) -> bool:
    """Whether `accelerate` is in force on `pipe`."""
    return _ATTACHED in pipe.__dict__


def restore(pipe: Any) -> Any:
    """Make `pipe` what it was before `accelerate`; does nothing to a pipeline that is not accelerated. Returns
    `pipe`.
    """
    _detach(pipe.__dict__.pop(_ATTACHED, []))
    return pipe


@contextmanager
def accelerated(pipe: Any, recipe: RecipeLike) -> Iterator[Any]:
    """`with accelerated(pipe, recipe): ...` - accelerate, and restore at the end whatever happens."""
    accelerate(pipe, recipe)
    try:
        yield pipe
    finally:
        restore(pipe)


def _detach(detachers: list[Detach]) -> None:
    for detach in reversed(detachers):
        detach()
