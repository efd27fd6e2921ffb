"""Sparse attention that leaves out blocks of query-key pairs, predicted anew in every layer and call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from flowaccel.checks import check_whole
from flowaccel.errors import RecipeConflictError, UnsupportedModelError
from flowaccel.hooks import Call, CallStats, Pipeline, Session, is_compiled, is_present, networks, session_of
from flowaccel.methods.sparse_attention.attention import Backend, By, SparseRule, check_backend
from flowaccel.methods.sparse_attention.processors import (
    SparseAttnProcessor,
    SparseFluxAttnProcessor,
    SparseJointAttnProcessor,
    SparseSiTAttnProcessor,
    SparseSwitch,
)
from flowaccel.models.sit import SiTAttention, SiTAttnProcessor
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.calibration import warn_once

PROCESSORS: dict[type, type[SparseAttnProcessor]] = {
    JointAttnProcessor2_0: SparseJointAttnProcessor,
    FluxAttnProcessor: SparseFluxAttnProcessor,
    SiTAttnProcessor: SparseSiTAttnProcessor,
}
"""Sparse processor of each stock processor."""


@dataclass(frozen=True)
class SparseAttention(Accelerator):
    """Accelerator that leaves out the blocks of query-key pairs whose attention is predicted to be low.

    It follows the sparse levels of RAPID3 (arXiv 2509.22323) and SpargeAttn (arXiv 2502.18137).

    For the attention of SD3 and FLUX, over image and text, and of SiT. The text is never left out. An approximation,
    whose error depends on the model: look at it with `flowaccel evaluate`. It pays only where attention itself is most
    of the work.

    Args:
        keep: share of an image's key blocks that is computed, in (0, 1], or mass of the predicted attention. 1 is
            full attention.
        dense_steps: the share of the steps, from the first on, with full attention.
        by: meaning of `keep`, `share` or `mass`, see `flowaccel.methods.sparse_attention.attention.SparseRule`.
        similarity: blocks whose tokens look less alike than this are not left out; None leaves any out.
        query_block: queries that are decided about together.
        key_block: keys that are decided about together.
        backend: backend of sparse attention, see `flowaccel.methods.sparse_attention.attention.sparse_attention`.
        dense_blocks: so many of the network's first blocks, and of its last, keep full attention.
        min_tokens: the fewest tokens of an image that it is used for; below 4096 it does not pay.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "sparse_attention"
    within_calls = True

    keep: float = 0.6
    dense_steps: float = 0.0
    by: By = "share"
    similarity: float | None = None
    query_block: int = 128
    key_block: int = 64
    backend: Backend = "auto"
    dense_blocks: int = 2
    min_tokens: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep!r}")
        if not 0 <= self.dense_steps <= 1:
            raise ValueError(f"dense_steps must be a share of the steps, from 0 to 1, got {self.dense_steps!r}")
        check_whole(self, dense_blocks=0, min_tokens=1)
        check_backend(self.backend)
        self.switch()

    def switch(self) -> SparseSwitch:
        """Create a switch for a network, dense at first."""
        rule = SparseRule(self.by, self.similarity, self.query_block, self.key_block)
        return SparseSwitch(rule, self.min_tokens, self.backend)

    def attach(self, pipe: Pipeline) -> Detach:
        """Replace the stock attention processors; detaching restores them.

        Raises:
            UnsupportedModelError: a network without such attention.
            RecipeConflictError: other processors than diffusers' stock ones are in place, or it is compiled.
        """
        found = {network: self.switch() for network in networks(pipe).values()}
        with ExitStack() as undo:
            session = session_of(pipe)
            for network, switch in found.items():
                undo.callback(put_switch(network, switch, self.dense_blocks))
                undo.callback(session.on_call(functools.partial(self._intercept, session, network, switch)))
            return undo.pop_all().close

    def _intercept(
        self, session: Session, network: nn.Module, switch: SparseSwitch, call_next: Callable[..., Any], call: Call
    ) -> Any:
        if call.module is not network or call.step < round(self.dense_steps * call.run.num_steps):
            return call_next()
        with switched(switch, call, self.keep):
            output = call_next()
        if self.keep < 1:
            warn_idle(session.pipe, switch, self.dense_blocks, self.name)
        return output


def warn_idle(pipe: Pipeline, switch: SparseSwitch, dense_blocks: int, who: str) -> None:
    """Warn once, with the reason, if a call that was to be sparse was not."""
    reason = ""
    if not switch.layers:
        reason = f"dense_blocks={dense_blocks} leaves no block; take fewer"
    elif switch.largest and not switch.ran:
        reason = f"the image has {switch.largest} tokens, and min_tokens={switch.min_tokens}; make larger images"
    if reason:
        warn_once(pipe, (who, reason), f"{who} does nothing here: {reason}, or leave it out")


