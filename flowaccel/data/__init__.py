"""Data sets that need no network."""

from flowaccel.data.digits import ImageSet as ImageSet
from flowaccel.data.digits import digits as digits
from flowaccel.data.shapes import CaptionedSet as CaptionedSet
from flowaccel.data.shapes import shape_captions as shape_captions
from flowaccel.data.shapes import shapes as shapes

DATASETS = {"digits": digits}

__all__ = ["DATASETS", "CaptionedSet", "ImageSet", "digits", "shape_captions", "shapes"]
