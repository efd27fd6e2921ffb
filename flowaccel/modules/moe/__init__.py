"""Mixture-of-experts feed-forwards for diffusion transformers."""

from flowaccel.modules.moe.control import moe_layers as moe_layers
from flowaccel.modules.moe.control import pack_experts as pack_experts
from flowaccel.modules.moe.control import set_aux_loss_scale as set_aux_loss_scale
from flowaccel.modules.moe.control import set_experts_backend as set_experts_backend
from flowaccel.modules.moe.control import set_moe_budget as set_moe_budget
from flowaccel.modules.moe.control import set_moe_capacity as set_moe_capacity
from flowaccel.modules.moe.control import set_moe_selection as set_moe_selection
from flowaccel.modules.moe.control import unpack_experts as unpack_experts
from flowaccel.modules.moe.experts import BACKENDS as BACKENDS
from flowaccel.modules.moe.experts import ExpertModules as ExpertModules
from flowaccel.modules.moe.experts import Experts as Experts
from flowaccel.modules.moe.experts import ExpertShape as ExpertShape
from flowaccel.modules.moe.feed_forward import MoEFeedForward as MoEFeedForward
from flowaccel.modules.moe.plans import ExpertPlan as ExpertPlan
from flowaccel.modules.moe.routing import ROUTING as ROUTING
from flowaccel.modules.moe.settings import MoESettings as MoESettings
from flowaccel.modules.moe.thresholds import Thresholds as Thresholds

__all__ = [
    "BACKENDS",
    "ROUTING",
    "ExpertModules",
    "ExpertPlan",
    "ExpertShape",
    "Experts",
    "MoEFeedForward",
    "MoESettings",
    "Thresholds",
    "moe_layers",
    "pack_experts",
    "set_aux_loss_scale",
    "set_experts_backend",
    "set_moe_budget",
    "set_moe_capacity",
    "set_moe_selection",
    "unpack_experts",
]
