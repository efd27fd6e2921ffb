"""Networks with mediator attention."""

from flowaccel.models.mediators.networks import MediatorSiTTransformer2DModel as MediatorSiTTransformer2DModel
from flowaccel.models.mediators.networks import check_mediators as check_mediators
from flowaccel.models.mediators.networks import mediator_layers as mediator_layers
from flowaccel.models.mediators.networks import set_mediators as set_mediators
from flowaccel.models.mediators.settings import MediatorSettings as MediatorSettings

__all__ = [
    "MediatorSettings",
    "MediatorSiTTransformer2DModel",
    "check_mediators",
    "mediator_layers",
    "set_mediators",
]
