"""Networks that diffusers does not have, and loaders of their official checkpoints."""

from flowaccel.models.features import DigitsClassifier, FeatureClassifier, ShapesClassifier
from flowaccel.models.sit import SiTTransformer2DModel
from flowaccel.models.time import FlowConvention, convention_of
from flowaccel.models.variants import stock_class

__all__ = [
    "DigitsClassifier",
    "FeatureClassifier",
    "FlowConvention",
    "ShapesClassifier",
    "SiTTransformer2DModel",
    "convention_of",
    "stock_class",
]
