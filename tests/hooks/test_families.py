"""The rows of the model families: true of the stock classes, derivable for others, and printed where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import apply_first_block_cache, apply_layerwise_casting
from torch import Tensor, nn

import families
import tiny
from families import CASES, Case
from flowaccel import RecipeConflictError, UnsupportedModelError
from flowaccel.hooks import (
    FAMILIES,
    Block,
    BlockList,
    Call,
    Family,
    close_session,
    denoiser,
    family_of,
    networks,
    open_session,
    register_family,
    tensors_of,
)

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_row_is_found_by_class(case: Case) -> None:
    pipe = case.make()
    found = {family_of(network).name for network in networks(pipe).values()}
    assert found == {case.family}
    assert tuple(networks(pipe)) == case.networks


def test_a_subclass_belongs_to_its_parents_family() -> None:
    class Tuned(type(tiny.sit_network())):  # type: ignore[misc]
        pass

    network = tiny.sit_network()
    network.__class__ = Tuned
    assert family_of(network).name == "sit"


@ALL
def test_block_rows_are_true(case: Case) -> None:
    """Every block is seen in order, its tokens are where the row says, and taking its output apart loses nothing."""
    pipe = case.make()
    expected = case(pipe, batch=2)
    session, seen = open_session(pipe), []

    def interceptor(call_next: Callable[..., Any], call: Call, block: Block) -> Any:
        seen.append(block.index)
        output = call_next(block.arguments)
        hidden, encoder = block.unpack(output)
        assert hidden.shape[0] == call.rows
        assert call.family.nested or hidden.shape == block.hidden.shape
        text_goes_on = block.encoder is not None and "encoder" in block.blocks.returns
        assert encoder is None or (text_goes_on and encoder.shape == block.encoder.shape)
        return block.pack(hidden, encoder)

    session.on_block(interceptor)
    assert torch.equal(case(pipe, batch=2), expected)
    found = [getattr(denoiser(pipe), blocks.path) for blocks in family_of(denoiser(pipe)).blocks]
    count = sum(len(one) if isinstance(one, nn.ModuleList) else 1 for one in found)
    assert count > 1
    assert seen == list(range(count)) * len(session.run.records)


@ALL
def test_rows_can_be_taken_out_of_a_call(case: Case) -> None:
    """What the row calls shared is shared: one image's rows alone give that image's outputs."""
    pipe = case.make()
    session, errors = open_session(pipe), []

    def interceptor(call_next: Callable[..., Any], call: Call) -> Any:
        output = call_next()
        rows = torch.tensor([1 + branch * call.images for branch in range(len(call.branches))])
        alone = call_next(call.take(rows))
        errors.append(tensors_of(alone)[0] - tensors_of(output)[0][rows])
        return output

    session.on_call(interceptor)
    case(pipe, batch=3)
    assert max(float(error.abs().max()) for error in errors) < 1e-4


def test_taking_rows_reaches_into_dictionaries_and_lists() -> None:
    pipe = tiny.sd3_pipeline()
    calls: list[Call] = []
    open_session(pipe).on_call(lambda call_next, call: (calls.append(call), call_next())[1])
    pipe(**families.sd3_arguments(batch=3, guided=False))
    rows = torch.arange(3.0)
    given = {"images": [10, 11, 12], "control": [rows, rows + 3], "extra": {"size": rows}, "flag": True, "ids": rows}
    row = replace(calls[0].family, lists=("images",), shared=("ids",))
    taken = replace(calls[0], arguments=given, family=row).take(torch.tensor([2, 0]))
    assert taken["images"] == [12, 10]
    assert [entry.tolist() for entry in taken["control"]] == [[2, 0], [5, 3]]
    assert taken["extra"]["size"].tolist() == [2, 0]
    assert taken["ids"].tolist() == [0, 1, 2]
    assert taken["flag"] is True


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "wan21", "cogview4", "auraflow", "dit", "sit"])
def test_a_missing_row_is_derived(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row, a family's blocks are found, and their outputs told apart on the first call."""
    case, written = CASES[name], FAMILIES[CASES[name].family]
    monkeypatch.delitem(FAMILIES, case.family)
    pipe = case.make()
    derived = family_of(denoiser(pipe))
    assert derived.derived
    assert [blocks.path for blocks in derived.blocks] == [blocks.path for blocks in written.blocks]
    expected = case(pipe, batch=2)
    session, orders = open_session(pipe), {}

    def interceptor(call_next: Callable[..., Any], call: Call, block: Block) -> Any:
        orders[block.blocks.path] = block.blocks.returns
        return block.pack(*block.unpack(call_next()))

    session.on_block(interceptor)
    assert torch.equal(case(pipe, batch=2), expected)
    assert orders == {blocks.path: blocks.returns for blocks in written.blocks}