def put_switch(network: nn.Module, switch: SparseSwitch, dense_blocks: int) -> Detach:
    """Connect a switch to a network's attentions, except in the first and last blocks; return what undoes it.

    Raises:
        UnsupportedModelError: it has no such attention.
        RecipeConflictError: other processors than diffusers' stock ones are in place, or it is compiled.
    """
    layers = attentions(network)
    _check(network, layers)
    blocks = list(dict.fromkeys(_block_of(path) for path in layers))
    sparse = set(blocks[dense_blocks : len(blocks) - dense_blocks])
    switch.layers = sum(_block_of(path) in sparse for path in layers)
    with ExitStack() as undo:
        for path, layer in layers.items():
            if _block_of(path) in sparse:
                ours = PROCESSORS[type(layer.processor)](layer.processor, path, switch)
                undo.callback(_put_back, layer, ours)
                layer.processor = ours
        return undo.pop_all().close


@contextmanager
def switched(switch: SparseSwitch, call: Call, keep: tuple[float | None, ...] | float | None) -> Iterator[None]:
    """Make the attentions of the call's network as sparse as `keep` says inside the context.

    `keep` is a level, or one for each row of the call, see `SparseSwitch.keep`. What was saved is noted on the call's
    record.

    Raises:
        RecipeConflictError: the network was compiled since.
    """
    _refuse_compiled(call.module)
    text = call.arguments.get("encoder_hidden_states")
    switch.keep, switch.only, switch.text = keep, lambda: call.run.only, 0 if text is None else text.shape[1]
    switch.applies, switch.ran, switch.largest = functools.partial(is_present, call), [], 0
    try:
        yield
    finally:
        switch.keep, switch.only, switch.applies = None, lambda: None, lambda: True
    record = call.record
    record.host_reads += any(not isinstance(layer.pairs, int) for layer in switch.ran)
    record.spared += sum(layer.macs_spared for layer in switch.ran)
    if switch.ran:
        record.stats[SparseAttention.name] = SparseStats(
            layers=tuple(dict.fromkeys(layer.path for layer in switch.ran)),
            pairs=sum(int(layer.pairs) for layer in switch.ran),
            all_pairs=sum(layer.all_pairs for layer in switch.ran),
        )


@dataclass
class SparseStats(CallStats):
    """Statistics of sparse attention in a network call."""

    layers: tuple[str, ...]
    """Names in the network of the attention layers that left out query-key pairs."""
    pairs: int
    """Pairs of a query and a key that these computed."""
    all_pairs: int
    """Pairs that full attention would have computed."""

    def __str__(self) -> str:
        return f", {self.pairs / self.all_pairs:.0%} of the pairs in {len(self.layers)} layers"

    @classmethod
    def summary(cls, stats: Sequence[SparseStats], calls: int, macs: str) -> str:
        """Return the share of the pairs."""
        share = sum(found.pairs for found in stats) / sum(found.all_pairs for found in stats)
        left_out = f", {macs} left out" if macs else ""
        return f"Sparse attention in {len(stats)} of {calls} calls, {share:.0%} of its pairs{left_out}."


def attentions(network: nn.Module) -> dict[str, Any]:
    """Return the attentions over image tokens in the blocks of SD3, FLUX and SiT, by name."""
    found: dict[str, Any] = {}
    for path, module in network.named_modules():
        if isinstance(module, (FluxAttention, SiTAttention)):
            found[path] = module
        elif isinstance(module, JointTransformerBlock):
            found |= {f"{path}.{name}": getattr(module, name) for name in ("attn", "attn2") if getattr(module, name)}
    return found


def _block_of(path: str) -> str:
    return path.rpartition(".")[0]


def _check(network: nn.Module, layers: Mapping[str, Any]) -> None:
    if not layers:
        raise UnsupportedModelError(
            f"{SparseAttention.name} is for the attention of SD3Transformer2DModel, FluxTransformer2DModel and "
            f"SiTTransformer2DModel; this {type(network).__name__} has none"
        )
    _refuse_compiled(network)
    for path, layer in layers.items():
        if isinstance(layer.processor, SparseAttnProcessor):
            raise RecipeConflictError(
                f"{SparseAttention.name} and the sparse head of a policy both set how sparse attention is, and another "
                f"one of them does for {path}; leave one out, such as by LearnedPolicy(levels=('step', 'cache'))"
            )
        if type(layer.processor) not in PROCESSORS:
            raise RecipeConflictError(
                f"{SparseAttention.name} takes the place of stock attention processors, and {path} has a "
                f"{type(layer.processor).__name__}; take that out first, such as by unfuse_qkv_projections() or "
                "unload_ip_adapter()"
            )


def _refuse_compiled(network: nn.Module) -> None:
    if is_compiled(network):
        raise RecipeConflictError(
            f"{SparseAttention.name} decides anew at every call, and this {type(network).__name__} is compiled or has "
            "compiled blocks; compile nothing, or leave it out"
        )


def _put_back(layer: Any, ours: SparseAttnProcessor) -> None:
    if layer.processor is ours:  # else somebody chose another one since
        layer.processor = ours.stock
