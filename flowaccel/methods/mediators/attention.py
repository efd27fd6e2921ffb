"""Attention through a few mediator tokens (Attention Mediators, arXiv 2408.05710).

A layer's queries, pooled over cells of the image, are its mediators. They read keys and values like queries, and then
every query reads the mediators like keys: two small attentions in the place of one whose cost grows with the square of
the number of tokens.

Shapes: B rows, N = H * W tokens of an image (row by row) after E extra ones, n = p * p mediators, M heads, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional

from flowaccel.methods.mediators.grids import as_image, as_tokens
from flowaccel.models.rows import joined

TABLE = 7
"""Side of the coarse position tables."""
_STD = 0.02
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

TAKES_BIAS = ("native", "_native_math", "_native_efficient", "_native_cudnn", "flex", "xformers")
"""diffusers' attention backends that add a mask of numbers to the logits; others refuse it, or leave it out."""
UNLESS_TOLD = "native"
"""Backend of a layer for which none was set, whatever diffusers' default is."""
ALIGNMENT = 8
"""Numbers: xformers refuses masks whose rows begin elsewhere than at multiples of 16 bytes."""


def mediator_side(count: int, grid: tuple[int, int]) -> int:
    """Return the side p of the square of `count` mediators.

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


class PlaceBiases(nn.Module):
    """Learned attention biases between n tokens and every place of the grid.

    Each is a coarse table, interpolated to the grid, plus a term for rows and one for columns.

    Args:
        heads: M.
        count: n.
        grid: (H, W).
    """

    def __init__(self, heads: int, count: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.table: nn.Parameter = _normal(heads, count, TABLE, TABLE)
        self.rows: nn.Parameter = _normal(heads, count, grid[0])
        self.columns: nn.Parameter = _normal(heads, count, grid[1])

    def forward(self) -> Tensor:
        """Return the biases (1, M, n, N)."""
        coarse = functional.interpolate(self.table, self.grid, mode="bilinear", align_corners=False)
        return (coarse + (self.rows.unsqueeze(3) + self.columns.unsqueeze(2))).flatten(2).unsqueeze(0)

    def resized(self, grid: tuple[int, int]) -> PlaceBiases:
        """Return a copy for another grid: rows and columns are interpolated with fixed ends, the table is copied."""
        heads, count = self.table.shape[:2]
        other = PlaceBiases(heads, count, grid).to(self.table.device, self.table.dtype)
        with torch.no_grad():
            other.table.copy_(self.table)
            other.rows.copy_(functional.interpolate(self.rows, grid[0], mode="linear", align_corners=True))
            other.columns.copy_(functional.interpolate(self.columns, grid[1], mode="linear", align_corners=True))
        return other


class MediatorBiases(nn.Module):
    """Learned biases for one number of mediators, from mediators to places and from places to mediators."""

    def __init__(self, heads: int, count: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.reading, self.asking = PlaceBiases(heads, count, grid), PlaceBiases(heads, count, grid)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the biases (1, M, n, N) of mediators and (1, M, N, n) of places."""
        return self.reading(), self.asking().transpose(2, 3)


def _normal(*shape: int) -> nn.Parameter:
    table = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(table, std=_STD)
    return table


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors of inference mode have no version


def _aligned(bias: Tensor) -> Tensor:
    """Return `bias` in memory whose rows begin at multiples of `ALIGNMENT`."""
    keys = bias.shape[-1]
    return functional.pad(bias, (0, -keys % ALIGNMENT)).contiguous()[..., :keys]


class GridAttnProcessor:
    """Processor of a `GridAttention` that uses diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: GridAttention, hidden_states: Tensor) -> Tensor:
        """Compute attention before the output projection: `hidden_states` (B, E + N, D) -> (B, E + N, D)."""
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        attended = attn.attend(query, key, value, self.attend)
        return attended if attn.dwc is None else attended + attn.local(value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Compute one attention: (B, Q, M, d), twice (B, K, M, d) and a bias (1, M, Q, K) -> (B, Q, M, d)."""
        # diffusers' default changes with other networks' choices, to backends that leave a bias out without a word
        backend: Any = self._attention_backend or (None if bias is None else UNLESS_TOLD)
        return dispatch_attention_fn(
            query, key, value, attn_mask=bias, backend=backend, parallel_config=self._parallel_config
        )