class Plain(ModelMixin, ConfigMixin):
    """A network without a list of blocks."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (self.layer(hidden_states),)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(encoder_hidden_states), self.layer(hidden_states)


class Ambiguous(ModelMixin, ConfigMixin):
    """As many text as image tokens: shapes do not tell the two outputs of a block apart."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 8) -> None:
        super().__init__()
        self.project = nn.Linear(4, 16)
        self.layers = nn.ModuleList([Pair(), Pair()])
        self.back = nn.Linear(16, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        tokens = self.project(hidden_states.flatten(2).transpose(1, 2))
        text = tokens
        for layer in self.layers:
            text, tokens = layer(hidden_states=tokens, encoder_hidden_states=text)
        return (self.back(tokens).transpose(1, 2).reshape(hidden_states.shape),)


def test_a_row_that_cannot_be_derived_is_printed() -> None:
    pipe = tiny.sd3_pipeline()
    pipe.transformer = Plain()
    session = open_session(pipe)
    with pytest.raises(
        UnsupportedModelError, match=r"(?s)Plain is not among the known.*sd3.*no list of.*Family\(name="
    ):
        session.on_block(lambda call_next, call, block: call_next())
    close_session(pipe)


@pytest.fixture
def ambiguous() -> Any:
    pipe = tiny.sit_pipeline()
    pipe.register_modules(transformer=Ambiguous())
    return pipe


def run_by_hand(pipe: Any) -> Tensor:
    """What any pipeline does, for a network that none is made for."""
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(2)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            sample = pipe.scheduler.step(pipe.transformer(sample, timestep)[0], timestep, sample).prev_sample
    return sample


def test_ambiguous_outputs_ask_for_a_row_and_the_printed_row_works(ambiguous: Any) -> None:
    expected = run_by_hand(ambiguous)
    session = open_session(ambiguous)
    session.on_block(lambda call_next, call, block: block.pack(*block.unpack(call_next())))
    with pytest.raises(UnsupportedModelError, match="does not tell image from text tokens") as failure:
        run_by_hand(ambiguous)
    close_session(ambiguous)
    printed = str(failure.value).split("accelerating:\n")[1]
    try:
        exec(printed, {})
        assert not family_of(ambiguous.transformer).derived
        seen = []
        session = open_session(ambiguous)
        session.on_block(lambda call_next, call, block: (seen.append(block.unpack(call_next())), call_next())[1])
        assert torch.equal(run_by_hand(ambiguous), expected)
        assert len(seen) == 2 * 2 * 2  # Heun's two evaluations of two steps, two blocks
    finally:
        close_session(ambiguous)
        FAMILIES.pop("mine", None)


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="'empty' must name at least one network class"):
        register_family(Family(name="empty", networks=(), blocks=()))
    with pytest.raises(ValueError, match=r"blocks 'layers' must return 'hidden', got \('encoder',\)"):
        register_family(
            Family(name="odd", networks=("X",), blocks=(BlockList(path="layers", returns=("encoder",)),)),
        )
    assert {"empty", "odd"}.isdisjoint(FAMILIES)


def test_a_wrong_path_in_a_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        FAMILIES, "sit", replace(FAMILIES["sit"], blocks=(BlockList(path="layers", returns=("hidden",)),))
    )
    session = open_session(tiny.sit_pipeline())
    with pytest.raises(UnsupportedModelError, match="has no blocks 'layers'"):
        session.on_block(lambda call_next, call, block: call_next())


def test_denoiser_is_the_transformer_or_the_unet() -> None:
    pipe = tiny.sit_pipeline()
    assert denoiser(pipe) is pipe.transformer

    class WithUnet:
        transformer = None
        unet = nn.Linear(1, 1)

    assert denoiser(WithUnet()) is WithUnet.unet
    with pytest.raises(TypeError, match="object has neither a transformer nor a unet"):
        denoiser(object())


# -- other frameworks' caches


def native(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def native_hook(pipe: Any) -> None:
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))


def marked(pipe: Any) -> None:
    pipe.transformer._is_cached = True  # what cache-dit and para-attn leave on a transformer


@pytest.mark.parametrize(
    ("cache", "message"),
    [(native, "FirstBlockCacheConfig; call disable_cache"), (native_hook, "diffusers hook"), (marked, "cache-dit")],
)
def test_another_frameworks_cache_is_refused(cache: Callable[[Any], None], message: str) -> None:
    pipe = tiny.flux_pipeline()
    cache(pipe)
    before = tiny.snapshot(pipe)
    with pytest.raises(RecipeConflictError, match=f"transformer is already cached by another framework.*{message}"):
        open_session(pipe)
    assert tiny.snapshot(pipe) == before


def test_a_cache_that_is_switched_on_later_is_refused_at_the_next_run() -> None:
    pipe = tiny.flux_pipeline()
    open_session(pipe)
    native(pipe)
    with pytest.raises(RecipeConflictError, match="already cached by another framework"):
        pipe(**families.flux_arguments())
    pipe.transformer.disable_cache()
    assert pipe(**families.flux_arguments()).images.isfinite().all()


def test_hooks_that_are_no_caches_are_welcome() -> None:
    pipe = tiny.flux_pipeline()
    apply_layerwise_casting(pipe.transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    session = open_session(pipe)
    pipe(**families.flux_arguments())
    assert len(session.run.records) == 2 * families.STEPS
