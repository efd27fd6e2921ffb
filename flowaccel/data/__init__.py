"""Data sets that need no network.

The tables below are the sets of `zoo:SET`: training images, reference images, prompts, and the attributes that
prompts state.
"""

from collections.abc import Callable, Sequence
from functools import partial

from flowaccel.data.digits import ImageSet, digits
from flowaccel.data.shapes import AttributeSet, CaptionedSet, shape_attributes, shape_captions, shapes

DATASETS: dict[str, Callable[[str], ImageSet | CaptionedSet]] = {"digits": digits, "shapes": shapes}
"""Functions that load a split of images with classes or captions, by data set."""
REFERENCE_SETS: dict[str, Callable[[], ImageSet | CaptionedSet]] = {
    "digits": partial(digits, "reference"),
    "shapes": partial(shapes, "reference"),
    "shapes-held-out": partial(shapes, "reference", combinations="held_out"),
}
"""Functions that load the images that generated ones are compared with, by reference set."""
PROMPT_SETS: dict[str, Callable[[], Sequence[str]]] = {
    "shapes": partial(shape_captions, "prompts"),
    "shapes-held-out": partial(shape_captions, "prompts", combinations="held_out"),
}
"""Functions that load the prompts of embedded data, by prompt set.

Each prompt of `shapes-held-out` has a combination that no training picture has.
"""
ATTRIBUTE_SETS = {"shapes": shape_attributes}
"""Attributes that prompts state about their pictures, by data set."""

__all__ = [
    "ATTRIBUTE_SETS",
    "DATASETS",
    "PROMPT_SETS",
    "REFERENCE_SETS",
    "AttributeSet",
    "CaptionedSet",
    "ImageSet",
    "digits",
    "shape_attributes",
    "shape_captions",
    "shapes",
]
