"""Leaving out tokens: dense, gathered and with a capacity are the same, and an image never depends on its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from test_dynamic_families import FAMILIES, distance, masked, sliced
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
from flowaccel.methods.dynamic_width import fused, gathering
from flowaccel.methods.dynamic_width.fused import TokenSingleBlock
from flowaccel.methods.dynamic_width.gathering import choose_gather, fit_capacities, watched_tokens
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.tokens import TokenFeedForward, fitted_capacity

CLOSE = 1e-5
WIDTH, HEADS, TOKENS, TEXT = 16, 2, 12, 4


def feed_forward(seed: int = 0) -> TokenFeedForward:
    torch.manual_seed(seed)
    module = FeedForward(WIDTH, activation_fn="gelu-approximate")
    tiny.random_weights(module, seed)
    return TokenFeedForward.take_over(module)


def single_block(seed: int = 0) -> TokenSingleBlock:
    torch.manual_seed(seed)
    block = FluxSingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    tiny.random_weights(block, seed, std=0.2)
    return TokenSingleBlock.take_over(block)


def logits(rows: int, seed: int = 0, kept: tuple[int, ...] | None = None) -> Tensor:
    """(rows, TOKENS, 1); row i depends on seed + i, and keeps kept[i] tokens."""
    found = []
    for i in range(rows):
        values = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed + i))
        count = kept[i] if kept else 3 + 2 * i
        threshold = values.sort(descending=True).values
        edge = (threshold[count - 1] + threshold[count]) / 2 if 0 < count < TOKENS else float(count == 0) * 2 - 0.5
        found.append(values - edge)
    return torch.stack(found).unsqueeze(-1)


def chosen(module: Any, scores: Tensor) -> None:
    module.keep, module.logits = scores > 0, scores


def inputs(module: Any, rows: int, seed: int = 0) -> tuple[Any, ...]:
    def draw(*shape: int, base: int = 0) -> Tensor:
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(base + seed + i)) for i in range(rows)]
        )

    if isinstance(module, TokenFeedForward):
        return (draw(TOKENS, WIDTH),)
    angles = torch.rand(TEXT + TOKENS, WIDTH // HEADS // 2, generator=torch.Generator().manual_seed(9)) * 6
    angles = angles.repeat_interleave(2, dim=1)
    rotary = (angles.cos(), angles.sin())
    return draw(TOKENS, WIDTH), draw(TEXT, WIDTH, base=100), draw(WIDTH, base=200), rotary


def first(inputs: tuple[Any, ...], row: int) -> tuple[Any, ...]:
    return tuple(value[row : row + 1] if isinstance(value, Tensor) else value for value in inputs)


@torch.no_grad()
def computed(module: Any, given: tuple[Any, ...]) -> Tensor:
    output = module(*given)
    return torch.cat(output, dim=1) if isinstance(output, tuple) else output


MODULES = pytest.mark.parametrize("make", [feed_forward, single_block])


@MODULES
@pytest.mark.parametrize("kept", [(3, 5, 7), (0, 12, 1), (4, 4, 4), (0, 0, 0), (12, 12, 12)])
def test_dense_gathered_and_capacity_are_the_same(make: Any, kept: tuple[int, ...]) -> None:
    module, scores = make(), logits(3, kept=kept)
    given = inputs(module, 3)
    chosen(module, scores)
    assert tuple(module.keep.sum((1, 2)).tolist()) == kept
    module.gather = False
    expected = computed(module, given)
    module.gather = True
    assert distance(computed(module, given), expected) < CLOSE if expected.any() else not computed(module, given).any()
    module.rows_differ = True
    torch.testing.assert_close(computed(module, given), expected, atol=CLOSE, rtol=CLOSE)
    for capacity in (max(kept), max(kept) + 1, TOKENS, TOKENS + 5):
        module.capacity = capacity
        torch.testing.assert_close(computed(module, given), expected, atol=CLOSE, rtol=CLOSE)


@MODULES
def test_a_token_that_is_left_out_is_not_changed_and_the_others_are(make: Any) -> None:
    module, scores = make(), logits(2)
    given = inputs(module, 2)
    chosen(module, scores)
    output = computed(module, given)
    module.keep = None
    whole = computed(module, given)
    if isinstance(module, TokenSingleBlock):
        output, whole = output[:, TEXT:] - given[0], whole[:, TEXT:] - given[0]
    kept = (scores > 0).squeeze(-1)
    assert not output[~kept].any()
    torch.testing.assert_close(output[kept], whole[kept], atol=1e-5, rtol=1e-5)


@MODULES
def test_a_small_capacity_takes_the_largest_logits(make: Any) -> None:
    module, scores = make(), logits(2, kept=(6, 3))
    given = inputs(module, 2)
    chosen(module, scores)
    module.capacity = 4
    limited = computed(module, given)
    best = torch.zeros(2, TOKENS, 1, dtype=torch.bool)
    for row, count in enumerate((4, 3)):
        best[row, scores[row, :, 0].argsort(descending=True)[:count]] = True
    module.capacity, module.keep, module.logits = None, best, None
    torch.testing.assert_close(limited, computed(module, given), atol=CLOSE, rtol=CLOSE)


@MODULES
@pytest.mark.parametrize("capacity", [None, 5, TOKENS])
def test_an_image_of_a_batch_is_what_it_is_alone(make: Any, capacity: int | None) -> None:
    module, scores = make(), logits(3, kept=(2, 9, 5))
    given = inputs(module, 3)
    module.capacity = capacity
    chosen(module, scores)
    together = computed(module, given)
    for row in range(3):
        chosen(module, scores[row : row + 1])
        torch.testing.assert_close(computed(module, first(given, row)), together[row : row + 1], atol=CLOSE, rtol=CLOSE)


def test_a_capacity_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: Any) -> Any:
        raise AssertionError("the host reads a value")

    for module in (feed_forward(), single_block()):
        given = inputs(module, 2)
        chosen(module, logits(2))
        module.capacity = 7
        with monkeypatch.context() as patch:
            for name in ("nonzero", "item", "tolist", "__int__", "__bool__", "__index__"):
                patch.setattr(Tensor, name, waits)
            module(*given)
            module.capacity = None
            with pytest.raises(AssertionError, match="the host reads"), torch.no_grad():
                module(*given)


# --- the fused block


def reference(block: Any, given: tuple[Any, ...], keep: Tensor) -> Tensor:
    """The stock block's update, for kept image tokens and text."""
    hidden, text, temb, rotary = given
    joined = torch.cat([text, hidden], dim=1)
    output = torch.cat(FluxSingleTransformerBlock.forward(block, hidden, text, temb, rotary), dim=1)
    kept = torch.cat([torch.ones(len(keep), text.shape[1], 1, dtype=torch.bool), keep], dim=1)
    return torch.where(kept, output, joined)


