"""Networks whose width depends on the timestep and whose feed-forwards take part of the tokens: DyDiT (arXiv
2410.03456) and DyDiT++ (arXiv 2504.06803).

A dynamic network is a stock network with routers beside it, under the name `dynamic`. All other names and weights are
those of the stock network, also after conversion: which head or channel belongs to which gate is an assignment, so
nothing is moved. While training, gates are masks on whole layers; otherwise layers are sliced and tokens gathered.

Shapes: B rows, N image tokens, D width, H units of a gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from torch import Tensor, nn

from flowaccel.errors import UnsupportedModelError
from flowaccel.models.dynamic.fused import TokenSingleBlock
from flowaccel.models.dynamic.rules import BlockRule, DynamicRule, GateRule, rule_of
from flowaccel.models.dynamic.settings import DynamicSettings
from flowaccel.modules import SliceCache, SlicedLinear, TokenRouter, WidthRouter, logistic_noise, straight_through
from flowaccel.modules.tokens import TokenChoice, TokenFeedForward

Bits = tuple[str, ...]
"""One text of zeros and ones per gate, in the order of `Dynamics.gates`: which units are on."""


class Gate(nn.Module):
    """The router of one gate, and which unit of it every head or hidden channel belongs to."""

    group_of: Tensor

    def __init__(self, width: int, units: int, members: int, settings: DynamicSettings) -> None:
        super().__init__()
        self.units = units
        self.router = WidthRouter(width, units, settings.bias, settings.gain)
        self.register_buffer("group_of", (torch.arange(members) // (members // units)).to(torch.int32))

    def members(self, mask: Tensor) -> Tensor:
        """(..., units) -> (..., members)."""
        return mask[..., self.group_of.long()]


@dataclass
class Wire:
    """What a gate switches."""

    path: str
    """`transformer_blocks.3.attn`: the name in plans and logs."""
    block: int
    """Position of the block among all blocks that have gates."""
    rule: GateRule
    gate: Gate
    each: int
    """Rows that a member makes: the width of a head, or 1."""
    rows: list[SlicedLinear]
    columns: list[tuple[SlicedLinear, int]]
    """And where its columns begin."""
    attention: Any
    """The module whose `heads` follow the gate."""
    tokens: TokenSite | None = None
    """Where the work of this gate is done on part of the tokens."""

    def elements(self, mask: Tensor) -> Tensor:
        """(..., units) -> (..., rows)."""
        members = self.gate.members(mask)
        return members.repeat_interleave(self.each, dim=-1) if self.each > 1 else members


@dataclass
class TokenSite:
    """A feed-forward (or a fused block) that takes part of the tokens."""

    path: str
    router: TokenRouter
    module: TokenChoice
    gates: Tensor | None = None
    """(rows, tokens, 1) of the last call: bool, or 0 and 1 with a gradient while training; None if all were computed.
    Rows are the block's, of which a video network has several per image."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "gates": None}


