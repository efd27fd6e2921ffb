"""Torch modules that learned accelerators are made of."""

from flowaccel.modules.routers import TokenRouter as TokenRouter
from flowaccel.modules.routers import WidthRouter as WidthRouter
from flowaccel.modules.routers import logistic_noise as logistic_noise
from flowaccel.modules.routers import never_narrower as never_narrower
from flowaccel.modules.routers import straight_through as straight_through
from flowaccel.modules.routers import widened as widened
from flowaccel.modules.sliced import SliceCache as SliceCache
from flowaccel.modules.sliced import SlicedLinear as SlicedLinear
from flowaccel.modules.td_lora import TimedLoraSettings as TimedLoraSettings

__all__ = [
    "SliceCache",
    "SlicedLinear",
    "TimedLoraSettings",
    "TokenRouter",
    "WidthRouter",
    "logistic_noise",
    "never_narrower",
    "straight_through",
    "widened",
]
