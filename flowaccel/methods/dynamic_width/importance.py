"""Importance of heads and channels by weight magnitude, as specified in DyDiT (arXiv 2410.03456).

The pretrained network's heads and channels are ranked and the strongest are always on; they can be reordered so that
groups are contiguous.

The measure is the sum of absolute weights that make and read a unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Columns = list[tuple[nn.Linear, int]]


def head_scores(rows: list[nn.Linear], columns: Columns, heads: int) -> Tensor:
    """Return (heads,) sums of absolute weights over the rows that produce a head and the columns that read it."""
    width = rows[0].out_features // heads
    made = sum(linear.weight.detach().float().abs().sum(1) for linear in rows)
    read = _read(columns, rows[0].out_features)
    return (made + read).reshape(heads, width).sum(1)


def channel_scores(rows: list[nn.Linear], columns: Columns) -> Tensor:
    """Return (channels,) sums of absolute weights, and bias, of each hidden channel's row and column."""
    made = sum(linear.weight.detach().float().abs().sum(1) for linear in rows)
    bias = sum(linear.bias.detach().float().abs() for linear in rows if linear.bias is not None)
    return made + bias + _read(columns, rows[0].out_features)


def _read(columns: Columns, count: int) -> Tensor:
    return torch.stack(
        [linear.weight.detach().float().abs().sum(0)[start : start + count] for linear, start in columns]
    ).sum(0)


def head_groups(rows: list[nn.Linear], columns: Columns, heads: int) -> Tensor:
    """Return (heads,) the gate of every head: 0 for the strongest."""
    return _places(head_scores(rows, columns, heads))


def channel_groups(rows: list[nn.Linear], columns: Columns, groups: int) -> Tensor:
    """Return (channels,) the gate of every channel: 0 for the strongest `channels / groups`."""
    places = _places(channel_scores(rows, columns))
    return places // (len(places) // groups)


def _places(scores: Tensor) -> Tensor:
    """Return the rank of every entry in descending order."""
    order = scores.argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def reordered(network: Any) -> dict[str, Tensor]:
    """Return the state dict entries that change when the units of every gate are made contiguous.

    Heads and hidden channels of a dynamic network are moved into the order of the gates.

    The network computes the same with them: what makes a unit and what reads it move together. Norms of queries and
    keys are shared by all heads and rotary embeddings act within a head, so both stay as they are.

    Raises:
        ValueError: adapters on layers that would be moved; their weights would stay behind.
    """
    names = {id(module): name for name, module in network.named_modules()}
    if any(name.endswith(".base_layer") for name in names.values()):
        raise ValueError("heads and channels cannot be moved below adapters; merge or unload the adapters first")
    state = network.state_dict()
    changed: dict[str, Tensor] = {}

    def put(key: str, order: Tensor, axis: int = 0, start: int = 0) -> None:
        value = changed.get(key, state[key])
        parts = [value.narrow(axis, 0, start), value.narrow(axis, start, len(order)).index_select(axis, order)]
        rest = start + len(order)
        changed[key] = torch.cat([*parts, value.narrow(axis, rest, value.shape[axis] - rest)], axis)

    for gated in network.dynamic.gated_layers:
        group_of = gated.gate.group_of
        contiguous, order = group_of.sort(stable=True)
        if torch.equal(contiguous, group_of):
            continue
        changed[f"{names[id(gated.gate)]}.group_of"] = contiguous
        elements = (order[:, None] * gated.each + torch.arange(gated.each, device=order.device)).flatten()
        for linear in gated.rows:
            for leaf in ("weight", "bias") if linear.bias is not None else ("weight",):
                put(f"{names[id(linear)]}.{leaf}", elements)
        for linear, start in gated.columns:
            put(f"{names[id(linear)]}.weight", elements, 1, start)
    return changed


def reorder_(network: Any) -> None:
    """Reorder heads and hidden channels of a dynamic network in place, so that the units of a gate are contiguous.

    Gate g then switches the g-th equal part. What the network computes, and its plans, stay the same.

    Moved weights become new parameters, so that a network that shares the old ones stays as it is; make optimisers
    afterwards.

    Args:
        network: a dynamic network of any family.

    Raises:
        ValueError: it has adapters.
    """
    network.dynamic.clear()
    network.dynamic.cache.clear()
    network.load_state_dict(reordered(network), strict=False, assign=True)
