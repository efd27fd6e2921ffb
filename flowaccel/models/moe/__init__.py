"""Networks with experts."""

from flowaccel.models.moe.networks import MOE as MOE
from flowaccel.models.moe.networks import MoEDiTTransformer2DModel as MoEDiTTransformer2DModel
from flowaccel.models.moe.networks import MoEFluxTransformer2DModel as MoEFluxTransformer2DModel
from flowaccel.models.moe.networks import MoEMixin as MoEMixin
from flowaccel.models.moe.networks import MoESD3Transformer2DModel as MoESD3Transformer2DModel
from flowaccel.models.moe.networks import MoESiTTransformer2DModel as MoESiTTransformer2DModel
from flowaccel.models.moe.networks import moe_class as moe_class
from flowaccel.models.moe.networks import upcycle_to_moe as upcycle_to_moe

__all__ = [
    "MOE",
    "MoEDiTTransformer2DModel",
    "MoEFluxTransformer2DModel",
    "MoEMixin",
    "MoESD3Transformer2DModel",
    "MoESiTTransformer2DModel",
    "moe_class",
    "upcycle_to_moe",
]
