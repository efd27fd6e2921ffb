"""Attention through a few mediator tokens (Attention Mediators, arXiv 2408.05710).

A layer's queries, pooled over cells of the image, are its mediators. They read keys and values like queries, and then
every query reads the mediators like keys: two small attentions in the place of one whose cost grows with the square of
the number of tokens.

Shapes: B rows, N = H * W tokens of an image (row by row) after E extra ones, n = p * p mediators, M heads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional

TABLE = 7
"""Side of the coarse position tables."""
_STD = 0.02
TAKES_BIAS = ("native", "_native_math", "_native_efficient", "_native_cudnn", "xformers")
"""diffusers' attention backends that add a mask of numbers to the logits; others refuse it, or leave it out."""


def mediator_side(count: int, grid: tuple[int, int]) -> int:
    """Side p of the square of `count` mediators.

    Raises:
        ValueError: no square, or more than there are tokens.
    """
    side = math.isqrt(count) if isinstance(count, int) and count > 0 else 0
    if side * side != count or side == 0:
        raise ValueError(f"the number of mediators must be a square, such as 4, 16 or 64, got {count!r}")
    if side > min(grid):
        raise ValueError(
            f"{count} mediators need a grid of at least {side} x {side} tokens, got {grid[0]} x {grid[1]}; take fewer"
        )
    return side


