"""Data sets that need no network."""

from flowaccel.data.digits import ImageSet as ImageSet
from flowaccel.data.digits import digits as digits

DATASETS = {"digits": digits}

__all__ = ["DATASETS", "ImageSet", "digits"]