class GridAttention(nn.Module, AttentionModuleMixin, ABC):
    """Multi-head self-attention over an image's grid, with position biases and a convolution.

    The position biases are learned; the convolution of the values is depthwise, 3x3.

    Args:
        dim: D.
        heads: M.
        grid: (H, W).
        extra: E, tokens before those of the image: they attend and are attended to, and are neither pooled nor blurred,
            nor do they have biases.
        use_dwc: whether there is the convolution.
        bias: whether the projections have biases.
    """

    _default_processor_cls = GridAttnProcessor
    _available_processors: ClassVar[list[type]] = [GridAttnProcessor]
    _supports_qkv_fusion = False  # pooled queries are needed on their own
    processor: Any

    def __init__(
        self, dim: int, heads: int, grid: tuple[int, int], *, extra: int = 0, use_dwc: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.grid, self.extra = heads, dim // heads, grid, extra
        self.use_bias, self.is_cross_attention = bias, False
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.to_out: nn.ModuleList = nn.ModuleList([nn.Linear(dim, dim, bias=bias), nn.Identity()])
        self.dwc: nn.Conv2d | None = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if use_dwc else None
        self.processor = GridAttnProcessor()
        self._folded: dict[Any, tuple[Any, tuple[Tensor, ...]]] = {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the attention: (B, E + N, D) -> (B, E + N, D).

        Raises:
            ValueError: another number of tokens; or an attention backend that would leave the biases out.
        """
        expected = self.extra + self.grid[0] * self.grid[1]
        if hidden_states.shape[1] != expected:
            raise ValueError(
                f"hidden_states must have {expected} tokens, {self.extra} extra ones and a grid of {self.grid[0]} x "
                f"{self.grid[1]}, got {hidden_states.shape[1]}"
            )
        self.check_backend()
        attended: Tensor = self.processor(self, hidden_states)
        return self.to_out[0](attended)

    def set_processor(self, processor: Any) -> None:
        """Set the attention processor.

        Raises:
            TypeError: no `GridAttnProcessor`: it would leave biases, convolution and mediators out.
        """
        if not isinstance(processor, GridAttnProcessor):
            raise TypeError(
                f"the processor of a {type(self).__name__} must be a GridAttnProcessor, got a "
                f"{type(processor).__name__}, which knows nothing of its biases and its convolution"
            )
        super().set_processor(processor)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode as `nn.Module` does, and drop the cached biases."""
        self._folded.clear()  # averaged weights are put in place by ways that tensors do not note
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._folded.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": {}}  # a copy has tables of its own

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Compute attention (B, E + N, D) from the projections (B, E + N, D) each, by means of `attend`."""

    @property
    @abstractmethod
    def tables(self) -> nn.Module | None:
        """Module of the biases in use: called, it returns them without the extra tokens."""

    def split(self, *parts: Tensor) -> list[Tensor]:
        """Split parts into heads: (B, K, D) -> (B, K, M, d) each."""
        return [part.unflatten(-1, (self.heads, -1)) for part in parts]

    def local(self, value: Tensor) -> Tensor:
        """Convolve the 3x3 neighbourhood of every token, (B, E + N, D); extra tokens get 0."""
        assert self.dwc is not None
        blurred = as_tokens(self.dwc(self.image(value)))
        return functional.pad(blurred, (0, 0, self.extra, 0))

    def image(self, tokens: Tensor) -> Tensor:
        """Return the tokens without the extra ones as an image: (B, E + N, D) -> (B, D, H, W)."""
        return as_image(tokens[:, self.extra :], self.grid)

    def biases(self, like: Tensor) -> tuple[Tensor, ...] | None:
        """Return the biases in use, (1, M, ...) including extra tokens, in the dtype of `like`.

        They are cached unless they are being trained.
        """
        tables: Any = self.tables
        if tables is None:
            return None
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._fold(tables, like)
        state = tuple((table.data_ptr(), _version(table)) for table in tables.parameters())
        key = (id(tables), like.dtype, like.device)
        held = self._folded.get(key)
        if held is None or held[0] != state:
            held = self._folded[key] = (state, self._fold(tables, like))
        return held[1]

    def _fold(self, tables: Callable[[], Any], like: Tensor) -> tuple[Tensor, ...]:
        return tuple(_aligned(bias.to(like.dtype)) for bias in self.padded(tables()))

    @abstractmethod
    def padded(self, found: Any) -> tuple[Tensor, ...]:
        """Pad the biases that `tables` returned with 0 for the extra tokens."""

    def check_backend(self, backend: Any = None) -> None:
        """Raise a ValueError if an attention backend, by default the one that is set, would leave the biases out."""
        backend = backend or getattr(self.processor, "_attention_backend", None)
        name = getattr(backend, "value", backend)
        if self.tables is not None and name is not None and name not in TAKES_BIAS:
            raise ValueError(
                f"the attention backend {name!r} cannot add the position biases; take one of {list(TAKES_BIAS)}, or a "
                "network with use_bias=False"
            )

    def try_backend(self, backend: Any) -> None:
        """Compute one small attention with biases by an attention backend, if the layer has biases.

        Raises:
            ValueError: the backend would leave them out, or its kernel cannot add them on this device.
        """
        self.check_backend(backend)
        if self.tables is None:
            return
        weight, name = self.to_q.weight, getattr(backend, "value", backend)
        query = weight.new_zeros(1, 8, self.heads, self.head_dim)
        bias = _aligned(weight.new_zeros(1, self.heads, 8, 8))
        try:
            dispatch_attention_fn(query, query, query, attn_mask=bias, backend=backend)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"the attention backend {name!r} cannot add the position biases on {weight.device} with {weight.dtype} "
                f"({reason}); take another"
            ) from error


class SoftmaxGridAttention(GridAttention):
    """Full attention with the biases and the convolution of mediator attention, its fair baseline.

    Args:
        dim, heads, grid, extra, use_dwc, bias: as for `GridAttention`.
        use_bias: whether there are position biases, as for as many mediators as tokens.
    """

    def __init__(self, dim: int, heads: int, grid: tuple[int, int], *, use_bias: bool = True, **options: Any) -> None:
        super().__init__(dim, heads, grid, **options)
        self.place_biases: PlaceBiases | None = PlaceBiases(heads, grid[0] * grid[1], grid) if use_bias else None

    @property
    def tables(self) -> nn.Module | None:
        """See `GridAttention.tables`."""
        return self.place_biases

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """See `GridAttention.attend`."""
        found = self.biases(query)
        query, key, value = self.split(query, key, value)
        return attend(query, key, value, None if found is None else found[0]).flatten(2)

    def padded(self, found: Tensor) -> tuple[Tensor, ...]:
        """See `GridAttention.padded`."""
        return (functional.pad(found, (self.extra, 0, self.extra, 0)),)


class MediatorAttention(GridAttention):
    """Multi-head self-attention through mediators (arXiv 2408.05710).

    One set of projections serves several numbers of mediators; only the biases differ. Which is used is `count`.

    Args:
        dim, heads, grid, extra, use_dwc, bias: as for `GridAttention`.
        counts: the numbers of mediators that there are biases for, squares.
        use_bias: whether there are biases.

    Raises:
        ValueError: a number of mediators that is no square, or larger than the grid.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        counts: Sequence[int] = (16,),
        *,
        use_bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, grid, **options)
        self.counts = tuple(sorted(set(counts)))
        for count in self.counts:
            mediator_side(count, grid)
        self.mediator_biases: nn.ModuleDict | None = None
        if use_bias:
            self.mediator_biases = nn.ModuleDict({str(n): MediatorBiases(heads, n, grid) for n in self.counts})
        self.count = self.counts[-1]

    count: int
    """Number of mediators in use."""
    groups: Callable[[], Mapping[int, Tensor]] | None = None
    """Function that returns the input rows of each number of mediators, where rows use different numbers."""
    ran: list[tuple[int, int]] | None = None
    """Record of (mediators, rows) of all that is computed; None records nothing."""

    def attention_macs(self, count: int) -> int:
        """Return the multiply-adds of a row's two attentions with `count` mediators."""
        return 4 * count * (self.extra + self.grid[0] * self.grid[1]) * self.heads * self.head_dim

    def use(self, count: int) -> None:
        """Set the number of mediators.

        Raises:
            ValueError: a number that there are no biases for; without biases, no square or too many.
        """
        self.check(count)
        self.count = count

    def check(self, count: int) -> None:
        """Raise the ValueError that `use` would raise."""
        mediator_side(count, self.grid)
        if self.mediator_biases is not None and count not in self.counts:
            raise ValueError(f"there are biases for {list(self.counts)} mediators, got {count}")

    @property
    def tables(self) -> nn.Module | None:
        """See `GridAttention.tables`."""
        return None if self.mediator_biases is None else self.mediator_biases[str(self.count)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Attend from mediators to the values, then from queries to the mediators."""
        if self.groups is None:
            return self._through(query, key, value, attend)
        groups, count = self.groups(), self.count
        found = []
        try:
            for self.count, rows in groups.items():
                found.append(self._through(query[rows], key[rows], value[rows], attend))
        finally:
            self.count = count
        return joined(found, groups)

    def _through(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        if self.ran is not None:
            self.ran.append((self.count, len(query)))
        reading, asking = self.biases(query) or (None, None)
        query, key, value, mediators = self.split(query, key, value, self.pooled(query))
        read = attend(mediators, key, value, reading)
        return attend(query, mediators, read, asking).flatten(2)

    def padded(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """See `GridAttention.padded`."""
        reading, asking = found
        return functional.pad(reading, (self.extra, 0)), functional.pad(asking, (0, 0, self.extra, 0))

    def pooled(self, query: Tensor) -> Tensor:
        """Return the mediators (B, n, D): means of the queries (B, E + N, D) over cells of the image."""
        side = mediator_side(self.count, self.grid)
        return as_tokens(functional.adaptive_avg_pool2d(self.image(query), side))
