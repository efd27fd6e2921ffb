"""Block-sparse attention: the key blocks that a block of queries reads are predicted from block means.

The idea is SpargeAttn's (arXiv 2502.18137); none of its code is used.

Tokens of an image come first, those of a text after them. Whole blocks of the image are sparse. What is left over, the
image's last tokens that fill no block, and the text, is not: these keys are read by all, and these queries read all.

Shapes: B rows, M heads, N tokens of an image, L = N + T with T tokens of a text, d width of a head, Q = N // q blocks
of q queries, K = N // k blocks of k keys.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flowaccel.checks import check_whole

By = Literal["share", "mass"]
Backend = Literal["auto", "flex", "gather", "sparge"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_CPU_BYTES, _BYTES = 2**21, 2**28
"""Keys that are gathered at once: more leave the caches of a CPU, fewer wait for calls."""
_SPARGE, _SPARGE_BLOCKS = "spas_sage_attn", (128, 64)


@dataclass(frozen=True)
class SparseRule:
    """Rule that predicts which key blocks a query block reads.

    Args:
        by: what a level says: the `share` of the key blocks that is kept, or the `mass` of the predicted attention that
            the fewest kept ones have; the second differs by image, and the host waits for how many those are.
        similarity: a block whose tokens' mean pairwise cosine is below this has a mean that says little: as keys it is
            read by all, as queries it reads all. From -1 to 1; None asks for nothing.
        query_block: queries of a block, q.
        key_block: keys of a block, k.

    Raises:
        ValueError: out of range.
    """

    by: By = "share"
    similarity: float | None = None
    query_block: int = 128
    key_block: int = 64

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {self.by!r}")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity must be a cosine from -1 to 1, or None, got {self.similarity!r}")
        check_whole(self, query_block=1, key_block=1)


@dataclass(frozen=True)
class KeptBlocks:
    """Key blocks that each query block reads."""

    kept: Tensor
    """(B, M, Q, K), true where the query block reads the key block."""
    rule: SparseRule
    each: int | None
    """Number of kept key blocks, where it is the same everywhere; None if it has to be counted."""

    @property
    def ends(self) -> tuple[int, int]:
        """First query that reads all keys, and first key that all queries read."""
        return self.kept.shape[2] * self.rule.query_block, self.kept.shape[3] * self.rule.key_block


def block_means(tokens: Tensor, size: int) -> Tensor:
    """Return the means of whole blocks of `size` tokens: (B, M, N, d) -> (B, M, N // size, d) in float32."""
    return _in_blocks(tokens.float(), size).mean(3)


def block_similarity(tokens: Tensor, size: int) -> Tensor:
    """Return the mean cosine of all pairs of tokens of a block: (B, M, N, d) -> (B, M, N // size).

    Pairs of a token with itself are included.
    """
    directions = functional.normalize(_in_blocks(tokens.float(), size), dim=-1)
    return directions.mean(3).square().sum(-1)


def _in_blocks(tokens: Tensor, size: int) -> Tensor:
    """Split tokens into whole blocks: (B, M, N, d) -> (B, M, N // size, size, d)."""
    whole = tokens.shape[2] // size
    return tokens[:, :, : whole * size].unflatten(2, (whole, size))


def kept_blocks(blocks: int, share: float) -> int:
    """Return how many of `blocks` key blocks a share keeps, at least 1."""
    return min(blocks, max(1, round(share * blocks)))


def predicted_blocks(query: Tensor, key: Tensor, level: float, rule: SparseRule) -> KeptBlocks:
    """Select for each query block the key blocks with the highest softmax of d^-0.5 mean(q) mean(k).

    Of the keys their mean over the image is taken away first. That does not change their attention, but whether they
    look alike (`SparseRule.similarity`). Key blocks that do not look alike are read besides those that the level keeps.

    Args:
        query, key: (B, M, N, d), of the image alone.
        level: share or mass that is kept, in (0, 1], see `SparseRule.by`.
        rule: the rule.

    Raises:
        ValueError: the image has less than one whole block of either kind.
    """
    if query.shape[2] < max(rule.query_block, rule.key_block):
        raise ValueError(
            f"the image must have at least one whole block of {rule.query_block} queries and of {rule.key_block} keys, "
            f"got {query.shape[2]} tokens; attend densely, or take smaller blocks"
        )
    key = key - key.mean(2, keepdim=True)
    means = block_means(query, rule.query_block), block_means(key, rule.key_block)
    logits = means[0] @ means[1].transpose(2, 3) * query.shape[-1] ** -0.5
    if rule.similarity is None:
        kept = _chosen(logits, level, rule.by)
    else:
        mixed_queries = block_similarity(query, rule.query_block) < rule.similarity
        mixed_keys = (block_similarity(key, rule.key_block) < rule.similarity).unsqueeze(2)
        lowest = torch.finfo(logits.dtype).min
        kept = _chosen(logits.masked_fill(mixed_keys, lowest), level, rule.by) | mixed_keys | mixed_queries.unsqueeze(3)
    equal = rule.by == "share" and rule.similarity is None
    return KeptBlocks(kept, rule, kept_blocks(logits.shape[3], level) if equal else None)


def _chosen(logits: Tensor, level: float, by: By) -> Tensor:
    """Return a mask of the kept blocks from logits (B, M, Q, K)."""
    if by == "share":
        best = logits.topk(kept_blocks(logits.shape[3], level), dim=3).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(3, best, True)
    masses, order = logits.softmax(3).sort(dim=3, descending=True)
    needed = masses.cumsum(3) - masses < level  # as long as those before do not have it
    return torch.zeros_like(needed).scatter_(3, order, needed)


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: KeptBlocks, backend: Backend = "auto"
) -> tuple[Tensor, int | Tensor]:
    """Compute softmax(d^-0.5 q k^T) v over the pairs that `blocks` keeps.

    Args:
        query, key, value: (B, M, L, d), the image's tokens first.
        blocks: key blocks of the image.
        backend: `gather` copies the keys of each query block together, in plain torch, everywhere. `flex` is torch's
            flex attention, which is compiled for the device and skips blocks. `sparge` is SpargeAttn's kernel for given
            blocks, from the package spas_sage_attn, which quantises. `auto` is `flex` on a CUDA device that runs it,
            else `gather`.

    Returns:
        (B, M, L, d), and how many pairs of all rows and heads were computed; a number, or a tensor () of one.

    Raises:
        ValueError: the backend does not run here.
    """
    chosen = chosen_backend(backend, query.device)
    if chosen == "gather":
        return _gathered(query, key, value, blocks)
    kept = _to_the_end(blocks, query.shape[2])
    if chosen == "flex":
        return _flex(query, key, value, kept, blocks.rule), pairs_kept(blocks, query.shape[2])
    return _sparge(query, key, value, kept, blocks.rule), pairs_kept(blocks, query.shape[2])