class Dynamics(nn.Module):
    """The routers of a network, and the wires to the layers that they switch. Lies at `network.dynamic`."""

    def __init__(self, network: nn.Module, settings: DynamicSettings) -> None:
        super().__init__()
        self.settings = settings
        self.rule: DynamicRule = rule_of(network)
        self.blocks = nn.ModuleList()
        self.correction = nn.Parameter(torch.zeros(()), requires_grad=False)
        """What a controller, where there is one, adds to the ratio that is asked for while training."""
        self.generator: torch.Generator | None = None
        """Where the noise of training comes from."""
        self.noise: Callable[[str, tuple[int, ...]], Tensor] = self._noise
        """`noise(path, shape)`: the noise of one router's logits."""
        self.chosen: Bits | None = None
        """The plan's gates for the present call; None asks the routers."""
        self.hard = False
        """Whether gates are those of evaluation also while training, and routers learn nothing."""
        self.masks: list[Tensor] = []
        """(B, units) of the last training call, one per gate."""
        self._off = self._paused = self._again = False
        self._running = self._timed = False
        self._noises: dict[str, Tensor] = {}
        self._bits: Bits = ()
        self._wires: list[Wire] = []
        self._linears: list[_LinearWires] = []
        self._sites: list[TokenSite] = []
        self._wire(network)
        self.cache = SliceCache(sum(_bytes(entry.linear) for entry in self._linears))

    # -- construction

    def _wire(self, network: nn.Module) -> None:
        width = _embedding_width(network, self.rule)
        for rule in self.rule.blocks:
            for place, block in enumerate(network.get_submodule(rule.path).children()):
                self._wire_block(f"{rule.path}.{place}", block, rule, width)
        self._linears = _by_linear(self._wires)

    def _wire_block(self, path: str, block: nn.Module, rule: BlockRule, width: int) -> None:
        own = nn.ModuleDict()
        heads = next(int(getattr(block, gate.name).heads) for gate in rule.gates if gate.kind == "heads")
        for gate in rule.gates:
            if getattr(block, gate.name, None) is None:  # the last block of SD3 has no ff_context
                continue
            _refuse_unknown(path, block, gate)
            rows = [_sliced(block, name) for name in gate.rows if _has(block, name)]
            columns = [(_sliced(block, name), start) for name, start in gate.columns if _has(block, name)]
            attention = getattr(block, gate.name) if gate.kind == "heads" else None
            made = rows[0].out_features
            units, members = (heads, heads) if attention is not None else (self.settings.groups or heads, made)
            if members % units or made % members or any(row.out_features != made for row in rows):
                raise UnsupportedModelError(
                    f"{path}.{gate.name}: {made} rows cannot be divided into {units} equal groups; "
                    "set groups to a number that divides them, and give all projections the same number of heads"
                )
            own[gate.name] = Gate(width, units, members, self.settings)
            offsets = [(linear, start * rows[0].in_features) for linear, start in columns]
            self._wires.append(
                Wire(
                    path=f"{path}.{gate.name}",
                    block=len(self.blocks),
                    rule=gate,
                    gate=own[gate.name],  # type: ignore[arg-type]
                    each=made // members,
                    rows=rows,
                    columns=offsets,
                    attention=attention,
                )
            )
        if self.settings.tokens and (rule.tokens is not None or rule.fused):
            router = TokenRouter(self._wires[-1].rows[0].in_features, self.settings.token_bias, self.settings.gain)
            own["tokens"] = router
            self._wire_tokens(path, block, rule, router)
        self.blocks.append(own)

    def _wire_tokens(self, path: str, block: nn.Module, rule: BlockRule, router: TokenRouter) -> None:
        module: TokenChoice
        if rule.tokens is None:
            module, norm, switched = TokenSingleBlock.take_over(block), block, tuple(gate.name for gate in rule.gates)
        else:
            module = TokenFeedForward.take_over(block.get_submodule(rule.tokens.feed_forward))
            norm, switched = block.get_submodule(rule.tokens.norm), (rule.tokens.feed_forward,)
        site = TokenSite(f"{path}.tokens", router, module)
        self._sites.append(site)
        norm.register_forward_pre_hook(functools.partial(self._routed, site), with_kwargs=True)
        for wire in self._wires:
            if wire.path in [f"{path}.{name}" for name in switched]:
                wire.tokens = site

    # -- what others use

    @property
    def wires(self) -> tuple[Wire, ...]:
        """All gates, in the order of the network's blocks."""
        return tuple(self._wires)

    @property
    def sites(self) -> tuple[TokenSite, ...]:
        """Where tokens can be left out, in the order of the blocks."""
        return tuple(self._sites)

    def logits(self, embedding: Tensor) -> list[Tensor]:
        """The routers' answers to timestep embeddings (B, D): (B, units - 1) for each gate."""
        given = embedding.float()
        if self.settings.normalise:
            given = nn.functional.layer_norm(given, given.shape[-1:])
        return [wire.gate.router(given) for wire in self._wires]

    def evaluated(self, embedding: Tensor) -> list[Tensor]:
        """The gates of evaluation, bool (B, units) each."""
        with torch.no_grad():
            return [_with_first(logits > 0) for logits in self.logits(embedding)]

    def kept_tokens(self, rows: int) -> dict[str, Tensor]:
        """(B,) the share of the tokens that every image of the last call kept, by the path of the site; a site that
        computed all tokens is missing. Nothing waits for the device until the values are read.

        Args:
            rows: B, the rows of that call.
        """
        return {
            site.path: site.gates.float().reshape(rows, -1).mean(1) for site in self._sites if site.gates is not None
        }

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Within this everything is computed, as in the stock network."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this nothing is set when time is embedded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __getstate__(self) -> dict[str, Any]:
        """Copies have decided nothing: what the last training call did cannot be copied, because it has a history."""
        return {**self.__dict__, "masks": [], "_noises": {}}

    # -- the forward pass

    def started(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the network: what embeds time first sets the gates of this call."""
        self._running, self._timed = True, False

    def timed(self, module: nn.Module, args: Any, embedding: Tensor) -> None:
        """Forward hook of the module that embeds time: set all gates."""
        if self._paused:
            return
        if not self._again:
            if self._running and self._timed:  # DiT embeds time once more for its last layer
                return
            self._timed = True
            self._noises = {}
            for site in self._sites:
                site.gates = None
        if self._off:
            self.clear()
        elif self.training and torch.is_grad_enabled():
            self._mask(self._trained(embedding))
        elif self.chosen is not None:
            self.slice(self.chosen)
        else:
            self._slice_rows(self.evaluated(embedding))

    def _trained(self, embedding: Tensor) -> list[Tensor]:
        if self.hard:
            return [mask.float() for mask in self.evaluated(embedding)]
        return [_with_first(self._relaxed(w.path, z)) for w, z in zip(self._wires, self.logits(embedding), strict=True)]

    def _relaxed(self, path: str, logits: Tensor) -> Tensor:
        if path not in self._noises:
            self._noises[path] = self.noise(path, tuple(logits.shape)).to(logits.device)
        return straight_through(logits, self._noises[path], self.settings.tau)

    def _noise(self, path: str, shape: tuple[int, ...]) -> Tensor:
        return logistic_noise(shape, self.generator)

    def _mask(self, masks: list[Tensor]) -> None:
        """Multiply layers by masks (B, units): the head outputs before their projection, and hidden channels before
        their activation."""
        self.clear()
        self.masks = masks
        for wire, mask in zip(self._wires, masks, strict=True):
            elements = wire.elements(mask)
            if wire.rule.kind == "channels":
                for linear in wire.rows:
                    linear.row_mask = elements
                continue
            for linear, start in wire.columns:
                _mask_columns(linear, start, elements)

    def _slice_rows(self, masks: list[Tensor]) -> None:
        """Slice to what any row of the batch needs, and mask what the others do not."""
        counts = [mask.shape[1] for mask in masks]
        known = torch.cat(masks, dim=1).cpu()  # the host waits once
        self.slice(tuple(_text(units) for units in known.any(0).split(counts)))
        alike = (known == known[:1]).all(0)
        for site in self._sites:
            site.module.rows_differ = not bool(alike.all())
        for wire, mask, same in zip(self._wires, masks, alike.split(counts), strict=True):
            if not bool(same.all()):
                for linear, start in wire.columns:
                    _mask_columns(linear, start, wire.elements(mask))
        for entry in self._linears:
            mask_, kept = entry.linear.column_mask, entry.kept(self._bits, columns=True)
            if mask_ is not None and kept is not None:
                entry.linear.column_mask = mask_[:, kept.to(mask_.device)]

    def slice(self, bits: Bits) -> None:
        """Let every layer compute what is on, for all rows alike."""
        self.clear()
        self._bits = bits
        for index, entry in enumerate(self._linears):
            key = entry.key(bits)
            if "0" not in "".join(key):
                if (
                    not torch.is_grad_enabled()
                ):  # a compiled block then meets tensors in any case, and rarely recompiles
                    entry.linear.part = entry.linear.whole
            else:
                entry.linear.part = self.cache.get(
                    (index, *key), entry.linear.weight, functools.partial(entry.cut, bits)
                )
        for wire, units in zip(self._wires, bits, strict=True):
            if wire.attention is not None:
                wire.attention.heads = units.count("1")

    def clear(self) -> None:
        """Whole layers again."""
        self._bits = ()
        self.masks = []
        for entry in self._linears:
            linear = entry.linear
            linear.part = linear.row_mask = linear.column_mask = None
        for wire in self._wires:
            if wire.attention is not None:
                wire.attention.heads = wire.gate.units
        for site in self._sites:
            site.module.keep = site.module.logits = None
            site.module.rows_differ = False

    def ended(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the network: leave nothing in its layers, whatever happened. What was decided (`masks`, and
        `gates` of the sites) can be read until the next call."""
        self._running = False
        decided = self.masks
        self.clear()
        self.masks = decided

    def _routed(self, site: TokenSite, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of what is given the tokens: choose some."""
        if self._off:
            site.module.keep = site.module.logits = site.gates = None
            return
        logits = site.router(args[0] if args else kwargs["hidden_states"])
        if self.training and torch.is_grad_enabled() and not self.hard:
            site.gates = self._relaxed(site.path, logits)
        else:
            site.gates, site.module.logits = logits > 0, logits
        site.module.keep = site.gates

    # -- computing again for the backward pass

    def checkpointed(self, checkpoint: Callable[..., Any], module: Callable[..., Any], *args: Any) -> Any:
        """Gradient checkpointing of one block: `checkpoint(module, *args)`, where `module` decides the same when it is
        computed again, whatever the network was used for in between.

        Args:
            checkpoint: such as `torch.utils.checkpoint.checkpoint` with `use_reentrant=False`. It must run the block
                with gradients the first time too, or there is nothing to decide by.
            module: the block.
            args: of the block.
        """
        before: list[tuple[Any, str, Any]] = []

        def run(*inputs: Any) -> Any:
            if before:
                with self._as_before(before):
                    return module(*inputs)
            output = module(*inputs)
            before.extend(self._state())
            return output

        return checkpoint(run, *args)

    def _state(self) -> list[tuple[Any, str, Any]]:
        """All that a call sets: whose, its name, its value."""
        names: list[tuple[Any, tuple[str, ...]]] = [
            (self, ("masks", "chosen", "hard", "_off", "_again", "_bits", "_noises")),
            *((entry.linear, ("part", "row_mask", "column_mask")) for entry in self._linears),
            *((wire.attention, ("heads",)) for wire in self._wires if wire.attention is not None),
            *((site, ("gates",)) for site in self._sites),
            *((site.module, ("keep", "logits", "rows_differ")) for site in self._sites),
        ]
        return [(owner, name, getattr(owner, name)) for owner, own in names for name in own]

    @contextmanager
    def _as_before(self, state: list[tuple[Any, str, Any]]) -> Iterator[None]:
        """Within this all is as it was when `state` was taken."""
        present = self._state()
        try:
            _set(state)
            self._again = True
            yield
        finally:
            _set(present)


@dataclass
class _LinearWires:
    """The gates of one linear layer."""

    linear: SlicedLinear
    rows: tuple[int, Wire] | None
    columns: list[tuple[int, Wire, int]]

    def key(self, bits: Bits) -> tuple[str, ...]:
        places = ([self.rows[0]] if self.rows else []) + [place for place, _, _ in self.columns]
        return tuple(bits[place] for place in places)

    def kept(self, bits: Bits, *, columns: bool) -> Tensor | None:
        """Indices of the rows or columns that are on; None for all."""
        if not columns:
            return None if self.rows is None else _on(self.rows[1], bits[self.rows[0]]).nonzero().flatten()
        if not self.columns:
            return None
        keep = torch.ones(self.linear.in_features, dtype=torch.bool)
        for place, wire, start in self.columns:
            on = _on(wire, bits[place])
            keep[start : start + len(on)] = on
        return keep.nonzero().flatten()

    def cut(self, bits: Bits) -> tuple[Tensor, Tensor | None]:
        return self.linear.cut(self.kept(bits, columns=False), self.kept(bits, columns=True))


def _set(state: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in state:
        setattr(owner, name, value)


def _text(units: Tensor) -> str:
    return "".join(str(int(on)) for on in units.tolist())


def _mask_columns(linear: SlicedLinear, start: int, elements: Tensor) -> None:
    """Mask the columns from `start` by (B, columns), beside those that are masked already."""
    before = linear.column_mask
    if before is None:
        before = elements.new_ones(len(elements), linear.in_features)
    end = start + elements.shape[1]
    linear.column_mask = torch.cat([before[:, :start], elements, before[:, end:]], dim=1)


def _on(wire: Wire, units: str) -> Tensor:
    on = torch.tensor([unit == "1" for unit in units])
    members = on[wire.gate.group_of.long().cpu()]
    return members.repeat_interleave(wire.each)


def _by_linear(wires: list[Wire]) -> list[_LinearWires]:
    found: dict[int, _LinearWires] = {}

    def entry(linear: SlicedLinear) -> _LinearWires:
        return found.setdefault(id(linear), _LinearWires(linear, None, []))

    for place, wire in enumerate(wires):
        for linear in wire.rows:
            entry(linear).rows = (place, wire)
        for linear, start in wire.columns:
            entry(linear).columns.append((place, wire, start))
    return list(found.values())


def _with_first(gates: Tensor) -> Tensor:
    """Gate 0 is always on."""
    return torch.cat([torch.ones_like(gates[:, :1]) if gates.shape[1] else gates.new_ones(len(gates), 1), gates], dim=1)


def _has(block: nn.Module, name: str) -> bool:
    try:
        return block.get_submodule(name) is not None
    except AttributeError:  # the last block of SD3 has None in its place
        return False


def _sliced(block: nn.Module, name: str) -> SlicedLinear:
    linear = block.get_submodule(name)
    if isinstance(linear, SlicedLinear):
        return linear
    if type(linear) is not nn.Linear:
        raise UnsupportedModelError(
            f"{name} of a {type(block).__name__} is a {type(linear).__name__}; dynamic width slices plain nn.Linear "
            "layers: quantise, fuse or add adapters afterwards"
        )
    return SlicedLinear.take_over(linear)


def _refuse_unknown(path: str, block: nn.Module, gate: GateRule) -> None:
    """Layers whose rows are no units."""
    for name in gate.rows:
        parent = name.rpartition(".")[0]
        if isinstance(block.get_submodule(parent), (GEGLU, SwiGLU)):
            kind = type(block.get_submodule(parent)).__name__
            raise UnsupportedModelError(
                f"{path}.{gate.name} has a gated activation ({kind}): its channels are made by two halves of a layer, "
                "which dynamic width does not slice; use a network with activation_fn='gelu-approximate'"
            )
    if getattr(getattr(block, gate.name), "fused_projections", False):
        raise UnsupportedModelError(
            f"{path}.{gate.name} has fused projections, which are not sliced; call unfuse_qkv_projections() first"
        )


def _bytes(linear: nn.Linear) -> int:
    return sum(value.numel() * value.element_size() for value in linear.parameters())


def _embedding_width(network: nn.Module, rule: DynamicRule) -> int:
    return int(network.get_submodule(rule.time_embed).linear_2.out_features)  # type: ignore[union-attr, arg-type]
