"""Sparse attention processors for SD3, FLUX and SiT, controlled by a switch.

Shapes: B rows, N tokens of an image, T of a text, M heads, d width of a head, D = M * d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from flowaccel.methods.sparse_attention.attention import Backend, SparseRule, predicted_blocks, sparse_attention
from flowaccel.models.rows import grouped, joined
from flowaccel.models.stand_in import StandIn

Rotary = tuple[Tensor, Tensor]
Output = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SparseLayer:
    """Rows of a layer that ran sparsely, at one level."""

    path: str
    rows: int
    pairs: int | Tensor
    """Pairs of a query and a key that were computed, of all rows and heads."""
    all_pairs: int
    """Pairs of full attention."""
    head_dim: int
    predicting: int
    """Multiply-adds of the prediction."""

    @property
    def macs_spared(self) -> int:
        """Multiply-adds saved against full attention."""
        return 2 * self.head_dim * (self.all_pairs - int(self.pairs)) - self.predicting


@dataclass
class SparseSwitch:
    """Shared state of a network's processors: the sparsity of the rows of the current call."""

    rule: SparseRule
    min_tokens: int
    """Smallest number of tokens of an image for which pairs are left out."""
    backend: Backend = "auto"
    keep: tuple[float | None, ...] | float | None = None
    """Levels, see `SparseRule.by`: of every row of the present call, or one for all; None and 1 are dense, by the
    untouched processor."""
    only: Callable[[], tuple[int, ...] | None] = field(default=lambda: None)
    """Rows of the call that a block is run for at present; None for all."""
    applies: Callable[[], bool] = field(default=lambda: True)
    """Whether `keep` is for what runs now, rather than for what another thread or pipeline runs meanwhile."""
    text: int = 0
    """Tokens of the text, for layers that take text and image as one."""
    layers: int = 0
    """Number of layers that the switch controls."""
    ran: list[SparseLayer] = field(default_factory=list)
    largest: int = 0
    """Largest number of image tokens of a layer that was to be sparse."""

    def levels(self, rows: int, tokens: int) -> tuple[float | None, ...]:
        """Return the level of each row that a layer is run for; one entry if all are alike.

        `tokens` is the number of tokens of an image.

        Raises:
            ValueError: `keep` is for another number of rows.
        """
        keep = self.keep if self.applies() else None
        if isinstance(keep, tuple):
            only = self.only()
            keep = keep if only is None else tuple(keep[row] for row in only)
            if len(keep) != rows:
                raise ValueError(f"keep must have a level for each of the {rows} rows that run, got {keep!r}")
        levels = keep if isinstance(keep, tuple) else (keep,)
        levels = tuple(None if level is None or level >= 1 else level for level in levels)
        if any(level is not None for level in levels):
            self.largest = max(self.largest, tokens)
        if tokens < max(self.min_tokens, self.rule.query_block, self.rule.key_block):
            return (None,)
        return levels if len(set(levels)) > 1 else levels[:1]


class SparseAttnProcessor(StandIn):
    """Base class of processors that leave out pairs where `switch` says so; else they call `stock`.

    Args:
        stock: the processor in whose place it stands.
        path: name of the attention in its network.
        switch: shared with the other processors of the network.
    """

    def __init__(self, stock: Any, path: str, switch: SparseSwitch) -> None:
        self.stock, self.path, self.switch = stock, path, switch

    @property
    def _attention_backend(self) -> Any:
        """Backend that diffusers' `set_attention_backend` chose for full attention.

        Raises AttributeError where `stock` has no backend to choose, as diffusers expects.
        """
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    def _by_row(
        self,
        dense: Callable[[Tensor, Tensor | None], Output],
        sparse: Callable[[Tensor, Tensor | None, float], Output],
        hidden: Tensor,
        encoder: Tensor | None,
        tokens: int,
    ) -> Output:
        """Compute the rows of each level together."""

        def run(level: float | None, hidden: Tensor, encoder: Tensor | None) -> Output:
            return dense(hidden, encoder) if level is None else sparse(hidden, encoder, level)

        levels = self.switch.levels(len(hidden), tokens)
        if len(levels) == 1:
            return run(levels[0], hidden, encoder)
        groups = grouped(levels, hidden.device)
        parts: list[Any] = [
            run(level, hidden[rows], None if encoder is None else encoder[rows]) for level, rows in groups.items()
        ]
        if isinstance(parts[0], tuple):
            image, text = (joined(part, groups) for part in zip(*parts, strict=True))
            return image, text
        return joined(parts, groups)

    def _attended(self, heads: Sequence[Tensor], tokens: int, level: float) -> Tensor:
        """Attend with queries, keys and values (B, M, N + T, d), the image's first, -> (B, N + T, D)."""
        query, key, value = heads
        blocks = predicted_blocks(query[:, :, :tokens], key[:, :, :tokens], level, self.switch.rule)
        output, pairs = sparse_attention(query, key, value, blocks, self.switch.backend)
        rows, many, length, width = query.shape
        self.switch.ran.append(
            SparseLayer(self.path, rows, pairs, rows * many * length**2, width, width * blocks.kept.numel())
        )
        return output.transpose(1, 2).flatten(2).to(value.dtype)