class MediatorBiases(nn.Module):
    """What is learned for one number of mediators: how much each looks at every place, and every place at it.

    Both are sums of a coarse table, which is interpolated to the grid, a column for rows and one for columns.

    Args:
        heads: M.
        count: n.
        grid: (H, W).
    """

    def __init__(self, heads: int, count: int, grid: tuple[int, int]) -> None:
        super().__init__()
        height, width = grid
        self.grid = grid
        self.an_bias = _table(heads, count, TABLE, TABLE)
        self.ah_bias = _table(1, heads, count, height, 1)
        self.aw_bias = _table(1, heads, count, 1, width)
        self.na_bias = _table(heads, count, TABLE, TABLE)
        self.ha_bias = _table(1, heads, height, 1, count)
        self.wa_bias = _table(1, heads, 1, width, count)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Of mediators looking at places (1, M, n, N), and of places looking at mediators (1, M, N, n)."""
        reading = self._coarse(self.an_bias) + (self.ah_bias + self.aw_bias)
        asking = self._coarse(self.na_bias).permute(0, 1, 3, 4, 2) + (self.ha_bias + self.wa_bias)
        return reading.flatten(3), asking.flatten(2, 3)

    def _coarse(self, table: Tensor) -> Tensor:
        """(M, n, 7, 7) -> (1, M, n, H, W)."""
        return functional.interpolate(table, self.grid, mode="bilinear", align_corners=False).unsqueeze(0)

    def resized(self, grid: tuple[int, int]) -> MediatorBiases:
        """The same for another grid: columns are interpolated so that their ends stay, coarse tables are copied."""
        heads, count = self.an_bias.shape[:2]
        other = MediatorBiases(heads, count, grid).to(self.an_bias.device, self.an_bias.dtype)
        with torch.no_grad():
            other.an_bias.copy_(self.an_bias)
            other.na_bias.copy_(self.na_bias)
            for name, axis in (("ah_bias", 3), ("aw_bias", 4), ("ha_bias", 2), ("wa_bias", 3)):
                target = getattr(other, name)
                target.copy_(_stretched(getattr(self, name), axis, target.shape[axis]))
        return other


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=_STD))


def _stretched(column: Tensor, axis: int, size: int) -> Tensor:
    """Interpolated linearly along an axis, ends kept."""
    moved = column.movedim(axis, -1)
    stretched = functional.interpolate(moved.reshape(1, -1, moved.shape[-1]), size, mode="linear", align_corners=True)
    return stretched.view(*moved.shape[:-1], size).movedim(-1, axis)


class MediatorAttnProcessor:
    """Two attentions through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: MediatorAttention, hidden_states: Tensor) -> Tensor:
        """`hidden_states` (B, E + N, D) -> (B, E + N, D), before the output projection."""
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        mediators = attn.pooled(query)
        reading, asking = attn.biases(hidden_states)
        query, key, mediators, heads = (part.unflatten(-1, (attn.heads, -1)) for part in (query, key, mediators, value))
        read = self._attend(mediators, key, heads, reading)
        attended = self._attend(query, mediators, read, asking).flatten(2)
        return attended if attn.dwc is None else attended + attn.local(value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=bias,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class MediatorAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention through mediators (arXiv 2408.05710).

    One set of projections serves several numbers of mediators; only the biases differ. Which is used is `count`.

    Args:
        dim: D.
        heads: M.
        grid: (H, W).
        counts: the numbers of mediators that there are biases for, squares.
        extra: E, tokens before those of the image: they are read by mediators and ask them, and are neither pooled nor
            blurred, nor do they have biases.
        use_bias: whether there are biases.
        use_dwc: whether a depthwise 3x3 convolution of the values is added.
        bias: whether the projections have biases.

    Raises:
        ValueError: a number of mediators that is no square, or larger than the grid.
    """

    _default_processor_cls = MediatorAttnProcessor
    _available_processors: ClassVar[list[type]] = [MediatorAttnProcessor]
    processor: Any

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        counts: Sequence[int] = (16,),
        *,
        extra: int = 0,
        use_bias: bool = True,
        use_dwc: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.grid, self.extra = heads, dim // heads, grid, extra
        self.counts = tuple(sorted(set(counts)))
        for count in self.counts:
            mediator_side(count, grid)
        self.use_bias, self.is_cross_attention = bias, False
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=bias), nn.Identity()])
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if use_dwc else None
        self.mediator_biases: nn.ModuleDict | None = None
        if use_bias:
            self.mediator_biases = nn.ModuleDict({str(n): MediatorBiases(heads, n, grid) for n in self.counts})
        self.count = self.counts[-1]
        self._folded: dict[Any, tuple[Any, tuple[Tensor, Tensor]]] = {}
        self.processor = MediatorAttnProcessor()

    count: int
    """How many mediators are used."""

    def use(self, count: int) -> None:
        """Set how many mediators are used.

        Raises:
            ValueError: a number that there are no biases for; without biases, no square or too many.
        """
        mediator_side(count, self.grid)
        if self.mediator_biases is not None and count not in self.counts:
            raise ValueError(f"there are biases for {list(self.counts)} mediators, got {count}")
        self.count = count

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, E + N, D) -> (B, E + N, D).

        Raises:
            ValueError: another number of tokens; or an attention backend that would leave the biases out.
        """
        expected = self.extra + self.grid[0] * self.grid[1]
        if hidden_states.shape[1] != expected:
            raise ValueError(
                f"hidden_states must have {expected} tokens, {self.extra} extra ones and a grid of {self.grid[0]} x "
                f"{self.grid[1]}, got {hidden_states.shape[1]}"
            )
        self._check_backend()
        attended: Tensor = self.processor(self, hidden_states)
        return self.to_out[0](attended)

    def _check_backend(self) -> None:
        backend = getattr(self.processor, "_attention_backend", None)
        name = getattr(backend, "value", backend)
        if self.mediator_biases is not None and name is not None and name not in TAKES_BIAS:
            raise ValueError(
                f"the attention backend {name!r} cannot add the position biases of mediators; take one of "
                f"{list(TAKES_BIAS)}, or a network with use_bias=False"
            )

    def pooled(self, query: Tensor) -> Tensor:
        """The mediators (B, n, D): means of the queries (B, E + N, D) over cells of the image."""
        side = mediator_side(self.count, self.grid)
        image = self._image(query)
        return functional.adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2)

    def local(self, value: Tensor) -> Tensor:
        """(B, E + N, D): every token's 3x3 neighbourhood, nothing for extra tokens."""
        assert self.dwc is not None
        blurred = self.dwc(self._image(value)).flatten(2).transpose(1, 2)
        return functional.pad(blurred, (0, 0, self.extra, 0))

    def biases(self, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of both attentions, (1, M, n, E + N) and (1, M, E + N, n), in the type of `like`; held unless it learns."""
        if self.mediator_biases is None:
            return None, None
        tables: Any = self.mediator_biases[str(self.count)]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._fold(tables, like)
        state = tuple((table.data_ptr(), table._version) for table in tables.parameters())
        key = (self.count, like.dtype, like.device)
        held = self._folded.get(key)
        if held is None or held[0] != state:
            held = self._folded[key] = (state, self._fold(tables, like))
        return held[1]

    def _fold(self, tables: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        reading, asking = (bias.to(like.dtype) for bias in tables())
        return functional.pad(reading, (self.extra, 0)), functional.pad(asking, (0, 0, self.extra, 0))

    def _image(self, tokens: Tensor) -> Tensor:
        """(B, E + N, D) -> (B, D, H, W) without the extra tokens."""
        return tokens[:, self.extra :].transpose(1, 2).unflatten(2, self.grid)
