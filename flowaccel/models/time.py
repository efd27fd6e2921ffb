"""The one place that knows which way time and velocity point.

diffusers' flow-matching schedulers run sigma from 1 (noise) to 0 (data), hand the network `timestep = 1000 * sigma`
and expect `noise - data`. SiT (arXiv 2401.08740) and everything built on it (FlowTurbo, DiffMoE, Attention Mediators)
run t from 0 (noise) to 1 (data), hand the network t itself and predict `data - noise`. A network class states which of
the two it speaks in its `flow_convention` attribute; a class without one speaks diffusers' own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FlowConvention:
    """How a network states time and velocity."""

    data_at_one: bool
    """True: t = 1 is data and the output is data - noise. False: sigma = 1 is noise and the output is noise - data."""
    time_scale: float
    """What a time in [0, 1] is multiplied by before the network sees it."""

    @property
    def velocity_sign(self) -> float:
        """Factor between the network's velocity and diffusers' (its own inverse)."""
        return -1.0 if self.data_at_one else 1.0

    def network_time(self, sigma: Tensor) -> Tensor:
        """The network's time argument at noise level `sigma` in [0, 1] (any shape)."""
        return self.time_scale * (1 - sigma if self.data_at_one else sigma)


DIFFUSERS = FlowConvention(data_at_one=False, time_scale=1000.0)
SIT = FlowConvention(data_at_one=True, time_scale=1.0)


def convention_of(network: nn.Module) -> FlowConvention:
    """The convention that `network` speaks: its `flow_convention` attribute, else diffusers' own."""
    return getattr(network, "flow_convention", DIFFUSERS)
