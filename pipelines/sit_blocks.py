"""Guided velocity of `SiTPipeline`, and whole H, P and R steps as single functions to compile.

This is the sample-aware compilation of FlowTurbo (arXiv 2409.18128).

Shapes: B images; velocities of a guided run have 2B rows, [conditional; null].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowaccel.methods.flowturbo.refinement import refined
from flowaccel.models import FlowConvention, convention_of
from flowaccel.samplers import FusedStep
from flowaccel.samplers.formulas import corrected, predicted

Channels = int | Literal["all"]


def guide(velocity: Tensor, scale: float | Tensor, channels: Channels) -> Tensor:
    """Apply classifier-free guidance to the leading channels of a doubled batch [conditional; null].

    Args:
        velocity: (2B, C, ...) outputs of the conditional and of the null half.
        scale: s in null + s * (conditional - null).
        channels: how many leading channels are guided; both halves get the guided value there and keep their own
            beyond.

    Returns:
        (2B, C, ...).
    """
    conditional, null = velocity.chunk(2)
    guided = null + scale * (conditional - null)
    if channels == "all" or channels >= velocity.shape[1]:
        return torch.cat([guided, guided])
    rest = slice(int(channels), None)
    return torch.cat([torch.cat([guided[:, :channels], half[:, rest]], dim=1) for half in (conditional, null)])


@dataclass(frozen=True, eq=False, kw_only=True)
class GuidedField:
    """Velocity field of a run at any state and noise level, in diffusers' convention (noise - data).

    Args:
        network: (hidden_states, timestep, class_labels) -> velocity; a module, or the `forward` of one.
        refiner: network that replaces it on R steps, or None.
        convention: convention of both.
        dtype: dtype of both; states and velocities keep their own.
        labels: (B,), or (2B,) with the null labels last where the run is guided.
        scale, channels: as in `guide`; unused without null labels.
    """

    network: Callable[..., Any]
    refiner: Callable[..., Any] | None
    convention: FlowConvention
    dtype: torch.dtype
    labels: Tensor
    scale: float | Tensor
    channels: Channels

    def velocity(self, state: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity (2B, ...) at `state` (B, ...) and the 0-dim `sigma`; (B, ...) without guidance."""
        arguments = self._arguments(state, sigma)
        return self._guided(self.network(**arguments)[0], state)

    def refined(self, state: Tensor, sigma: Tensor, feed: Tensor, base: Tensor) -> Tensor:
        """Return the velocity on an R step: `base` plus the refiner's offset, or `velocity` without a refiner."""
        if self.refiner is None:
            return self.velocity(state, sigma)
        arguments = self._arguments(state, sigma)
        return self._guided(refined(self.refiner, self.convention, arguments, feed, base)[0], state)

    def _arguments(self, state: Tensor, sigma: Tensor) -> dict[str, Any]:
        rows = torch.cat([state, state]) if self._is_guided(state) else state
        return {
            "hidden_states": rows.to(self.dtype),
            "timestep": self.convention.network_time(sigma).expand(rows.shape[0]),
            "class_labels": self.labels,
            "return_dict": False,
        }

    def _guided(self, output: Tensor, state: Tensor) -> Tensor:
        velocity = self.convention.velocity_sign * output.to(state.dtype)
        return guide(velocity, self.scale, self.channels) if self._is_guided(state) else velocity

    def _is_guided(self, state: Tensor) -> bool:
        return self.labels.shape[0] != state.shape[0]


Ends = tuple[Tensor, Tensor, Tensor]
"""Result of a block: the state (B, ...) after the step, and the velocities at its start and at its predicted end."""


def euler_block(field: GuidedField, state: Tensor, sigma: Tensor, end: Tensor, width: Tensor) -> Ends:
    """Take an Euler step (E) from the noise level `sigma` to `end`, `width` apart (0-dim tensors)."""
    start = field.velocity(state, sigma)
    return predicted(state, width, start[: state.shape[0]]), start, start


def heun_block(field: GuidedField, state: Tensor, sigma: Tensor, end: Tensor, width: Tensor) -> Ends:
    """Take a Heun step (H), in which the network computes both velocities."""
    return pseudo_block(field, state, sigma, end, width, field.velocity(state, sigma))


def pseudo_block(field: GuidedField, state: Tensor, sigma: Tensor, end: Tensor, width: Tensor, carried: Tensor) -> Ends:
    """Take a pseudo-corrector step (P), which uses the carried velocity as the one at the start."""
    batch = state.shape[0]
    last = field.velocity(predicted(state, width, carried[:batch]), end)
    return corrected(state, width, carried[:batch], last[:batch]), carried, last


def refiner_block(
    field: GuidedField, state: Tensor, sigma: Tensor, end: Tensor, width: Tensor, carried: Tensor, mode: str
) -> Ends:
    """Take a refiner step (R): both velocities are the carried one plus the refiner's offset.

    `mode` is the scheduler's `refiner_mode`.
    """
    batch = state.shape[0]
    start = field.refined(state, sigma, carried, carried)
    ahead = predicted(state, width, start[:batch])
    if mode == "single":
        return ahead, start, start
    last = field.refined(ahead, end, start if mode == "consistent" else carried, start)
    return corrected(state, width, start[:batch], last[:batch]), start, last


BLOCKS: dict[str, Callable[..., Ends]] = {"E": euler_block, "H": heun_block, "P": pseudo_block, "R": refiner_block}


class CompiledBlocks:
    """Blocks that are each compiled as one static graph at their first use; made by `SiTPipeline.compile_blocks`."""

    def __init__(self, **options: Any) -> None:
        self._blocks = {
            kind: torch.compile(block, fullgraph=True, dynamic=False, **options) for kind, block in BLOCKS.items()
        }

    def run_step(
        self, step: FusedStep, field: GuidedField, state: Tensor, times: StepTimes, carried: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take one step from `state` (B, ...) and the carried velocity; returns both for the next step."""
        more = (carried, step.mode) if step.kind == "R" else (carried,) if step.kind == "P" else ()
        torch.compiler.cudagraph_mark_step_begin()
        ahead, start, end = self._blocks[step.kind](field, state, *times, *more)
        # Copies, because a CUDA graph overwrites what it returned when it is replayed.
        return _copy(ahead), _copy(start if step.carries_start else end)


StepTimes = tuple[Tensor, Tensor, Tensor]


def step_times(scheduler: Any, step: int, device: torch.device) -> StepTimes:
    """Return the noise levels at both ends of a step, and its width: 0-dim float32 tensors on `device`.

    They are rounded like those in `timesteps`, and are tensors so that their values do not become constants of a graph.
    """
    scale = scheduler.config.num_train_timesteps
    ends = [torch.tensor(level, dtype=torch.float32) * scale / scale for level in scheduler.grid[step : step + 2]]
    sigma, end, width = (value.to(device) for value in (*ends, torch.tensor(scheduler.width(step))))
    return sigma, end, width


def bare_field(network: Any, refiner: Any, labels: Tensor, scale: float, channels: Channels) -> GuidedField:
    """Return the field of the networks themselves, without anything wrapped around their `forward`."""
    return GuidedField(
        network=_forward(network),
        refiner=None if refiner is None else _forward(refiner),
        convention=convention_of(network),
        dtype=network.dtype,
        labels=labels,
        scale=torch.tensor(scale, dtype=torch.float32, device=labels.device),
        channels=channels,
    )


def _forward(network: nn.Module) -> Callable[..., Any]:
    return functools.partial(type(network).forward, network)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
