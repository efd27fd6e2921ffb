"""Networks that diffusers does not have, and loaders of their official checkpoints."""

from flowaccel.models.features import DigitsClassifier as DigitsClassifier
from flowaccel.models.features import FeatureClassifier as FeatureClassifier
from flowaccel.models.features import ShapesClassifier as ShapesClassifier
from flowaccel.models.sit import SiTTransformer2DModel as SiTTransformer2DModel
from flowaccel.models.time import FlowConvention as FlowConvention
from flowaccel.models.time import convention_of as convention_of
from flowaccel.models.variants import stock_class as stock_class

__all__ = [
    "DigitsClassifier",
    "FeatureClassifier",
    "FlowConvention",
    "ShapesClassifier",
    "SiTTransformer2DModel",
    "convention_of",
    "stock_class",
]
