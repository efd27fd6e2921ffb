"""Calls of a velocity refiner (FlowTurbo, arXiv 2409.18128) with a network's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowaccel.models.time import FlowConvention


def refined(
    refiner: Callable[..., Any], convention: FlowConvention, arguments: dict[str, Any], feed: Tensor, base: Tensor
) -> Any:
    """Return the network output on a refiner step: `base` + refiner([hidden states; `feed`]).

    Args:
        refiner: the refiner, or its `forward`.
        convention: the network's.
        arguments: the network's arguments by name; `hidden_states` is (k * B, C, H, W) or packed tokens (k * B, L, C).
        feed: (B, ...) the velocity that the refiner is shown, in diffusers' convention.
        base: (B, ...) the velocity that its offset is added to, in diffusers' convention.
    """
    hidden_states: Tensor = arguments["hidden_states"]

    def rows(velocity: Tensor) -> Tensor:
        """Convert diffusers' velocity (B, ...) to the network's, for every row of its batch (k * B, ...)."""
        copies = hidden_states.shape[0] // velocity.shape[0]
        return (convention.velocity_sign * velocity).repeat(copies, *[1] * (velocity.dim() - 1)).to(hidden_states)

    channel_axis = 1 if hidden_states.dim() == 4 else -1
    stacked = torch.cat([hidden_states, rows(feed)], dim=channel_axis)
    output = refiner(**{**arguments, "hidden_states": stacked})
    if isinstance(output, tuple):
        return (rows(base) + output[0],)
    output.sample = rows(base) + output.sample
    return output
