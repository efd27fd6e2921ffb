"""Networks with dynamic width and tokens."""

from flowaccel.models.dynamic.adapter import WidthAdapter as WidthAdapter
from flowaccel.models.dynamic.adapter import add_timed_lora as add_timed_lora
from flowaccel.models.dynamic.adapter import bucket_loras as bucket_loras
from flowaccel.models.dynamic.adapter import fix_time as fix_time
from flowaccel.models.dynamic.adapter import plain_lora as plain_lora
from flowaccel.models.dynamic.network import Bits as Bits
from flowaccel.models.dynamic.network import Dynamics as Dynamics
from flowaccel.models.dynamic.networks import DYNAMIC as DYNAMIC
from flowaccel.models.dynamic.networks import make_dynamic as make_dynamic
from flowaccel.models.dynamic.networks import time_embedding as time_embedding
from flowaccel.models.dynamic.settings import DynamicSettings as DynamicSettings

__all__ = [
    "DYNAMIC",
    "Bits",
    "DynamicSettings",
    "Dynamics",
    "WidthAdapter",
    "add_timed_lora",
    "bucket_loras",
    "fix_time",
    "make_dynamic",
    "plain_lora",
    "time_embedding",
]
