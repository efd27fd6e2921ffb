"""Gated layers of a dynamic network: those that produce the units of a gate and those that consume them.

Shapes: B rows, N image tokens, H units of a gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.rules import GateRule
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.sliced import SlicedLinear
from flowaccel.methods.dynamic_width.td_lora import taken_apart
from flowaccel.methods.dynamic_width.tokens import TokenChoice
from flowaccel.models.routers import TokenRouter, WidthRouter

Bits = tuple[str, ...]
"""Units that are on: one string of zeros and ones per gate, in the order of `Dynamics.gates`."""


class WidthGate(nn.Module):
    """Router of one gate, and the assignment of heads or hidden channels to its units."""

    group_of: Tensor

    def __init__(self, width: int, units: int, members: int, settings: DynamicSettings) -> None:
        super().__init__()
        self.units = units
        self.router: WidthRouter = WidthRouter(width, units, settings.bias, settings.gain)
        self.register_buffer("group_of", (torch.arange(members) // (members // units)).to(torch.int32))

    def members(self, mask: Tensor) -> Tensor:
        """Expand a mask of units to heads or channels: (..., units) -> (..., members)."""
        return mask[..., self.group_of.long()]


@dataclass
class GatedLayers:
    """Connection from one gate to the layers that it switches."""

    path: str
    """`transformer_blocks.3.attn`: the name in plans and logs."""
    block: int
    """Position of the block among all blocks that have gates."""
    rule: GateRule
    gate: WidthGate
    each: int
    """Rows that a member makes: the width of a head, or 1."""
    rows: list[SlicedLinear]
    columns: list[tuple[SlicedLinear, int]]
    """And where its columns begin."""
    attention: Any
    """Module whose `heads` follow the gate."""
    module: nn.Module
    """The block itself."""
    added_rows: list[SlicedLinear] = field(default_factory=list)
    """The second factors of LoRAs on `rows`."""
    added_columns: list[tuple[SlicedLinear, int]] = field(default_factory=list)
    """The first factors of LoRAs on `columns`."""
    tokens: TokenSite | None = None
    """Site at which the work of this gate is done on part of the tokens."""

    def connect(self) -> None:
        """Look up the layers, also where adapters were added or removed."""
        found = linears_of(self.module, self.rule)
        self.rows, self.columns, self.added_rows, self.added_columns = found

    def elements(self, mask: Tensor) -> Tensor:
        """Expand a mask of units to output rows: (..., units) -> (..., rows)."""
        members = self.gate.members(mask)
        return members.repeat_interleave(self.each, dim=-1) if self.each > 1 else members


@dataclass
class TokenSite:
    """Feed-forward (or fused block) that computes a subset of the tokens."""

    path: str
    router: TokenRouter
    module: TokenChoice
    gates: Tensor | None = None
    """(rows, tokens, 1) of the last call: bool, or 0 and 1 with a gradient while training; None if all were computed.
    Rows are the block's, of which a video network has several per image."""
    capacity: float | None = None
    """The share of the tokens of every row that the module computes, whatever the resolution; see `TokenChoice`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "gates": None}


@dataclass
class LinearGates:
    """Gates that switch one linear layer."""

    linear: SlicedLinear
    rows: tuple[int, GatedLayers] | None
    columns: list[tuple[int, GatedLayers, int]]

    def key(self, bits: Bits) -> tuple[str, ...]:
        """Return the units that decide which part of the layer is on, as a key."""
        places = ([self.rows[0]] if self.rows else []) + [place for place, _, _ in self.columns]
        return tuple(bits[place] for place in places)

    def kept(self, bits: Bits, *, columns: bool) -> Tensor | None:
        """Return the indices of the rows or columns that are on, or None for all."""
        if not columns:
            return None if self.rows is None else _on(self.rows[1], bits[self.rows[0]]).nonzero().flatten()
        if not self.columns:
            return None
        keep = torch.ones(self.linear.in_features, dtype=torch.bool)
        for place, gated, start in self.columns:
            on = _on(gated, bits[place])
            keep[start : start + len(on)] = on
        return keep.nonzero().flatten()

    def cut(self, bits: Bits) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the part that is on."""
        return self.linear.cut(self.kept(bits, columns=False), self.kept(bits, columns=True))


def _on(gated: GatedLayers, units: str) -> Tensor:
    on = torch.tensor([unit == "1" for unit in units])
    members = on[gated.gate.group_of.long().cpu()]
    return members.repeat_interleave(gated.each)


def by_linear(gated_layers: list[GatedLayers]) -> list[LinearGates]:
    """Group the gates by linear layer, each layer once."""
    found: dict[int, LinearGates] = {}

    def entry(linear: SlicedLinear) -> LinearGates:
        return found.setdefault(id(linear), LinearGates(linear, None, []))

    for place, gated in enumerate(gated_layers):
        for linear in (*gated.rows, *gated.added_rows):
            entry(linear).rows = (place, gated)
        for linear, start in (*gated.columns, *gated.added_columns):
            entry(linear).columns.append((place, gated, start))
    return list(found.values())


def _has(block: nn.Module, name: str) -> bool:
    try:
        return block.get_submodule(name) is not None
    except AttributeError:  # the last block of SD3 has None in its place
        return False


Columns = list[tuple[SlicedLinear, int]]


def linears_of(block: nn.Module, rule: GateRule) -> tuple[list[SlicedLinear], Columns, list[SlicedLinear], Columns]:
    """Return the layers that produce a gate's units and those that consume them, then the same for their LoRAs."""
    rows, columns, added_rows, added_columns = [], [], [], []
    for name in rule.rows:
        if _has(block, name):
            base, _, seconds = _sliced(block, name)
            rows.append(base)
            added_rows += seconds
    for name, multiple in rule.columns:
        if _has(block, name):
            base, firsts, _ = _sliced(block, name)
            start = multiple * rows[0].in_features
            columns.append((base, start))
            added_columns += [(first, start) for first in firsts]
    return rows, columns, added_rows, added_columns


def places_of(gated: GatedLayers) -> Iterator[tuple[nn.Module, str]]:
    """Yield the location of each layer of a gate: its parent module and its name there."""
    for name in (*gated.rule.rows, *(name for name, _ in gated.rule.columns)):
        if _has(gated.module, name):
            parent, _, child = name.rpartition(".")
            yield gated.module.get_submodule(parent), child


def _sliced(block: nn.Module, name: str) -> tuple[SlicedLinear, list[SlicedLinear], list[SlicedLinear]]:
    """Return a layer, and the first and second factors of its LoRAs, all converted to `SlicedLinear`."""
    linear, firsts, seconds = taken_apart(block.get_submodule(name))
    if type(linear) is not nn.Linear and not isinstance(linear, SlicedLinear):
        raise UnsupportedModelError(
            f"{name} of a {type(block).__name__} is a {type(linear).__name__}; dynamic width slices plain nn.Linear "
            "layers, and those with PEFT's LoRA: quantise and fuse afterwards"
        )
    return (
        SlicedLinear.take_over(linear),
        [SlicedLinear.take_over(first) for first in firsts],
        [SlicedLinear.take_over(second) for second in seconds],
    )
