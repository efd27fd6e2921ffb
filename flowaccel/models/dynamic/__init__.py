"""Networks with dynamic width and tokens."""

from flowaccel.models.dynamic.adapter import WidthAdapter as WidthAdapter
from flowaccel.models.dynamic.adapter import add_timed_lora as add_timed_lora
from flowaccel.models.dynamic.adapter import bucket_loras as bucket_loras
from flowaccel.models.dynamic.adapter import fix_time as fix_time
from flowaccel.models.dynamic.adapter import plain_lora as plain_lora
from flowaccel.models.dynamic.gathering import TokenCounts as TokenCounts
from flowaccel.models.dynamic.gathering import choose_gather as choose_gather
from flowaccel.models.dynamic.gathering import fit_capacities as fit_capacities
from flowaccel.models.dynamic.gathering import watched_tokens as watched_tokens
from flowaccel.models.dynamic.importance import reorder_ as reorder_
from flowaccel.models.dynamic.network import Dynamics as Dynamics
from flowaccel.models.dynamic.networks import DYNAMIC as DYNAMIC
from flowaccel.models.dynamic.networks import DynamicDiTTransformer2DModel as DynamicDiTTransformer2DModel
from flowaccel.models.dynamic.networks import DynamicFluxTransformer2DModel as DynamicFluxTransformer2DModel
from flowaccel.models.dynamic.networks import DynamicLatteTransformer3DModel as DynamicLatteTransformer3DModel
from flowaccel.models.dynamic.networks import DynamicSD3Transformer2DModel as DynamicSD3Transformer2DModel
from flowaccel.models.dynamic.networks import DynamicSiTTransformer2DModel as DynamicSiTTransformer2DModel
from flowaccel.models.dynamic.networks import make_dynamic as make_dynamic
from flowaccel.models.dynamic.networks import time_embedding as time_embedding
from flowaccel.models.dynamic.plan import WidthPlan as WidthPlan
from flowaccel.models.dynamic.settings import DynamicSettings as DynamicSettings
from flowaccel.models.dynamic.wires import Bits as Bits

__all__ = [
    "DYNAMIC",
    "Bits",
    "DynamicDiTTransformer2DModel",
    "DynamicFluxTransformer2DModel",
    "DynamicLatteTransformer3DModel",
    "DynamicSD3Transformer2DModel",
    "DynamicSettings",
    "DynamicSiTTransformer2DModel",
    "Dynamics",
    "TokenCounts",
    "WidthAdapter",
    "WidthPlan",
    "add_timed_lora",
    "bucket_loras",
    "choose_gather",
    "fit_capacities",
    "fix_time",
    "make_dynamic",
    "plain_lora",
    "reorder_",
    "time_embedding",
    "watched_tokens",
]
