"""Networks that diffusers does not have, and the readers of their official checkpoints."""

from flowaccel.models.convention import FlowConvention as FlowConvention
from flowaccel.models.convention import convention_of as convention_of
from flowaccel.models.dynamic import DynamicDiTTransformer2DModel as DynamicDiTTransformer2DModel
from flowaccel.models.dynamic import DynamicFluxTransformer2DModel as DynamicFluxTransformer2DModel
from flowaccel.models.dynamic import DynamicLatteTransformer3DModel as DynamicLatteTransformer3DModel
from flowaccel.models.dynamic import DynamicSD3Transformer2DModel as DynamicSD3Transformer2DModel
from flowaccel.models.dynamic import DynamicSettings as DynamicSettings
from flowaccel.models.dynamic import DynamicSiTTransformer2DModel as DynamicSiTTransformer2DModel
from flowaccel.models.dynamic import WidthPlan as WidthPlan
from flowaccel.models.dynamic import make_dynamic as make_dynamic
from flowaccel.models.features import DigitsClassifier as DigitsClassifier
from flowaccel.models.features import FeatureClassifier as FeatureClassifier
from flowaccel.models.features import ShapesClassifier as ShapesClassifier
from flowaccel.models.mediators import MediatorSiTTransformer2DModel as MediatorSiTTransformer2DModel
from flowaccel.models.moe import MoEDiTTransformer2DModel as MoEDiTTransformer2DModel
from flowaccel.models.moe import MoEFluxTransformer2DModel as MoEFluxTransformer2DModel
from flowaccel.models.moe import MoESD3Transformer2DModel as MoESD3Transformer2DModel
from flowaccel.models.moe import MoESiTTransformer2DModel as MoESiTTransformer2DModel
from flowaccel.models.moe import upcycle_to_moe as upcycle_to_moe
from flowaccel.models.policy import AccelerationPolicy as AccelerationPolicy
from flowaccel.models.refined import refined as refined
from flowaccel.models.sit import SiTTransformer2DModel as SiTTransformer2DModel
from flowaccel.models.variants import stock_class as stock_class

__all__ = [
    "AccelerationPolicy",
    "DigitsClassifier",
    "DynamicDiTTransformer2DModel",
    "DynamicFluxTransformer2DModel",
    "DynamicLatteTransformer3DModel",
    "DynamicSD3Transformer2DModel",
    "DynamicSettings",
    "DynamicSiTTransformer2DModel",
    "FeatureClassifier",
    "FlowConvention",
    "MediatorSiTTransformer2DModel",
    "MoEDiTTransformer2DModel",
    "MoEFluxTransformer2DModel",
    "MoESD3Transformer2DModel",
    "MoESiTTransformer2DModel",
    "ShapesClassifier",
    "SiTTransformer2DModel",
    "WidthPlan",
    "convention_of",
    "make_dynamic",
    "refined",
    "stock_class",
    "upcycle_to_moe",
]