class SparseSiTAttnProcessor(SparseAttnProcessor):
    """Sparse processor of `SiTAttention`."""

    def __call__(self, attn: Any, hidden_states: Tensor) -> Output:
        """Compute attention before the output projection: `hidden_states` (B, N, D) -> (B, N, D)."""

        def sparse(hidden: Tensor, encoder: Tensor | None, level: float) -> Output:
            return self._attended(image_heads(attn, hidden), hidden.shape[1], level)

        return self._by_row(lambda one, _: self.stock(attn, one), sparse, hidden_states, None, hidden_states.shape[1])


class SparseJointAttnProcessor(SparseAttnProcessor):
    """Sparse processor of SD3's blocks, for joint attention of image and text or for the image alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Output:
        """Compute attention and the output projections; with a mask attention is full.

        Maps `hidden_states` (B, N, D) and `encoder_hidden_states` (B, T, D), or None, to the same shapes.
        """
        tokens = hidden_states.shape[1]

        def dense(hidden: Tensor, encoder: Tensor | None) -> Output:
            output: Output = self.stock(attn, hidden, encoder, attention_mask, *args, **kwargs)
            return output

        def sparse(hidden: Tensor, encoder: Tensor | None, level: float) -> Output:
            attended = self._attended(joint_heads(attn, hidden, encoder), tokens, level)
            return projected(attn, attended, tokens, encoder is not None)

        if attention_mask is not None:
            return dense(hidden_states, encoder_hidden_states)
        return self._by_row(dense, sparse, hidden_states, encoder_hidden_states, tokens)


class SparseFluxAttnProcessor(SparseAttnProcessor):
    """Sparse processor of FLUX's blocks.

    Double-stream blocks take image and text apart, single-stream blocks as one, the text first.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Output:
        """Compute attention; with a mask it is full.

        Maps `hidden_states` (B, N, D) and `encoder_hidden_states` (B, T, D) to the same shapes, projected; or (B, T +
        N, D) and None to (B, T + N, D), before the projection.
        """

        def dense(hidden: Tensor, encoder: Tensor | None) -> Output:
            output: Output = self.stock(attn, hidden, encoder, attention_mask, image_rotary_emb)
            return output

        text = self.switch.text if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        tokens = hidden_states.shape[1] - (text if encoder_hidden_states is None else 0)

        def sparse(hidden: Tensor, encoder: Tensor | None, level: float) -> Output:
            first = hidden if encoder is not None else hidden.roll(-text, 1)
            query, key, value = joint_heads(attn, first, encoder)
            if image_rotary_emb is not None:
                rotary = tuple(part.roll(-text, 0) for part in image_rotary_emb)
                query, key = (apply_rotary_emb(part, rotary) for part in (query, key))
            attended = self._attended((query, key, value), tokens, level)
            return attended.roll(text, 1) if encoder is None else projected(attn, attended, tokens, True)

        if attention_mask is not None:
            return dense(hidden_states, encoder_hidden_states)
        return self._by_row(dense, sparse, hidden_states, encoder_hidden_states, tokens)


def image_heads(attn: Any, hidden: Tensor) -> list[Tensor]:
    """Return queries, keys and values (B, M, N, d) of image tokens (B, N, D), normalised where the layer does so."""
    return _heads(attn, hidden, "to_qkv", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))


def joint_heads(attn: Any, hidden: Tensor, encoder: Tensor | None) -> list[Tensor]:
    """Return queries, keys and values (B, M, N + T, d) of image tokens (B, N, D) and text tokens (B, T, D) or None."""
    image = image_heads(attn, hidden)
    if encoder is None:
        return image
    names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
    text = _heads(attn, encoder, "to_added_qkv", *names)
    return [torch.cat(parts, 2) for parts in zip(image, text, strict=True)]


def _heads(attn: Any, tokens: Tensor, fused: str, layers: Sequence[str], norms: Sequence[str]) -> list[Tensor]:
    if attn.fused_projections:
        parts = getattr(attn, fused)(tokens).chunk(3, dim=-1)
    else:
        parts = [getattr(attn, name)(tokens) for name in layers]
    heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts]
    for place, name in enumerate(norms):
        norm = getattr(attn, name, None)
        heads[place] = heads[place] if norm is None else norm(heads[place])
    return heads


def projected(attn: Any, attended: Tensor, tokens: int, joint: bool) -> Output:
    """Apply the output layers of the image and, if `joint`, of the text to (B, N + T, D)."""
    image, text = attended[:, :tokens], attended[:, tokens:]
    for layer in attn.to_out:
        image = layer(image)
    if not joint:
        return image
    return image, text if attn.context_pre_only else attn.to_add_out(text)