@torch.no_grad()
def test_the_fused_block_is_the_stock_one_on_kept_tokens() -> None:
    block, scores = single_block(), logits(3, kept=(2, 12, 7))
    given = inputs(block, 3)
    expected = reference(block, given, scores > 0)
    chosen(block, scores)
    torch.testing.assert_close(computed(block, given), expected, atol=CLOSE, rtol=CLOSE)
    block.keep = torch.ones_like(scores, dtype=torch.bool)
    assert torch.equal(computed(block, given), torch.cat(FluxSingleTransformerBlock.forward(block, *given), dim=1))
    no_rotary = given[:3]
    chosen(block, scores)
    torch.testing.assert_close(
        computed(block, no_rotary), reference(block, (*no_rotary, None), scores > 0), atol=CLOSE, rtol=CLOSE
    )


def test_queries_are_made_for_kept_tokens_alone() -> None:
    block = single_block()
    given = inputs(block, 1)
    seen: dict[str, int] = {}
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].shape[1])
        )
    chosen(block, logits(1, kept=(5,)))
    computed(block, given)
    some, every = TEXT + 5, TEXT + TOKENS
    assert seen == {"attn.to_q": some, "attn.to_k": every, "attn.to_v": every, "proj_mlp": some, "proj_out": some}


def test_the_attention_backend_is_that_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    network = flux()
    network.set_attention_backend("_native_math")
    asked = []

    def dispatch(*tensors: Tensor, backend: Any) -> Tensor:
        asked.append(backend)
        return dispatch_attention_fn(*tensors, backend=backend)

    monkeypatch.setattr(fused, "dispatch_attention_fn", dispatch)
    sliced(network, **FAMILIES["flux"].arguments())
    assert asked == [network.single_transformer_blocks[0].attn.processor._attention_backend] * 3
    assert asked[0].value == "_native_math"


