"""SparseAttention: where and when pairs are left out, per row of a call, what is counted, undone and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

import families
from families import CASES, Case, assert_close, made
from flowaccel import (
    FeatureCache,
    Recipe,
    RecipeConflictError,
    SparseAttention,
    UnsupportedModelError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.hooks import Call, session_of
from flowaccel.methods.sparse_attention.accelerator import attentions, put_switch, switched
from flowaccel.recipe import preset
from policies import sparsity

STEPS = 4
SMALL: dict[str, Any] = {"dense_blocks": 0, "min_tokens": 8, "query_block": 8, "key_block": 4}
"""What does something with 16 tokens."""
EACH = pytest.mark.parametrize("case", [CASES[name] for name in ("sit", "sd3", "flux")], ids=["sit", "sd3", "flux"])


@EACH
def test_it_changes_the_image_and_leaves_nothing_behind(case: Case) -> None:
    pipe = case.make()
    before = made(case, pipe, STEPS, batch=2)
    layers = attentions(pipe.transformer)
    stock = [layer.processor for layer in layers.values()]
    with accelerated(pipe, SparseAttention(keep=0.5, **SMALL)):
        changed = made(case, pipe, STEPS, batch=2)
        found = report(pipe)
        assert {sparsity(call)[0] for call in found.calls} == {tuple(layers)}
        assert f"pairs in {len(layers)} layers" in str(found) and "Sparse attention in" in str(found)
    assert changed.isfinite().all() and (changed - before).abs().max() > 1e-4
    assert [layer.processor for layer in layers.values()] == stock
    assert torch.equal(made(case, pipe, STEPS, batch=2), before)


@EACH
def test_all_blocks_kept_is_full_attention(case: Case) -> None:
    """By our own projections, norms and rotations, in the stock processors' place."""
    pipe = case.make()
    before = made(case, pipe, STEPS, batch=2)
    with accelerated(pipe, SparseAttention(keep=0.999, **SMALL)):
        assert_close(made(case, pipe, STEPS, batch=2), before)
        assert all(done == full > 0 for done, full in (sparsity(call)[1:] for call in report(pipe).calls))


@EACH
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"dense_steps": 1.0}])
def test_neutral_settings_give_the_same_image(case: Case, options: dict[str, Any]) -> None:
    pipe = case.make()
    before = made(case, pipe, STEPS)
    with accelerated(pipe, SparseAttention(**SMALL, **options)):
        assert torch.equal(made(case, pipe, STEPS), before)
        assert not any(sparsity(call)[0] for call in report(pipe).calls)


@EACH
def test_an_image_does_not_depend_on_its_batch(case: Case) -> None:
    pipe = case.make()
    accelerate(pipe, SparseAttention(keep=0.5, **SMALL))
    together = made(case, pipe, STEPS, batch=3)
    for place in range(3):
        assert_close(made(case, pipe, STEPS, batch=1, seed=3 + place), together[place : place + 1])


@EACH
def test_rows_of_one_call_have_their_own_levels(case: Case) -> None:
    """Image 0 dense, 1 and 2 at two levels, as if each were alone; also with a cache that gathers rows."""
    levels = (None, 0.5, 0.25)

    def run(chosen: tuple[Any, ...], seed: int) -> torch.Tensor:
        pipe = case.make()
        accelerate(pipe, FeatureCache(gate="interval", interval=2))
        switch = SparseAttention(**SMALL).switch()
        put_switch(pipe.transformer, switch, 0)

        def interceptor(call_next: Any, call: Call) -> Any:
            with switched(switch, call, tuple(chosen[image] for image in call.row_images)):
                return call_next()

        session_of(pipe).on_call(interceptor)
        return made(case, pipe, STEPS, batch=len(chosen), seed=seed)

    together = run(levels, 3)
    for place, level in enumerate(levels):
        assert_close(run((level,), 3 + place), together[place : place + 1])


def test_levels_for_another_number_of_rows_are_refused() -> None:
    switch = SparseAttention(**SMALL).switch()
    switch.keep = (0.5, None)
    with pytest.raises(ValueError, match="keep must have a level for each of the 3 rows that run"):
        switch.levels(3, 16)
    switch.only = lambda: (1,)
    assert switch.levels(1, 16) == (None,)


def test_dense_steps_and_blocks() -> None:
    case = CASES["sit"]
    pipe = case.make()
    accelerate(pipe, SparseAttention(keep=0.5, **{**SMALL, "dense_blocks": 1}, dense_steps=0.5))
    made(case, pipe, STEPS)
    found = [sparsity(call)[0] for call in report(pipe).calls]
    assert found == [(), (), ("transformer_blocks.1.attn",), ("transformer_blocks.1.attn",)]


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "dense_blocks=2 leaves no block"), ({"dense_blocks": 0}, "has 16 tokens, and min_tokens=4096")],
)
def test_where_it_does_nothing_it_says_so(options: dict[str, Any], said: str) -> None:
    case = CASES["sit"]
    pipe = case.make()
    before = made(case, pipe, STEPS)
    accelerate(pipe, SparseAttention(**options))
    with pytest.warns(UserWarning, match=said):
        assert torch.equal(made(case, pipe, STEPS), before)


def test_multiply_adds() -> None:
    """3 layers of 2 heads of width 8 with 16 tokens: half of 16 x 16 pairs, and 2 x 4 of the prediction."""
    case = CASES["sit"]
    pipe = case.make()
    accelerate(pipe, SparseAttention(keep=0.5, **SMALL))
    made(case, pipe, STEPS)
    found = report(pipe)
    rows = sum(call.rows for call in found.calls)
    assert found.macs_saved == rows * 3 * 2 * 8 * (2 * 16 * 16 // 2 - 2 * 4)


def test_preset_and_json(tmp_path: Any) -> None:
    own = SparseAttention(keep=0.5, by="mass", similarity=0.3, backend="gather")
    assert preset("sparse_attention:keep=0.6").accelerators == (SparseAttention(keep=0.6),)
    Recipe([own]).save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path).accelerators == (own,)


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": 1.5}, {"dense_steps": 2}, {"dense_blocks": -1}, {"min_tokens": 0}, {"backend": "x"}],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        SparseAttention(**options)


def test_fused_projections_of_flux_are_attended_alike() -> None:
    case = CASES["flux"]
    images = []
    for fuse in (False, True):
        pipe = case.make()
        if fuse:
            pipe.transformer.fuse_qkv_projections()
        with accelerated(pipe, SparseAttention(keep=0.5, **SMALL)):
            images.append(made(case, pipe, STEPS))
            assert sparsity(report(pipe).calls[0])[0]
    assert_close(*images)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="this DiTTransformer2DModel has none"):
        accelerate(families.dit_pipeline(), SparseAttention())
    pipe = CASES["sd3"].make()
    *others, last = attentions(pipe.transformer).values()
    last.set_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(RecipeConflictError, match="has a FusedJointAttnProcessor2_0; take that out first"):
        accelerate(pipe, SparseAttention())
    assert {type(layer.processor).__name__ for layer in others} == {"JointAttnProcessor2_0"}
    pipe = CASES["sit"].make()
    accelerate(pipe, SparseAttention(keep=0.5, **SMALL))
    pipe.transformer.transformer_blocks[0].compile()
    with pytest.raises(RecipeConflictError, match="is compiled or has compiled blocks"):
        made(CASES["sit"], pipe, STEPS)
    restore(pipe)
