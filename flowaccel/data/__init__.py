"""Data sets that need no network.

The tables below are what `zoo:SET` may name: images to train on, reference images, prompts, and readers of
what prompts state.
"""

from collections.abc import Callable, Sequence
from functools import partial

from flowaccel.data.digits import ImageSet as ImageSet
from flowaccel.data.digits import digits as digits
from flowaccel.data.shapes import AttributeSet as AttributeSet
from flowaccel.data.shapes import CaptionedSet as CaptionedSet
from flowaccel.data.shapes import shape_attributes as shape_attributes
from flowaccel.data.shapes import shape_captions as shape_captions
from flowaccel.data.shapes import shapes as shapes

DATASETS: dict[str, Callable[[str], ImageSet | CaptionedSet]] = {"digits": digits, "shapes": shapes}
"""Images with classes or captions: split -> set."""
REFERENCE_SETS: dict[str, Callable[[], ImageSet | CaptionedSet]] = {
    "digits": partial(digits, "reference"),
    "shapes": partial(shapes, "reference"),
    "shapes-held-out": partial(shapes, "reference", combinations="held_out"),
}
"""What generated images are compared with."""
PROMPT_SETS: dict[str, Callable[[], Sequence[str]]] = {
    "shapes": partial(shape_captions, "prompts"),
    "shapes-held-out": partial(shape_captions, "prompts", combinations="held_out"),
}
"""Prompts of embedded data; of the set `shapes-held-out` each names a combination that no training picture has."""
ATTRIBUTE_SETS = {"shapes": shape_attributes}
"""What prompts state about their pictures."""

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
