"""Schedulers for flow models, usable in any diffusers flow pipeline."""

from flowaccel.samplers.base import FlowSampler, FusedStep
from flowaccel.samplers.flowturbo import Blocks, FlowTurboScheduler
from flowaccel.samplers.ode import FlowAdamsBashforthScheduler, FlowRungeKuttaScheduler
from flowaccel.samplers.policy import PolicyScheduler
from flowaccel.samplers.sde import FlowSDEScheduler

__all__ = [
    "Blocks",
    "FlowAdamsBashforthScheduler",
    "FlowRungeKuttaScheduler",
    "FlowSDEScheduler",
    "FlowSampler",
    "FlowTurboScheduler",
    "FusedStep",
    "PolicyScheduler",
]
