"""Networks with dynamic width and tokens."""

from flowaccel.models.dynamic.importance import reorder_ as reorder_
from flowaccel.models.dynamic.network import Bits as Bits
from flowaccel.models.dynamic.network import Dynamics as Dynamics
from flowaccel.models.dynamic.networks import DYNAMIC as DYNAMIC
from flowaccel.models.dynamic.networks import make_dynamic as make_dynamic
from flowaccel.models.dynamic.networks import time_embedding as time_embedding
from flowaccel.models.dynamic.settings import DynamicSettings as DynamicSettings

__all__ = ["DYNAMIC", "Bits", "DynamicSettings", "Dynamics", "make_dynamic", "reorder_", "time_embedding"]
