"""Routers that set a network's width by timestep and the tokens of its feed-forwards.

See DyDiT (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803).

A dynamic network is a stock network with routers beside it, under the name `dynamic`. All other names and weights are
those of the stock network, also after conversion: which head or channel belongs to which gate is an assignment, so
nothing is moved. While training, gates are masks on whole layers; otherwise layers are sliced and tokens gathered.

Shapes: B rows, N image tokens, D width, H units of a gate.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.fused import TokenSingleBlock
from flowaccel.methods.dynamic_width.gated_layers import (
    Bits,
    GatedLayers,
    LinearGates,
    TokenSite,
    WidthGate,
    by_linear,
    linears_of,
    places_of,
)
from flowaccel.methods.dynamic_width.rules import BlockRule, DynamicRule, rule_of
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.sliced import SliceCache, SlicedLinear
from flowaccel.methods.dynamic_width.td_lora import ExpertLinear, TimedLoraSettings, experts_of, standing
from flowaccel.methods.dynamic_width.tokens import TokenChoice, TokenFeedForward
from flowaccel.models.routers import TokenRouter, logistic_noise, never_narrower, straight_through, widened


class Dynamics(nn.Module):
    """Routers of a network, stored at `network.dynamic`, and the layers that they switch."""

    time_mean: Tensor
    """(D,) mean of the timestep embeddings over all times, for `normalise`; and their spread."""
    time_std: Tensor

    def __init__(self, network: nn.Module, settings: DynamicSettings) -> None:
        super().__init__()
        self.settings = settings
        self.rule: DynamicRule = rule_of(network)
        self.blocks: nn.ModuleList = nn.ModuleList()
        self.correction: nn.Parameter = nn.Parameter(torch.zeros(()), requires_grad=False)
        """Term that a controller, where there is one, adds to the target ratio in training."""
        self.generator: torch.Generator | None = None
        """Generator of the noise of training."""
        self.noise: Callable[[str, tuple[int, ...]], Tensor] = self._noise
        """`noise(path, shape)`: the noise of one router's logits."""
        self.chosen: Bits | None = None
        """The plan's gates for the present call; None asks the routers."""
        self.plan: Any = None
        """The `WidthPlan` of the last run of a pipeline, for those who want to see or save it."""
        self.plan_key: Any = None
        """Key of what `plan` was made for, beside the run."""
        self.hard = False
        """Whether gates are those of evaluation also while training, and routers learn nothing."""
        self.masks: list[Tensor] = []
        """(B, units) of the last training call, one per gate."""
        self.embedding = torch.zeros(0)
        """(B, D) what its routers read."""
        width = _embedding_width(network, self.rule)
        self.register_buffer("time_mean", torch.zeros(width))
        self.register_buffer("time_std", torch.ones(width))
        self._off = self._deaf = self._again = False
        self._running = self._timed = False
        self._noises: dict[str, Tensor] = {}
        self._bits: Bits = ()
        self._gated_layers: list[GatedLayers] = []
        self._linears: list[LinearGates] = []
        self._places: list[tuple[nn.Module, str]] = []
        self._known: list[tuple[Any, ...]] = []
        self._experts: list[ExpertLinear] = []
        self.timed_lora: TimedLoraSettings | None = None
        """Settings of the TD-LoRA that the network was given (`add_timed_lora`)."""
        self._sites: list[TokenSite] = []
        self._connect_gates(network, width)
        self.cache: SliceCache = SliceCache(limit=0)
        self.connect()
        self.cache.limit = self.weight_bytes

    # -- construction

    def _connect_gates(self, network: nn.Module, width: int) -> None:
        for rule in self.rule.blocks:
            for place, block in enumerate(network.get_submodule(rule.path).children()):
                self._connect_block(f"{rule.path}.{place}", block, rule, width)

    def _connect_block(self, path: str, block: nn.Module, rule: BlockRule, width: int) -> None:
        own = nn.ModuleDict()
        heads = next(int(getattr(block, gate.name).heads) for gate in rule.gates if gate.kind == "heads")
        for gate in rule.gates:
            if getattr(block, gate.name, None) is None:  # the last block of SD3 has no ff_context
                continue
            if getattr(getattr(block, gate.name), "fused_projections", False):
                raise UnsupportedModelError(
                    f"{path}.{gate.name} has fused projections, which are not sliced; call unfuse_qkv_projections() "
                    "first"
                )
            rows, columns, _, _ = linears_of(block, gate)
            attention = getattr(block, gate.name) if gate.kind == "heads" else None
            made = rows[0].out_features
            units, members = (heads, heads) if attention is not None else (self.settings.groups or heads, made)
            if members % units or made % members or any(row.out_features != made for row in rows):
                raise UnsupportedModelError(
                    f"{path}.{gate.name}: {made} rows cannot be divided into {units} equal groups; "
                    "set groups to a number that divides them, and give all projections the same number of heads"
                )
            if any(start + made > linear.in_features for linear, start in columns):
                raise UnsupportedModelError(
                    f"{path}.{gate.name}: {made} rows are made and fewer are read, as by a gated activation (GEGLU, "
                    "SwiGLU); dynamic width is for plain activations"
                )
            # not the module's own name: PEFT would take it for a target of adapters
            own[f"{gate.name}_gate"] = WidthGate(width, units, members, self.settings)
            self._gated_layers.append(
                GatedLayers(
                    path=f"{path}.{gate.name}",
                    block=len(self.blocks),
                    rule=gate,
                    gate=own[f"{gate.name}_gate"],  # type: ignore[arg-type]
                    each=made // members,
                    rows=rows,
                    columns=columns,
                    attention=attention,
                    module=block,
                )
            )
        if self.settings.tokens and (rule.tokens is not None or rule.fused):
            router = TokenRouter(
                self._gated_layers[-1].rows[0].in_features, self.settings.token_bias, self.settings.gain
            )
            own["tokens"] = router
            self._connect_tokens(path, block, rule, router)
        self.blocks.append(own)

    def _connect_tokens(self, path: str, block: nn.Module, rule: BlockRule, router: TokenRouter) -> None:
        module: TokenChoice
        if rule.tokens is None:
            module, norm, switched = TokenSingleBlock.take_over(block), block, tuple(gate.name for gate in rule.gates)
        else:
            module = TokenFeedForward.take_over(block.get_submodule(rule.tokens.feed_forward))
            norm, switched = block.get_submodule(rule.tokens.norm), (rule.tokens.feed_forward,)
        site = TokenSite(f"{path}.tokens", router, module)
        self._sites.append(site)
        norm.register_forward_pre_hook(functools.partial(self._routed, site), with_kwargs=True)
        for gated in self._gated_layers:
            if gated.path in [f"{path}.{name}" for name in switched]:
                gated.tokens = site

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dynamics:
        """Move as `nn.Module` does, but never to a narrower dtype, because a flipped gate changes the network."""
        return super()._apply(never_narrower(fn), recurse)

    def connect(self) -> None:
        """Rewire after adapters were added, removed or merged, and drop the cached slices.

        Every call looks whether this is needed.

        Raises:
            UnsupportedModelError: layers that cannot be sliced.
            ValueError: the TD-LoRA that the network was trained with was removed.
        """
        self.clear()
        self.cache.clear()
        for gated in self._gated_layers:
            gated.connect()
        self._linears = by_linear(self._gated_layers)
        self._places = list(dict.fromkeys(place for gated in self._gated_layers for place in places_of(gated)))
        self._experts = experts_of(self.layers)
        if self.timed_lora is not None and not self._experts:
            raise ValueError(
                "the TD-LoRA that the gates were trained with is gone: unload_lora_weights() removes all adapters; "
                "delete_adapters(NAME) removes one. Restore the pipeline and accelerate it again"
            )
        self._known = [standing(layer) for layer in self.layers]

    def _follow(self) -> None:
        if [standing(layer) for layer in self.layers] != self._known:
            self.connect()

    # -- what others use

    @property
    def gated_layers(self) -> tuple[GatedLayers, ...]:
        """All gates, in the order of the network's blocks."""
        return tuple(self._gated_layers)

    @property
    def layers(self) -> list[nn.Module]:
        """Modules that currently take the place of the gated linear layers: the layer itself, or PEFT's around it."""
        return [parent._modules[name] for parent, name in self._places]  # type: ignore[misc]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layers that can be sliced, at full size."""
        return sum(_bytes(entry.linear) for entry in self._linears)

    @property
    def gate_weights(self) -> list[int]:
        """Number of weights that every gate switches; its work, except for attention itself, is proportional to it."""
        return [
            sum(linear.weight.numel() for linear in gated.rows)
            + sum(linear.out_features * gated.rows[0].out_features for linear, _ in gated.columns)
            for gated in self._gated_layers
        ]

    def left_out(self, shares: Sequence[float]) -> dict[str, float]:
        """Return the share of each module's work that is skipped for given shares of the gates.

        Args:
            shares: share of each gate that is on, in [0, 1].
        """
        return {gated.path: 1 - share for gated, share in zip(self._gated_layers, shares, strict=True) if share < 1}

    @property
    def sites(self) -> tuple[TokenSite, ...]:
        """Sites at which tokens can be left out, in the order of the blocks."""
        return tuple(self._sites)

    @property
    def fingerprint(self) -> str:
        """A short hash of all that decides which heads and channels are on."""
        digest = hashlib.sha256()
        for tensor in (self.time_mean, self.time_std):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        for gated in self._gated_layers:
            for tensor in (gated.gate.router.weight, gated.gate.router.bias, gated.gate.group_of):
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def given(self, embedding: Tensor) -> Tensor:
        """Return the routers' input for timestep embeddings (B, D), in float32 or float64."""
        given = widened(embedding)
        return (given - self.time_mean) / self.time_std if self.settings.normalise else given

    def logits(self, embedding: Tensor) -> list[Tensor]:
        """Return the routers' logits (B, units - 1) of each gate for timestep embeddings (B, D)."""
        given = self.given(embedding)
        return [gated.gate.router(given) for gated in self._gated_layers]

    def evaluated(self, embedding: Tensor) -> list[Tensor]:
        """Return the gates used in evaluation, bool (B, units) each."""
        with torch.no_grad():
            return [_with_first(logits > 0) for logits in self.logits(embedding)]

    def kept_tokens(self, rows: int) -> dict[str, Tensor]:
        """Return (B,) the share of the tokens that every image of the last call kept, by the path of the site.

        A site that computed all tokens is missing. Nothing waits for the device until the values are read.

        Args:
            rows: B, the rows of that call.
        """
        return {
            site.path: site.gates.float().reshape(rows, -1).mean(1) for site in self._sites if site.gates is not None
        }

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Compute everything inside the context, as in the stock network."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Ignore the time embedding inside the context: no gates are set."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the decisions of the last call, whose tensors have a graph and cannot be copied."""
        return {**self.__dict__, "masks": [], "_noises": {}}

    # -- the forward pass

    def started(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the network: mark the start of a call, whose first time embedding sets the gates."""
        self._running, self._timed = True, False

    def timed(self, module: nn.Module, args: Any, embedding: Tensor) -> None:
        """Forward hook of the module that embeds time: set all gates."""
        if self._deaf:
            return
        if not self._again:
            if self._running and self._timed:  # DiT embeds time once more for its last layer
                return
            self._timed = True
            self._noises = {}
            for site in self._sites:
                site.gates = None
        self._follow()
        if self._off:
            self.clear()
        elif self.training and torch.is_grad_enabled():
            self.embedding = embedding.detach()
            self._mask(self._trained(embedding))
        elif self.chosen is not None:
            self.slice(self.chosen)
        else:
            self._slice_rows(self.evaluated(embedding))
        if self._experts:
            self._tell(self.given(embedding))

    def _tell(self, given: Tensor) -> None:
        """Pass the time to the experts of a TD-LoRA."""
        alike = not torch.is_grad_enabled() and (self.chosen is not None or bool((given == given[:1]).all()))
        for experts in self._experts:
            experts.time = given[:1] if alike else given
        if not alike:
            for site in self._sites:
                site.module.rows_differ = True

    def _trained(self, embedding: Tensor) -> list[Tensor]:
        if self.hard:
            return [mask.float() for mask in self.evaluated(embedding)]
        return [
            _with_first(self._relaxed(w.path, z))
            for w, z in zip(self._gated_layers, self.logits(embedding), strict=True)
        ]

    def _relaxed(self, path: str, logits: Tensor) -> Tensor:
        if path not in self._noises:
            self._noises[path] = self.noise(path, tuple(logits.shape)).to(logits.device)
        return straight_through(logits, self._noises[path], self.settings.tau)

    def _noise(self, path: str, shape: tuple[int, ...]) -> Tensor:
        return logistic_noise(shape, self.generator)

    def _mask(self, masks: list[Tensor]) -> None:
        """Multiply head outputs and hidden channels by masks (B, units).

        Heads are masked before their projection, hidden channels before their activation.
        """
        self.clear()
        self.cache.clear()  # the weights are about to change, and averaging writes them where nobody sees it
        self.masks = masks
        for gated, mask in zip(self._gated_layers, masks, strict=True):
            elements = gated.elements(mask)
            if gated.rule.kind == "channels":
                for linear in (*gated.rows, *gated.added_rows):
                    linear.row_mask = elements
                continue
            for linear, start in (*gated.columns, *gated.added_columns):
                _mask_columns(linear, start, elements)

    def _slice_rows(self, masks: list[Tensor]) -> None:
        """Slice layers to the units that any row of the batch needs, and mask those that other rows do not need."""
        counts = [mask.shape[1] for mask in masks]
        known = torch.cat(masks, dim=1).cpu()  # the host waits once
        self.slice(tuple(_text(units) for units in known.any(0).split(counts)))
        alike = (known == known[:1]).all(0)
        for site in self._sites:
            site.module.rows_differ = not bool(alike.all())
        for gated, mask, same in zip(self._gated_layers, masks, alike.split(counts), strict=True):
            if not bool(same.all()):
                for linear, start in (*gated.columns, *gated.added_columns):
                    _mask_columns(linear, start, gated.elements(mask))
        for entry in self._linears:
            mask_, kept = entry.linear.column_mask, entry.kept(self._bits, columns=True)
            if mask_ is not None and kept is not None:
                entry.linear.column_mask = mask_[:, kept.to(mask_.device)]

    def slice(self, bits: Bits) -> None:
        """Slice every layer to the units that are on, the same for all rows."""
        self.clear()
        self._bits = bits
        for index, entry in enumerate(self._linears):
            key = entry.key(bits)
            away = entry.linear.weight.is_meta  # offloaded piece by piece: there only while its layer runs
            if "0" not in "".join(key):
                # Without gradients tensors all the same: a compiled block then rarely recompiles.
                entry.linear.part = None if torch.is_grad_enabled() or away else entry.linear.whole
                continue
            cut = functools.partial(entry.cut, bits)
            entry.linear.part = cut if away else self.cache.get((index, *key), entry.linear.weight, cut)
        for gated, units in zip(self._gated_layers, bits, strict=True):
            if gated.attention is not None:
                gated.attention.heads = units.count("1")

    def keep_slices(self, plan: Iterable[Bits]) -> None:
        """Drop the cached slices that none of these widths needs."""
        rows = list(plan)
        self.cache.keep_only({(i, *entry.key(bits)) for i, entry in enumerate(self._linears) for bits in rows})

    def clear(self) -> None:
        """Restore the whole layers and drop the decisions."""
        self._bits = ()
        self.masks = []
        for entry in self._linears:
            entry.linear.clear()
        for experts in self._experts:
            experts.time = None
        for gated in self._gated_layers:
            if gated.attention is not None:
                gated.attention.heads = gated.gate.units
        for site in self._sites:
            site.module.keep = site.module.logits = None
            site.module.rows_differ = False

    def ended(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the network: restore its layers in any case.

        The decisions (`masks`, and `gates` of the sites) can be read until the next call.
        """
        self._running = False
        decided = self.masks
        self.clear()
        self.masks = decided

    def _routed(self, site: TokenSite, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that is given the tokens: select the tokens to compute."""
        if self._off:
            site.module.keep = site.module.logits = site.gates = None
            return
        logits = site.router(args[0] if args else kwargs["hidden_states"])
        if self.training and torch.is_grad_enabled() and not self.hard:
            site.gates = self._relaxed(site.path, logits)
        else:
            site.gates, site.module.logits = logits > 0, logits
        if site.capacity is not None:
            site.module.capacity = math.ceil(site.capacity * logits.shape[1])
        site.module.keep = site.gates

    # -- computing again for the backward pass

    def checkpointed(self, checkpoint: Callable[..., Any], module: Callable[..., Any], *args: Any) -> Any:
        """Run a block with gradient checkpointing, repeating its decisions in the recomputation.

        Calls `checkpoint(module, *args)`; what the network is used for in between does not change the decisions.

        Args:
            checkpoint: such as `torch.utils.checkpoint.checkpoint` with `use_reentrant=False`. It must run the block
                with gradients the first time too, or there is nothing to decide by.
            module: the block.
            args: arguments of the block.
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
        """Return everything that a call sets, as (owner, name, value)."""
        names: list[tuple[Any, tuple[str, ...]]] = [
            (self, ("masks", "chosen", "hard", "_off", "_again", "_bits", "_noises")),
            *((entry.linear, ("part", "row_mask", "column_mask")) for entry in self._linears),
            *((experts, ("time",)) for experts in self._experts),
            *((gated.attention, ("heads",)) for gated in self._gated_layers if gated.attention is not None),
            *((site, ("gates",)) for site in self._sites),
            *((site.module, ("keep", "logits", "rows_differ")) for site in self._sites),
        ]
        return [(owner, name, getattr(owner, name)) for owner, own in names for name in own]

    @contextmanager
    def _as_before(self, state: list[tuple[Any, str, Any]]) -> Iterator[None]:
        """Restore `state` inside the context."""
        present = self._state()
        try:
            _set(state)
            self._again = True
            yield
        finally:
            _set(present)


def _set(state: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in state:
        setattr(owner, name, value)


def _text(units: Tensor) -> str:
    return "".join(str(int(on)) for on in units.tolist())


def _mask_columns(linear: SlicedLinear, start: int, elements: Tensor) -> None:
    """Mask the columns from `start` by (B, columns), in addition to those that are masked already."""
    before = linear.column_mask
    if before is None:
        before = elements.new_ones(len(elements), linear.in_features)
    end = start + elements.shape[1]
    linear.column_mask = torch.cat([before[:, :start], elements, before[:, end:]], dim=1)


def _with_first(gates: Tensor) -> Tensor:
    """Prepend gate 0, which is always on."""
    return torch.cat([torch.ones_like(gates[:, :1]) if gates.shape[1] else gates.new_ones(len(gates), 1), gates], dim=1)


def _bytes(linear: nn.Linear) -> int:
    return sum(value.numel() * value.element_size() for value in linear.parameters())


def _embedding_width(network: nn.Module, rule: DynamicRule) -> int:
    return int(network.get_submodule(rule.time_embed).linear_2.out_features)  # type: ignore[union-attr, arg-type]
