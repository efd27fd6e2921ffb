"""Networks that diffusers does not have, and the readers of their official checkpoints."""

from flowaccel.models.convention import FlowConvention as FlowConvention
from flowaccel.models.convention import convention_of as convention_of
from flowaccel.models.features import DigitsClassifier as DigitsClassifier
from flowaccel.models.features import FeatureClassifier as FeatureClassifier
from flowaccel.models.features import ShapesClassifier as ShapesClassifier
from flowaccel.models.refined import refined as refined
from flowaccel.models.sit import SiTTransformer2DModel as SiTTransformer2DModel

__all__ = [
    "DigitsClassifier",
    "FeatureClassifier",
    "FlowConvention",
    "ShapesClassifier",
    "SiTTransformer2DModel",
    "convention_of",
    "refined",
]
