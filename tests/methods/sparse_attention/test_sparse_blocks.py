"""Block-sparse attention: which blocks are predicted, and what is computed of them, against a dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flowaccel.methods.sparse_attention import attention as module
from flowaccel.methods.sparse_attention.attention import (
    KeptBlocks,
    SparseRule,
    block_means,
    block_similarity,
    chosen_backend,
    kept_blocks,
    pairs_kept,
    predicted_blocks,
    sparse_attention,
)

SMALL = SparseRule(query_block=16, key_block=8)


def heads(length: int, width: int = 8, rows: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, length, width, generator=generator) for _ in range(3)]


def dense_mask(blocks: KeptBlocks, length: int) -> Tensor:
    """(B, M, L, L) of all pairs, from the definition, pair by pair of blocks."""
    rows, many, queries, keys = blocks.kept.shape
    rule = blocks.rule
    mask = torch.ones(rows, many, length, length, dtype=torch.bool)
    for query in range(queries):
        for key in range(keys):
            place = slice(query * rule.query_block, (query + 1) * rule.query_block)
            other = slice(key * rule.key_block, (key + 1) * rule.key_block)
            mask[:, :, place, other] = blocks.kept[:, :, query, key, None, None]
    return mask


# -- the prediction


def test_the_blocks_with_the_highest_scores_are_kept() -> None:
    query, key, _ = heads(48)
    found = predicted_blocks(query, key, 0.5, SMALL)
    for row in range(2):
        for head in range(3):
            for block in range(3):
                asked = query[row, head, 16 * block : 16 * block + 16].mean(0)
                scores = torch.stack([asked @ key[row, head, 8 * one : 8 * one + 8].mean(0) for one in range(6)])
                assert set(found.kept[row, head, block].nonzero().flatten().tolist()) == set(
                    scores.topk(3).indices.tolist()
                )
    assert found.each == 3


@pytest.mark.parametrize(("share", "kept"), [(1.0, 6), (0.75, 4), (0.5, 3), (0.25, 2), (0.01, 1)])
def test_how_many_a_share_keeps(share: float, kept: int) -> None:
    assert kept_blocks(6, share) == kept
    query, key, _ = heads(48)
    assert (predicted_blocks(query, key, share, SMALL).kept.sum(3) == kept).all()


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9, 1.0])
def test_the_fewest_blocks_that_have_a_mass(mass: float) -> None:
    query, key, _ = heads(48)
    found = predicted_blocks(3 * query, 3 * key, mass, SparseRule("mass", query_block=16, key_block=8))
    scores = (block_means(3 * query, 16) @ block_means(3 * key, 8).transpose(2, 3) * 8**-0.5).softmax(3)
    had = (scores * found.kept).sum(3)
    least = scores.masked_fill(~found.kept, 2).amin(3)
    assert (had >= mass - 1e-5).all()
    assert (had - least < mass).all()  # one less would not do
    assert found.each is None


def test_similarity_is_the_mean_cosine_of_all_pairs() -> None:
    tokens = heads(19)[0]
    found = block_similarity(tokens, 8)
    assert found.shape == (2, 3, 2)
    block = tokens[1, 2, 8:16]
    pairs = functional.cosine_similarity(block.unsqueeze(0), block.unsqueeze(1), dim=-1)
    torch.testing.assert_close(found[1, 2, 1], pairs.mean())


def test_blocks_of_unlike_tokens_are_computed() -> None:
    """Every block but the second of keys and the third of queries is of tokens that point the same way."""
    torch.manual_seed(1)
    query, key = torch.ones(1, 1, 48, 8), torch.randn(1, 1, 6, 1, 8).repeat(1, 1, 1, 8, 1).flatten(2, 3)
    unlike = torch.eye(8).repeat(2, 1) * torch.tensor([1.0, -1]).repeat_interleave(8).unsqueeze(1)
    query[0, 0, 32:], key[0, 0, 8:16] = unlike, unlike[4:12] * 4 + key.mean()
    rule = SparseRule(similarity=0.5, query_block=16, key_block=8)
    found = predicted_blocks(query, key, 0.3, rule).kept[0, 0]
    assert found[:, 1].all()  # read by all
    assert found[2].all()  # reads all
    assert (found[:2].sum(1) == 3).all()  # beside the two that the level keeps
    assert (predicted_blocks(query, key, 0.3, SMALL).kept.sum(3) == 2).all()


def test_a_shift_of_all_keys_changes_nothing() -> None:
    query, key, _ = heads(48)
    rule = SparseRule(similarity=0.1, query_block=16, key_block=8)
    kept = predicted_blocks(query, key, 0.5, rule).kept
    assert torch.equal(predicted_blocks(query, key + 5, 0.5, rule).kept, kept)


# -- what is computed of them


@pytest.mark.parametrize("rule", [SMALL, SparseRule("mass", None, 16, 8), SparseRule("share", 0.1, 8, 8)], ids=str)
@pytest.mark.parametrize(("tokens", "text", "width"), [(64, 0, 8), (64, 5, 20), (75, 0, 8), (79, 11, 1), (23, 3, 8)])
def test_gathered_is_the_masked_attention(rule: SparseRule, tokens: int, text: int, width: int) -> None:
    query, key, value = heads(tokens + text, width)
    blocks = predicted_blocks(query[:, :, :tokens], key[:, :, :tokens], 0.5, rule)
    mask = dense_mask(blocks, tokens + text)
    found, pairs = sparse_attention(query, key, value, blocks, "gather")
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert int(pairs_kept(blocks, tokens + text)) == mask.sum()
    assert pairs == mask.sum() if blocks.each is not None else pairs >= mask.sum()  # others are padded
    assert not mask.all()


def test_rows_and_heads_have_their_own_blocks() -> None:
    query, key, value = heads(64)
    blocks = predicted_blocks(query, key, 0.5, SMALL)
    assert not torch.equal(blocks.kept[0], blocks.kept[1]) and not torch.equal(blocks.kept[0, 0], blocks.kept[0, 1])
    together, _ = sparse_attention(query, key, value, blocks, "gather")
    alone = predicted_blocks(query[1:], key[1:], 0.5, SMALL)
    found, _ = sparse_attention(query[1:], key[1:], value[1:], alone, "gather")
    torch.testing.assert_close(together[1:], found, atol=1e-6, rtol=1e-5)


def test_what_is_left_out_is_not_read() -> None:
    query, key, value = heads(64)
    blocks = predicted_blocks(query, key, 0.25, SMALL)
    unread = ~blocks.kept.any(2)
    assert unread.any()
    other = value.masked_fill(unread.repeat_interleave(8, 2).unsqueeze(3), float("nan"))
    assert sparse_attention(query, key, other, blocks, "gather")[0].isfinite().all()


def test_half_precision() -> None:
    query, key, value = (part.bfloat16() for part in heads(75))
    blocks = predicted_blocks(query, key, 0.5, SMALL)
    found, _ = sparse_attention(query, key, value, blocks, "gather")
    assert found.dtype == torch.bfloat16
    exact, _ = sparse_attention(query.double(), key.double(), value.double(), blocks, "gather")
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.fixture(scope="module")
def compiled(compiler: None) -> Any:
    """Skips where nothing compiles flex attention."""
    error = module.flex_error(torch.device("cpu"))
    if error is not None:
        pytest.skip(f"flex attention is not compiled here: {error}")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("tokens", "text", "by"), [(384, 0, "share"), (391, 40, "mass")])
def test_flex_is_the_masked_attention(tokens: int, text: int, by: Any) -> None:
    query, key, value = heads(tokens + text, 16)
    blocks = predicted_blocks(query[:, :, :tokens], key[:, :, :tokens], 0.5, SparseRule(by))
    mask = dense_mask(blocks, tokens + text)
    assert not mask.all()
    found, pairs = sparse_attention(query, key, value, blocks, "flex")
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert int(pairs) == mask.sum()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_flex_that_may_not_be_compiled_again_raises() -> None:
    """And does not go on with eager code, which knows no blocks and would read all keys."""
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(RuntimeError, match="recompile_limit"):
        for width in (16, 32, 48):
            query, key, value = heads(256, width)
            sparse_attention(query, key, value, predicted_blocks(query, key, 0.5, SparseRule()), "flex")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_flex_on_a_gpu(width: int) -> None:
    query, key, value = (part.cuda().bfloat16() for part in heads(1024 + 77, width))
    assert chosen_backend("auto", query.device) == "flex"
    blocks = predicted_blocks(query[:, :, :1024], key[:, :, :1024], 0.5, SparseRule())
    found, _ = sparse_attention(query, key, value, blocks)
    exact, _ = sparse_attention(query.double(), key.double(), value.double(), blocks, "gather")
    assert (found - exact).norm() < 0.01 * exact.norm()


# -- what is refused


def test_backends() -> None:
    cpu = torch.device("cpu")
    assert chosen_backend("auto", cpu) == "gather" and chosen_backend("gather", cpu) == "gather"
    with pytest.raises(ValueError, match="backend='sparge' does not run on cpu: it needs a CUDA device; take"):
        chosen_backend("sparge", cpu)
    with pytest.raises(ValueError, match="backend must be one of auto, flex, gather, sparge, got 'fast'"):
        chosen_backend("fast", cpu)  # type: ignore[arg-type]


def test_flex_that_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flex_error", lambda device: "no compiler")
    with pytest.raises(ValueError, match="backend='flex' does not run on cpu: no compiler; take backend='auto'"):
        chosen_backend("flex", torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "top"}, "by must be one of share, mass, got 'top'"),
        ({"similarity": 2}, "similarity must be a cosine from -1 to 1, or None, got 2"),
        ({"query_block": 0}, "query_block must be a whole number of at least 1, got 0"),
        ({"key_block": 64.0}, "key_block must be a whole number of at least 1, got 64.0"),
    ],
)
def test_wrong_rules(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparseRule(**options)


def test_images_of_less_than_a_block() -> None:
    query, key, _ = heads(15)
    with pytest.raises(ValueError, match="at least one whole block of 16 queries and of 8 keys, got 15 tokens"):
        predicted_blocks(query, key, 0.5, SMALL)