class Doubled(nn.Module):
    """An attention processor of somebody else's."""

    def __call__(self, attn: Any, hidden_states: Tensor, text: None, mask: None, image_rotary_emb: Any) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (apply_rotary_emb(one, image_rotary_emb, sequence_dim=1) for one in (query, key))
        return 2 * nn.functional.scaled_dot_product_attention(
            *(one.transpose(1, 2) for one in (query, key, value))
        ).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_who_replaces_or_surrounds_attention_is_asked() -> None:
    block, scores = single_block(), logits(2)
    given = inputs(block, 2)
    chosen(block, scores)
    plain = computed(block, given)

    block.attn.set_processor(Doubled())
    replaced = computed(block, given)
    torch.testing.assert_close(replaced, reference(block, given, scores > 0), atol=CLOSE, rtol=CLOSE)
    assert distance(replaced, plain) > 1e-3

    block = single_block()
    chosen(block, scores)
    block.attn.register_forward_hook(lambda _, args, output: 2 * output)
    hooked = computed(block, given)
    torch.testing.assert_close(hooked, reference(block, given, scores > 0), atol=CLOSE, rtol=CLOSE)
    assert distance(hooked, plain) > 1e-3

    block = single_block()
    chosen(block, scores)
    forward = block.attn.forward
    block.attn.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    torch.testing.assert_close(computed(block, given), hooked, atol=CLOSE, rtol=CLOSE)

    block = single_block()
    chosen(block, scores)
    blind = torch.zeros(1, 1, 1, TEXT + TOKENS, dtype=torch.bool)
    blind[..., :6] = True
    limited = computed(block, (*given, {"attention_mask": blind}))
    assert distance(limited, plain) > 1e-3
    ignored = computed(block, (*given, {"ip_hidden_states": None}))
    torch.testing.assert_close(ignored, plain, atol=CLOSE, rtol=CLOSE)


def test_gradients_of_the_fused_block_reach_the_gates() -> None:
    block, scores = single_block(), logits(2)
    given = inputs(block, 2)
    gates = (scores > 0).float().requires_grad_()
    block.keep = gates
    output = torch.cat(block(*given), dim=1)
    torch.testing.assert_close(output.detach(), reference(block, given, scores > 0).detach(), atol=CLOSE, rtol=CLOSE)
    output.square().sum().backward()
    assert (gates.grad != 0).all()


@pytest.mark.parametrize("take_over", [TokenFeedForward.take_over, TokenSingleBlock.take_over])
def test_other_modules_are_refused(take_over: Any) -> None:
    with pytest.raises(TypeError, match="got a Linear"):
        take_over(nn.Linear(2, 2))


def test_large_values_stay_finite_in_half_precision() -> None:
    block = single_block().half()
    given = inputs(block, 1)
    large = tuple(value.half() * 2000 if isinstance(value, Tensor) else value for value in given)
    chosen(block, logits(1))
    with torch.no_grad():
        block.proj_out.weight.mul_(1e3)
    assert computed(block, large).isfinite().all()


# --- whole networks


