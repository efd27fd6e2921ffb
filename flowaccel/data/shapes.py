"""Captioned pictures of coloured shapes, 3x32x32: any number of them, drawn by this module, and reproducible by seed.

A picture shows one shape at one of five places, two to four alike ones, or two different ones side by side or one above
the other; its caption states everything that `ATTRIBUTES` lists for such a picture. Some combinations of a colour and a
shape (`HELD_OUT`) are never in the pictures that generators are trained on, so that a generator can be asked for what
it has not seen. Original work of this project, under its licence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 32

COLOURS = {
    "red": (0.92, 0.16, 0.16),
    "green": (0.16, 0.75, 0.24),
    "blue": (0.20, 0.36, 0.96),
    "yellow": (0.96, 0.86, 0.16),
    "purple": (0.66, 0.22, 0.82),
    "white": (0.96, 0.96, 0.96),
}
"""RGB values of the colours, in [0, 1]."""
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
"""Names of the shapes, and their plurals."""
TEXTURES = ("solid", "striped", "hollow")
SIZES = ("small", "large")
COUNTS = ("a", "two", "three", "four")
PLACES = {
    "at the top left": (9.0, 9.0),
    "at the top right": (23.0, 9.0),
    "at the bottom left": (9.0, 23.0),
    "at the bottom right": (23.0, 23.0),
    "in the middle": (16.0, 16.0),
}
"""Centres (x, y) in pixels, with y pointing down."""
RELATIONS = {"left of": ("beside", False), "right of": ("beside", True), "above": ("stacked", False)} | {
    "below": ("stacked", True)
}
"""Phrases between two objects: their arrangement, and whether the object named first is the right or lower one."""
PAIRS = {"beside": ((9.0, 16.0), (23.0, 16.0)), "stacked": ((16.0, 9.0), (16.0, 23.0))}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "arrangement": (*PLACES, "several", *PAIRS),
    "count": COUNTS,
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "second texture": TEXTURES,
    "second colour": tuple(COLOURS),
    "second shape": tuple(SHAPES),
}
"""Attributes that can be stated about a picture, and their values. In a pair, the first object is the left or upper
one."""
NOT_STATED = -1

HELD_OUT = frozenset({("red", "triangle"), ("blue", "cross"), ("yellow", "circle"), ("white", "square")})
"""Combinations (colour, shape) that are in no picture of the split `generator`."""

Combinations = Literal["all", "seen", "held_out"]

SPLITS = {"generator": 24_000, "features": 24_000, "clip": 24_000, "reference": 2000, "prompts": 500}
"""Independent splits, and their default numbers of pictures."""
_SEED = 41
_CELLS = (6.2, 16.0, 25.8)


def _any_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_THING = f"{_any_of(TEXTURES)} {_any_of(COLOURS)} "
_ONE = _THING + _any_of(SHAPES)
_SINGLE = re.compile(f"a {_any_of(SIZES)} {_ONE} {_any_of(PLACES)}")
_SEVERAL = re.compile(f"{_any_of(COUNTS[1:])} {_THING}{_any_of(SHAPES.values())}")
_PAIR = re.compile(f"a {_ONE} {_any_of(RELATIONS)} a {_ONE}")


@dataclass(frozen=True)
class _Object:
    texture: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class _Scene:
    """Description of a picture to draw: rows of (x, y, radius) with the object at each."""

    caption: str
    objects: tuple[_Object, ...]
    where: tuple[tuple[float, float, float], ...]
    background: float


@dataclass(frozen=True, kw_only=True)
class CaptionedSet:
    """Images with captions, and the attributes that the captions state."""

    images: Tensor
    """Images (N, 3, 32, 32), float32 in [-1, 1]."""
    captions: tuple[str, ...]
    attributes: Tensor
    """Indices (N, 9) int64 of the values of the `ATTRIBUTES`, `NOT_STATED` if a caption states none."""

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True, kw_only=True)
class AttributeSet:
    """Attributes that captions of a data set can state about their pictures, and how to read them."""

    names: tuple[str, ...]
    """Names of the A attributes."""
    read: Callable[[Sequence[str]], Tensor]
    """Maps N captions to the indices (N, A) int64 of the attributes' values, `NOT_STATED` if a caption leaves it
    open; raises a ValueError for a caption that it cannot read."""


def shapes(
    split: str = "generator", count: int | None = None, combinations: Combinations | None = None
) -> CaptionedSet:
    """Return the first `count` pictures of a split.

    Args:
        split: one of `SPLITS`.
        count: number of pictures; a longer set begins with the shorter one.
        combinations: `seen` leaves out the pictures with a combination of `HELD_OUT`, `held_out` the others; the
            default is `all` for the training sets of metrics, `features` and `clip`, else `seen`.

    Raises:
        ValueError: unknown split, or fewer than one picture.
    """
    chosen = _scenes(split, count, combinations)
    return CaptionedSet(
        images=torch.cat([_draw(chosen[i : i + 500]) for i in range(0, len(chosen), 500)]),
        captions=tuple(scene.caption for scene in chosen),
        attributes=attributes_of([scene.caption for scene in chosen]),
    )


def shape_captions(
    split: str = "prompts", count: int | None = None, combinations: Combinations | None = None
) -> tuple[str, ...]:
    """Return the captions of `shapes` without the pictures; of the split `prompts` by default.

    Raises:
        ValueError: as for `shapes`.
    """
    return tuple(scene.caption for scene in _scenes(split, count, combinations))


def caption_words() -> tuple[str, ...]:
    """Return all words of the captions, sorted."""
    stated = {word for values in ATTRIBUTES.values() for value in values for word in value.split()}
    stated -= {"several", *PAIRS}
    return tuple(sorted(stated | {word for relation in RELATIONS for word in relation.split()} | {*SHAPES.values()}))


def attributes_of(captions: Sequence[str]) -> Tensor:
    """Return the attributes that captions state, (N, 9) int64 as in `CaptionedSet.attributes`.

    Raises:
        ValueError: a caption that this data set cannot have; the message shows two that it can.
    """
    return torch.tensor([_stated(caption) for caption in captions], dtype=torch.int64).reshape(-1, len(ATTRIBUTES))


shape_attributes = AttributeSet(names=tuple(ATTRIBUTES), read=attributes_of)


def holds_held_out(caption: str) -> bool:
    """Return whether a caption has a combination of `HELD_OUT`."""
    one, several = HELD_OUT, {(colour, SHAPES[shape]) for colour, shape in HELD_OUT}
    return any(pair in one | several for pair in pairwise(caption.split()))


def _stated(caption: str) -> list[int]:
    stated = _parsed(caption.strip().lower())
    if stated is None:
        unknown = [word for word in caption.lower().split() if word not in caption_words()]
        raise ValueError(
            f"caption {caption!r} is none of the data set shapes"
            + (f" (it does not know {', '.join(map(repr, unknown))})" if unknown else "")
            + "; its captions read 'a small striped red circle at the top left', 'three solid blue squares' or "
            "'a hollow green square above a solid white cross'"
        )
    return [values.index(stated[name]) if name in stated else NOT_STATED for name, values in ATTRIBUTES.items()]


def _parsed(caption: str) -> dict[str, str] | None:
    """Return the values by attribute, or None if the caption is not valid."""
    thing = ("texture", "colour", "shape")
    if found := _SINGLE.fullmatch(caption):
        return dict(zip(("size", *thing, "arrangement"), found.groups(), strict=True)) | {"count": "a"}
    if found := _SEVERAL.fullmatch(caption):
        count, texture, colour, plural = found.groups()
        shape = next(name for name, several in SHAPES.items() if several == plural)
        return {"arrangement": "several", "count": count} | dict(zip(thing, (texture, colour, shape), strict=True))
    if found := _PAIR.fullmatch(caption):
        words = found.groups()
        arrangement, swapped = RELATIONS[words[3]]
        first, second = (words[4:], words[:3]) if swapped else (words[:3], words[4:])
        seconds = {f"second {name}": value for name, value in zip(thing, second, strict=True)}
        return {"arrangement": arrangement} | dict(zip(thing, first, strict=True)) | seconds
    return None


def _scenes(split: str, count: int | None, combinations: Combinations | None) -> list[_Scene]:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    count = SPLITS[split] if count is None else count
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    wanted = combinations or ("all" if split in ("features", "clip") else "seen")
    seed = _SEED + list(SPLITS).index(split)
    return [_scene(np.random.default_rng((seed, index)), wanted) for index in range(count)]


def _scene(rng: np.random.Generator, combinations: Combinations) -> _Scene:
    """Draw scenes until the combinations are as wanted: rejection leaves all other distributions unchanged."""
    while True:
        scene = _any_scene(rng)
        held_out = holds_held_out(scene.caption)
        if combinations == "all" or held_out == (combinations == "held_out"):
            return scene


def _any_scene(rng: np.random.Generator) -> _Scene:
    kind = rng.choice(("single", "several", "pair"), p=(0.45, 0.2, 0.35))
    background = float(rng.uniform(0.05, 0.3))
    thing = _object(rng)
    if kind == "single":
        size, place = str(rng.choice(SIZES)), str(rng.choice(list(PLACES)))
        radius = rng.uniform(3.8, 4.6) if size == "small" else rng.uniform(6.6, 7.6)
        where = _jittered(rng, PLACES[place], 1.2, radius)
        return _Scene(f"a {size} {thing} {place}", (thing,), (where,), background)
    if kind == "several":
        count = int(rng.integers(2, len(COUNTS) + 1))
        cells = rng.permutation(len(_CELLS) ** 2)[:count]
        radius = rng.uniform(3.5, 4.0)
        places = tuple(
            _jittered(rng, (_CELLS[cell % len(_CELLS)], _CELLS[cell // len(_CELLS)]), 0.8, radius) for cell in cells
        )
        caption = f"{COUNTS[count - 1]} {thing.texture} {thing.colour} {SHAPES[thing.shape]}"
        return _Scene(caption, (thing,) * count, places, background)
    other = _object(rng)
    relation = str(rng.choice(list(RELATIONS)))
    arrangement, swapped = RELATIONS[relation]
    places = tuple(_jittered(rng, centre, 1.2, rng.uniform(4.6, 5.6)) for centre in PAIRS[arrangement])
    caption = f"a {thing} {relation} a {other}"
    return _Scene(caption, (other, thing) if swapped else (thing, other), places, background)


def _object(rng: np.random.Generator) -> _Object:
    return _Object(str(rng.choice(TEXTURES)), str(rng.choice(list(COLOURS))), str(rng.choice(list(SHAPES))))


def _jittered(
    rng: np.random.Generator, centre: tuple[float, float], reach: float, radius: float
) -> tuple[float, float, float]:
    x, y = np.asarray(centre) + rng.uniform(-reach, reach, 2)
    return float(x), float(y), float(radius)


def _draw(scenes: Sequence[_Scene]) -> Tensor:
    """Draw scenes as images (N, 3, 32, 32), float32 in [-1, 1], with edges one pixel wide."""
    images = torch.tensor([scene.background for scene in scenes]).reshape(-1, 1, 1, 1)
    images = images.expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    for layer in range(max(len(scene.objects) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if layer < len(scene.objects)]
        things = [scenes[i].objects[layer] for i in rows]
        cover = _cover(things, torch.tensor([scenes[i].where[layer] for i in rows]))
        colour = torch.tensor([COLOURS[thing.colour] for thing in things]).reshape(-1, 3, 1, 1)
        images[rows] = images[rows] * (1 - cover) + colour * cover
    return images * 2 - 1


def _cover(things: Sequence[_Object], where: Tensor) -> Tensor:
    """Return the coverage of each pixel by its object, (N, 1, 32, 32) in [0, 1]; `where` is (N, 3)."""
    centres = torch.arange(IMAGE_SIZE) + 0.5
    x = centres.reshape(1, 1, -1) - where[:, 0].reshape(-1, 1, 1)
    y = centres.reshape(1, -1, 1) - where[:, 1].reshape(-1, 1, 1)
    radius = where[:, 2].reshape(-1, 1, 1)
    distances = _distances(x, y, radius)
    distance = torch.stack([distances[thing.shape][i] for i, thing in enumerate(things)])
    hollow = torch.tensor([thing.texture == "hollow" for thing in things]).reshape(-1, 1, 1)
    rim = (0.26 * radius).clamp_min(1.1)
    cover = (0.5 - torch.where(hollow, torch.maximum(distance, -distance - rim), distance)).clamp(0, 1)
    striped = torch.tensor([thing.texture == "striped" for thing in things]).reshape(-1, 1, 1)
    bands = (0.5 + 1.5 * torch.cos(y * (2 * torch.pi / 3.6))).clamp(0.25, 1)
    return (cover * torch.where(striped, bands, 1.0)).unsqueeze(1)


def _distances(x: Tensor, y: Tensor, radius: Tensor) -> dict[str, Tensor]:
    """Return signed distances in pixels to the outlines of all `SHAPES`, negative inside; areas are about equal."""
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    slope = (3**0.5 / 2 * x.abs() - y / 2) - 0.6 * radius
    triangle = torch.maximum(slope, y - 0.7 * radius)
    arm = 0.42 * radius
    bar, beam = torch.maximum(x.abs() - arm, y.abs() - radius), torch.maximum(x.abs() - radius, y.abs() - arm)
    return {"circle": circle, "square": square, "triangle": triangle, "cross": torch.minimum(bar, beam)}
