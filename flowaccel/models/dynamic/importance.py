"""Which heads and channels matter most, by the size of their weights (DyDiT, arXiv 2410.03456, as specified there:
rank the pretrained network, keep the strongest always on).

The measure is the sum of absolute weights that make and read a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Columns = list[tuple[nn.Linear, int]]


def head_scores(rows: list[nn.Linear], columns: Columns, heads: int) -> Tensor:
    """(heads,) absolute weights of the rows that make a head and the columns that read it."""
    width = rows[0].out_features // heads
    made = sum(linear.weight.detach().float().abs().sum(1) for linear in rows)
    read = _read(columns, rows[0].out_features)
    return (made + read).reshape(heads, width).sum(1)


def channel_scores(rows: list[nn.Linear], columns: Columns) -> Tensor:
    """(channels,) absolute weights, and bias, of the row that makes a hidden channel and the column that reads it."""
    made = sum(linear.weight.detach().float().abs().sum(1) for linear in rows)
    bias = sum(linear.bias.detach().float().abs() for linear in rows if linear.bias is not None)
    return made + bias + _read(columns, rows[0].out_features)


def _read(columns: Columns, count: int) -> Tensor:
    return torch.stack(
        [linear.weight.detach().float().abs().sum(0)[start : start + count] for linear, start in columns]
    ).sum(0)


def head_groups(rows: list[nn.Linear], columns: Columns, heads: int) -> Tensor:
    """(heads,) the gate of every head: 0 for the strongest."""
    return _places(head_scores(rows, columns, heads))


def channel_groups(rows: list[nn.Linear], columns: Columns, groups: int) -> Tensor:
    """(channels,) the gate of every channel: 0 for the strongest `channels / groups`."""
    places = _places(channel_scores(rows, columns))
    return places // (len(places) // groups)


def _places(scores: Tensor) -> Tensor:
    """Where every entry stands when sorted from the largest."""
    order = scores.argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places
