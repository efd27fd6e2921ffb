"""Schedulers for flow models, usable in any diffusers flow pipeline."""

from flowaccel.samplers.base import FlowSampler as FlowSampler
from flowaccel.samplers.base import FusedStep as FusedStep
from flowaccel.samplers.flowturbo import Blocks as Blocks
from flowaccel.samplers.flowturbo import FlowTurboScheduler as FlowTurboScheduler
from flowaccel.samplers.ode import FlowAdamsBashforthScheduler as FlowAdamsBashforthScheduler
from flowaccel.samplers.ode import FlowRungeKuttaScheduler as FlowRungeKuttaScheduler
from flowaccel.samplers.policy import PolicyScheduler as PolicyScheduler
from flowaccel.samplers.sde import FlowSDEScheduler as FlowSDEScheduler

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
