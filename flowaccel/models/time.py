"""Conventions of time and velocity: the only module that depends on their directions.

diffusers' flow-matching schedulers run sigma from 1 (noise) to 0 (data), pass `timestep = 1000 * sigma` to the network
and expect `noise - data`. SiT (arXiv 2401.08740) and everything built on it (FlowTurbo, DiffMoE, Attention Mediators)
run t from 0 (noise) to 1 (data), pass t itself to the network and predict `data - noise`. A network class states its
convention in its `flow_convention` attribute; a class without one uses diffusers'.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FlowConvention:
    """Convention of a network's time and velocity."""

    data_at_one: bool
    """Whether t = 1 is data and the output is data - noise; otherwise sigma = 1 is noise and the output noise -
    data."""
    time_scale: float
    """Factor that scales a time in [0, 1] to the network's argument."""

    @property
    def velocity_sign(self) -> float:
        """Factor between the network's velocity and diffusers' (its own inverse)."""
        return -1.0 if self.data_at_one else 1.0

    def network_time(self, sigma: Tensor) -> Tensor:
        """Return the network's time argument at noise level `sigma` in [0, 1] (any shape)."""
        return self.time_scale * (1 - sigma if self.data_at_one else sigma)

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level at a time argument of the network; the inverse of `network_time`."""
        return 1 - time / self.time_scale if self.data_at_one else time / self.time_scale


DIFFUSERS = FlowConvention(data_at_one=False, time_scale=1000.0)
SIT = FlowConvention(data_at_one=True, time_scale=1.0)


def convention_of(network: nn.Module) -> FlowConvention:
    """Return the convention of `network`: its `flow_convention` attribute, else diffusers' own."""
    return getattr(network, "flow_convention", DIFFUSERS)