@pytest.mark.parametrize("name", ["sit", "sd35", "flux", "latte"])
def test_networks_return_the_same_however_tokens_are_left_out(name: str) -> None:
    family = FAMILIES[name]
    network = family.dynamic(1)
    for times in ((0.4,), (0.1, 0.9, 0.5)):
        arguments = family.arguments(batch=3, times=times)
        expected = masked(network, **arguments)
        with watched_tokens(network) as seen:
            assert distance(sliced(network, **arguments), expected) < CLOSE
        fitted = fit_capacities(network, seen, margin=0.0)
        sizes = {site.path: site.module.keep for site in network.dynamic.sites}
        assert all(size is None for size in sizes.values()) and fitted.keys() == sizes.keys()
        assert any(capacity < seen.tokens[path] for path, capacity in fitted.items())
        together = sliced(network, **arguments)
        assert distance(together, expected) < CLOSE
        for row, time in enumerate(times * (3 // len(times))):
            alone = sliced(network, **family.arguments(batch=1, seed=3 + row, times=(time,)))
            assert distance(alone, together[row : row + 1]) < CLOSE
        for site in network.dynamic.sites:
            site.module.capacity, site.module.gather = None, False
        assert distance(sliced(network, **arguments), expected) < CLOSE
        for site in network.dynamic.sites:
            site.module.gather = True


def test_counts_are_those_of_the_routers() -> None:
    family = FAMILIES["sit"]
    network = family.dynamic(1)
    given = []
    site = network.dynamic.sites[1]
    network.transformer_blocks[1].norm2.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with watched_tokens(network) as seen:
        sliced(network, **family.arguments(batch=3))
        sliced(network, **family.arguments(batch=2, seed=8))
    sliced(network, **family.arguments(batch=1))
    expected = torch.cat([(site.router(one) > 0).sum((1, 2)) for one in given[:2]])
    assert seen.counts(site.path).tolist() == expected.tolist()
    assert seen.share(site.path) == pytest.approx(float(expected.float().mean()) / 16)
    last = network.dynamic.kept_tokens(1)[site.path]
    assert last.tolist() == pytest.approx([(site.router(given[2]) > 0).float().mean().item()])


def test_capacities_without_counts_are_refused() -> None:
    network = FAMILIES["sit"].dynamic(1)
    with watched_tokens(network) as seen:
        pass
    with pytest.raises(ValueError, match=r"seen holds nothing of transformer_blocks\.0\.tokens and 2 other"):
        fit_capacities(network, seen)


@pytest.mark.parametrize(
    ("counts", "options", "expected"),
    [
        ([10, 20, 24], {}, 50),  # 24 and a margin of 5
        ([10, 20, 24], {"margin": 0.0}, 25),
        ([10, 20, 26], {"margin": 0.0}, 50),
        ([80], {}, 100),
        ([0], {"margin": 0.0}, 25),
        ([100], {}, 100),
        ([*[10] * 9, 90], {"quantile": 0.9, "margin": 0.0}, 25),
        ([*[10] * 8, 60, 90], {"quantile": 0.9, "margin": 0.0}, 75),
    ],
)
def test_capacities_are_rounded_up_to_quarters(counts: list[int], options: dict[str, float], expected: int) -> None:
    assert fitted_capacity(torch.tensor(counts), 100, **options) == expected


@pytest.mark.parametrize(
    ("counts", "tokens", "options", "message"),
    [
        ([3], 10, {"quantile": 0.0}, "quantile must lie in"),
        ([3], 10, {"quantile": 1.1}, "quantile must lie in"),
        ([3], 10, {"margin": -0.1}, "margin must be at least 0"),
        ([], 10, {}, "counts must hold"),
        ([11], 10, {}, "tokens must be at least 1 and the largest count, 11, got 10"),
    ],
)
def test_wrong_capacities_are_refused(counts: list[int], tokens: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted_capacity(torch.tensor(counts), tokens, **options)


def flux() -> Any:
    return make_dynamic(FAMILIES["flux"].network())


@pytest.mark.parametrize(("cost_of_gathering", "gathers"), [(0.0, True), (1.0, False)])
def test_what_is_faster_is_chosen(monkeypatch: pytest.MonkeyPatch, cost_of_gathering: float, gathers: bool) -> None:
    network = flux()
    measured: list[tuple[bool, int]] = []

    def seconds(module: Any, inputs: tuple[Any, ...]) -> float:
        """A clock that reads multiply-adds, and what gathering is said to cost on top."""
        with FlopCounterMode(display=False) as counter:
            module.forward(*inputs)
        measured.append((module.gather, counter.get_total_flops()))
        return counter.get_total_flops() * (1 + cost_of_gathering * module.gather)

    monkeypatch.setattr(gathering, "_seconds", seconds)
    found = choose_gather(network, rows=2, tokens=16, text_tokens=5, kept=0.5)
    assert found.keys() == {site.path for site in network.dynamic.sites}
    assert all((ratio < 1) == gathers for ratio in found.values())
    assert all(site.module.gather == gathers for site in network.dynamic.sites)
    assert all(site.module.keep is None and site.module.logits is None for site in network.dynamic.sites)
    assert len(measured) == 2 * 2 * (2 + 7)  # two kinds of module, each measured once, in turn
    assert [gather for gather, _ in measured[:4]] in ([False, True, True, False], [True, False, False, True])
    assert found["transformer_blocks.0.tokens"] == pytest.approx(0.5 * (1 + cost_of_gathering))


@pytest.mark.parametrize("name", ["sit", "flux"])
def test_gathering_is_really_timed(name: str) -> None:
    network = FAMILIES[name].dynamic()
    found = choose_gather(network, rows=4, tokens=1024, text_tokens=8, kept=0.0)
    assert all(0 < ratio < 1 for ratio in found.values())  # nothing to compute
    assert choose_gather(network, rows=2, tokens=16, kept=dict.fromkeys(found, 0.5)).keys() == found.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0, "tokens": 4, "kept": 0.5}, "rows and tokens must be at least 1"),
        ({"rows": 1, "tokens": 4, "kept": 0.5, "text_tokens": -1}, "text_tokens at least 0"),
        ({"rows": 1, "tokens": 4, "kept": 1.5}, r"kept must be shares in \[0, 1\]"),
    ],
)
def test_wrong_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_gather(flux(), **options)


def test_a_stock_flux_network_keeps_its_blocks() -> None:
    stock = FAMILIES["flux"].network()
    make_dynamic(stock)
    assert isinstance(stock, FluxTransformer2DModel)
    assert all(type(block) is FluxSingleTransformerBlock for block in stock.single_transformer_blocks)