def chosen_backend(backend: Backend, device: torch.device) -> Backend:
    """Return the backend that `sparse_attention` uses on a device.

    Raises:
        ValueError: unknown, or it does not run there.
    """
    check_backend(backend)
    if backend == "auto":
        return "flex" if device.type == "cuda" and flex_error(device) is None else "gather"
    error = {"flex": flex_error, "sparge": _sparge_error}.get(backend, lambda _: None)(device)
    if error is not None:
        raise ValueError(f"backend={backend!r} does not run on {device}: {error}; take backend='auto' or 'gather'")
    return backend


def check_backend(backend: str) -> None:
    """Raise a ValueError unless a backend is known."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def pairs_kept(blocks: KeptBlocks, length: int) -> int | Tensor:
    """Return how many query-key pairs of all rows and heads are kept, with `length` tokens.

    Does not wait for the device where the number is known.
    """
    rows, heads, queries, _ = blocks.kept.shape
    sparse, always = blocks.ends
    count = blocks.kept.sum() if blocks.each is None else rows * heads * queries * blocks.each
    rest = rows * heads * (sparse * (length - always) + (length - sparse) * length)
    return count * blocks.rule.query_block * blocks.rule.key_block + rest


def _gathered(query: Tensor, key: Tensor, value: Tensor, blocks: KeptBlocks) -> tuple[Tensor, int]:
    """Compute sparse attention exactly, in plain torch.

    Where query blocks read different numbers of key blocks, those that are computed together all have as many as the
    one with the most, and the excess is masked.
    """
    (end, always), size = blocks.ends, blocks.rule.key_block
    lists = [_in_blocks(part[:, :, :always], size).flatten(0, 2) for part in (key, value)]
    rests = [part[:, :, always:].flatten(0, 1) for part in (key, value)]
    asked = _in_blocks(query[:, :, :end], blocks.rule.query_block).flatten(0, 2).unsqueeze(1)
    kept = blocks.kept.flatten(0, 1)
    heads = torch.arange(len(kept), device=kept.device).repeat_interleave(kept.shape[1])
    order = kept.flatten(0, 1).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order + kept.shape[2] * heads.unsqueeze(1)
    counts = kept.sum(2).flatten()
    numbers = counts.tolist() if blocks.each is None else [blocks.each] * len(counts)  # one wait for the device
    attended, pairs = [], len(kept) * (query.shape[2] - end) * query.shape[2]
    for part in _portions(len(asked), max(numbers) * size * key.shape[3] * key.element_size(), key.device):
        most = max(numbers[part])
        keys, values = (_listed(*both, order[part, :most], heads[part]) for both in zip(lists, rests, strict=True))
        mask = None if blocks.each is not None else _padding(counts[part], most, size, rests[0].shape[1])
        attended.append(functional.scaled_dot_product_attention(asked[part], keys, values, attn_mask=mask))
        pairs += len(keys) * asked.shape[2] * keys.shape[2]
    output = torch.empty_like(query)
    output[:, :, :end] = torch.cat(attended).view(*query.shape[:2], end, query.shape[3])
    if end < query.shape[2]:
        output[:, :, end:] = functional.scaled_dot_product_attention(query[:, :, end:], key, value)
    return output, pairs


def _portions(blocks: int, each: int, device: torch.device) -> list[slice]:
    """Split query blocks into portions whose keys, `each` bytes a block, have a bounded size."""
    at_once = max(1, (_CPU_BYTES if device.type == "cpu" else _BYTES) // each)
    return [slice(start, start + at_once) for start in range(0, blocks, at_once)]


def _listed(listed: Tensor, rest: Tensor, places: Tensor, heads: Tensor) -> Tensor:
    """Gather blocks (blocks, k, d) at `places` (C, n), followed by the rest: (C, 1, n * k + R, d).

    The `rest` is (B * M, R, d), of which `heads` (C,) are taken.
    """
    found = listed.index_select(0, places.flatten()).view(len(places), -1, listed.shape[2])
    if rest.shape[1]:
        found = torch.cat([found, rest.index_select(0, heads)], 1)
    return found.unsqueeze(1)


def _padding(counts: Tensor, most: int, size: int, rest: int) -> Tensor:
    """Return a mask (C, 1, 1, most * size + rest) of the keys that are really read, from block counts (C,)."""
    read = torch.arange(most, device=counts.device) < counts.unsqueeze(1)
    return functional.pad(read.repeat_interleave(size, 1), (0, rest), value=True).unflatten(0, (-1, 1, 1))


def _to_the_end(blocks: KeptBlocks, length: int) -> Tensor:
    """Return the mask (B, M, Q, K) extended by the blocks of the remaining tokens, which are all kept."""
    queries, keys = -(-length // blocks.rule.query_block), -(-length // blocks.rule.key_block)
    _, _, found_queries, found_keys = blocks.kept.shape
    return functional.pad(blocks.kept, (0, keys - found_keys, 0, queries - found_queries), value=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, rule: SparseRule) -> Tensor:
    # full blocks: nothing within them is masked
    counts = kept.sum(3, dtype=torch.int32)
    order = kept.to(torch.int8).argsort(dim=3, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(order),
        counts,
        order,
        BLOCK_SIZE=(rule.query_block, rule.key_block),
        mask_mod=_everything,
        seq_lengths=(query.shape[2], key.shape[2]),
    )
    # blocks of a GPU's kernel must divide these
    tiles = {"BLOCK_M": min(rule.query_block, 128), "BLOCK_N": min(rule.key_block, 64)} if query.is_cuda else None
    try:
        attended: Tensor = _compiled_flex()(query, key, value, block_mask=mask, kernel_options=tiles)
    except FailOnRecompileLimitHit as error:
        raise RuntimeError(
            "flex attention was compiled for as many shapes as torch allows, and without compiling it computes all "
            "pairs; raise torch._dynamo.config.recompile_limit, or use backend='gather'"
        ) from error
    return attended


def _everything(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= 0


@functools.cache
def _compiled_flex() -> Any:
    # past its limit of compilations torch would go on with eager code, which knows no blocks: this makes it raise
    return torch.compile(flex_attention, fullgraph=True)


@functools.cache
def flex_error(device: torch.device) -> str | None:
    """Return why compiled flex attention does not run on a device, or None if it does; tried once."""
    query = torch.zeros(1, 1, 256, 16, device=device)
    kept = torch.ones(1, 1, 2, 4, dtype=torch.bool, device=device)
    try:
        _flex(query, query, query, kept, SparseRule())
    except (RuntimeError, ImportError, OSError, ValueError, AssertionError) as error:  # no compiler, among others
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def _sparge_kernel() -> Any:
    return importlib.import_module(_SPARGE).block_sparse_sage2_attn_cuda


def _sparge(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, rule: SparseRule) -> Tensor:
    if (rule.query_block, rule.key_block) != _SPARGE_BLOCKS:
        raise ValueError(
            f"backend='sparge' has blocks of {_SPARGE_BLOCKS[0]} queries and {_SPARGE_BLOCKS[1]} keys, got "
            f"query_block={rule.query_block} and key_block={rule.key_block}"
        )
    attended: Tensor = _sparge_kernel()(query, key, value, mask_id=kept.to(torch.int8))
    return attended


@functools.cache
def _sparge_error(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    query = torch.zeros(1, 1, 256, 64, device=device, dtype=torch.float16)
    try:
        _sparge(query, query, query, torch.ones(1, 1, 2, 4, dtype=torch.bool, device=device), SparseRule())
    except (RuntimeError, ImportError, AttributeError, TypeError, AssertionError) as error:
        return f"{_SPARGE}: {error}"
    return None
