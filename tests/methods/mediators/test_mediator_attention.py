"""Mediator attention as a layer: the formulas, what is held, extra tokens, rectangular grids, attention backends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.nn import functional

import fake_xformers
import tiny
from flowaccel.evaluation import count_macs
from flowaccel.hooks import macs_by_module
from flowaccel.methods.mediators.attention import (
    TAKES_BIAS,
    GridAttention,
    GridAttnProcessor,
    MediatorAttention,
    SoftmaxGridAttention,
)
from flowaccel.methods.mediators.grids import as_tokens
from flowaccel.models.sit import SiTAttnProcessor

DIM, HEADS = 32, 4


def layer(grid: tuple[int, int] = (8, 6), counts: Any = (4, 9), kind: Any = MediatorAttention, **options: Any) -> Any:
    """In double precision, every weight random and biases large enough to count."""
    torch.manual_seed(0)
    taken = {"counts": counts} if kind is MediatorAttention else {}
    module = kind(DIM, HEADS, grid, **taken, **options).double().eval()
    tiny.random_weights(module, 1, std=0.3)
    return module


def tokens(module: GridAttention, rows: int = 2, seed: int = 0) -> Tensor:
    count = module.extra + module.grid[0] * module.grid[1]
    return torch.randn(rows, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bias_map(tables: Any, grid: tuple[int, int]) -> Tensor:
    """(M, n, N), place by place."""
    coarse = functional.interpolate(tables.table, grid, mode="bilinear", align_corners=False)
    places = [
        coarse[:, :, y, x] + tables.rows[:, :, y] + tables.columns[:, :, x]
        for y in range(grid[0])
        for x in range(grid[1])
    ]
    return torch.stack(places, dim=2)


def softmax_rows(query: Tensor, key: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(B, M, Q, K) of heads (B, Q, M, d) and (B, K, M, d)."""
    return ((query.shape[-1] ** -0.5) * torch.einsum("bqmd,bkmd->bmqk", query, key) + bias).softmax(-1)


def reference(module: MediatorAttention, x: Tensor) -> Tensor:
    """The formulas of arXiv 2408.05710 one after the other, with all maps written out."""
    extra, (height, width) = module.extra, module.grid
    query, key, value = (project(x) for project in (module.to_q, module.to_k, module.to_v))
    image = query[:, extra:].transpose(1, 2).unflatten(2, (height, width))
    side = round(module.count**0.5)
    pooled = functional.adaptive_avg_pool2d(image, (side, side)).flatten(2).transpose(1, 2)
    reading: Tensor | float = 0.0
    asking: Tensor | float = 0.0
    if module.mediator_biases is not None:
        biases: Any = module.mediator_biases[str(module.count)]
        reading = functional.pad(bias_map(biases.reading, module.grid), (extra, 0)).expand(len(x), -1, -1, -1)
        asking = functional.pad(bias_map(biases.asking, module.grid), (extra, 0)).transpose(1, 2)
        asking = asking.expand(len(x), -1, -1, -1)
    query, key, heads, pooled = (part.unflatten(-1, (HEADS, -1)) for part in (query, key, value, pooled))
    read = torch.einsum("bmnk,bkmd->bnmd", softmax_rows(pooled, key, reading), heads)
    output = torch.einsum("bmqn,bnmd->bqmd", softmax_rows(query, pooled, asking), read).flatten(2)
    if module.dwc is not None:
        values = value[:, extra:].transpose(1, 2).unflatten(2, (height, width))
        local = module.dwc(values).flatten(2).transpose(1, 2)
        output = torch.cat([output[:, :extra], output[:, extra:] + local], dim=1)
    return module.to_out[0](output)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def zero(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()


# --- the formulas


@pytest.mark.parametrize("count", [4, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False}, {"use_dwc": False}, {"extra": 3}, {"extra": 3, "use_bias": False}, {"bias": False}],
)
@pytest.mark.parametrize("grid", [(8, 6), (3, 8), (7, 7)])
@torch.no_grad()
def test_the_held_biases_give_the_written_out_formulas(grid: Any, options: Any, count: int) -> None:
    module = layer(grid, **options)
    module.use(count)
    x = tokens(module)
    close(module(x), reference(module, x))


@torch.no_grad()
def test_as_many_mediators_as_tokens() -> None:
    """Mediators are the queries then: two softmaxes, and not the one of full attention."""
    module = layer((6, 6), (36,))
    zero([*module.mediator_biases.parameters(), *module.dwc.parameters()])
    x = tokens(module)
    query, key, value = module.split(module.to_q(x), module.to_k(x), module.to_v(x))
    twice = softmax_rows(query, query) @ softmax_rows(query, key)
    expected = module.to_out[0](torch.einsum("bmqk,bkmd->bqmd", twice, value).flatten(2))
    close(module(x), expected)
    once = module.to_out[0](torch.einsum("bmqk,bkmd->bqmd", softmax_rows(query, key), value).flatten(2))
    assert (expected - once).abs().max() > 0.1


@torch.no_grad()
def test_constant_values_come_out_as_they_are() -> None:
    """Both maps have rows that sum to 1."""
    module = layer(use_dwc=False)
    zero([module.to_v.weight])
    found = module(tokens(module))
    close(found, module.to_out[0](module.to_v.bias).expand_as(found))


@torch.no_grad()
def test_a_convolution_with_one_tap_adds_the_values() -> None:
    module = layer()
    zero(module.dwc.parameters())
    module.dwc.weight[:, 0, 1, 1] = 1
    x = tokens(module)
    plain = copy.deepcopy(module)
    plain.dwc = None
    close(module(x) - plain(x), functional.linear(module.to_v(x), module.to_out[0].weight))


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"use_dwc": False}, {"extra": 2}])
@torch.no_grad()
def test_full_attention_with_biases_and_convolution(options: Any) -> None:
    module = layer(kind=SoftmaxGridAttention, **options)
    x = tokens(module)
    extra = module.extra
    query, key, value = module.split(module.to_q(x), module.to_k(x), module.to_v(x))
    bias: Tensor | float = 0.0
    if module.place_biases is not None:
        bias = functional.pad(bias_map(module.place_biases, module.grid), (extra, 0, extra, 0))
    output = torch.einsum("bmqk,bkmd->bqmd", softmax_rows(query, key, bias), value).flatten(2)
    if module.dwc is not None:
        output[:, extra:] += module.dwc(module.image(value.flatten(2))).flatten(2).transpose(1, 2)
    close(module(x), module.to_out[0](output))


class Layouts(GridAttnProcessor):
    """Notes the last strides of all that attention gets."""

    def __init__(self) -> None:
        self.last: list[int] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        self.last += [part.stride(-1) for part in (query, key, value, bias) if part is not None]
        return super().attend(query, key, value, bias)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [{}, {"extra": 2}])
@pytest.mark.parametrize("count", [4, 16])
def test_fused_attention_gets_layouts_that_it_takes(rows: int, options: Any, count: int) -> None:
    """Its kernels take no axis of channels, and on GPUs no last axis of a mask, that is strided."""
    module = layer(counts=(count,), **options)
    module.set_processor(noted := Layouts())
    module(tokens(module, rows))
    assert noted.last == [1] * 8
    assert module.dwc is not None
    image = module.dwc(module.image(tokens(module, rows)))
    assert as_tokens(image).is_contiguous()  # what is added to attention


# --- biases that are held


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch() -> None:
    module = layer()
    x = tokens(module, rows=3)
    together = module(x)
    for row in range(3):
        close(module(x[row : row + 1]), together[row : row + 1])


def biases_of(module: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = module.biases(torch.zeros(1, dtype=torch.float64))
    return found


@torch.no_grad()
def test_biases_are_made_once_for_each_number_of_mediators_and_type() -> None:
    module = layer()
    first = biases_of(module)
    assert biases_of(module)[0] is first[0]
    module.use(4)
    assert biases_of(module)[0].shape[2] == 4
    module.use(9)
    assert biases_of(module)[0] is first[0]
    assert [bias.dtype for bias in module.biases(torch.zeros(1))] == [torch.float32] * 2
    assert [tuple(bias.shape) for bias in first] == [(1, HEADS, 9, 48), (1, HEADS, 48, 9)]


def in_place(module: Any) -> None:
    for parameter in module.mediator_biases.parameters():
        parameter.mul_(-2)


def loaded(module: Any) -> None:
    module.load_state_dict({name: -2 * value for name, value in module.state_dict().items()})


def averaged(module: Any) -> None:
    """As an average of weights is put in place, which their version does not show."""
    module.train()
    module(tokens(module))
    for parameter in module.parameters():
        parameter.data.copy_(-2 * parameter.data)
    module.eval()


def assigned(module: Any) -> None:
    state = {name: -2 * value for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [in_place, loaded, averaged, assigned])
@torch.no_grad()
def test_changed_weights_are_seen(change: Callable[[Any], None]) -> None:
    module = layer()
    x = tokens(module)
    before = module(x)
    change(module)
    assert (module(x) - before).abs().max() > 0.01
    close(module(x), reference(module, x))


@torch.no_grad()
def test_a_copy_has_its_own_biases() -> None:
    module = layer()
    x = tokens(module)
    before = module(x)
    other = copy.deepcopy(module)
    assert module._folded and not other._folded
    in_place(other)
    close(other(x), reference(other, x))
    assert torch.equal(module(x), before)


def test_learning_biases_are_never_held() -> None:
    module = layer().train()
    x = tokens(module)
    module(x).square().mean().backward()
    assert not module._folded
    used = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert used == {name for name, _ in module.named_parameters() if not name.startswith("mediator_biases.4")}
    with torch.no_grad():
        module(x)
    assert not module._folded


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = layer()
        x = tokens(module)
        close(module(x), reference(module, x))


# --- extra tokens


@torch.no_grad()
def test_extra_tokens_are_read_but_neither_pooled_nor_blurred() -> None:
    module = layer(extra=3)
    x = tokens(module)
    other = x.clone()
    other[:, :3] += 1
    query, changed = module.to_q(x), module.to_q(other)
    assert torch.equal(module.pooled(query), module.pooled(changed))
    local = module.local(module.to_v(other))
    assert torch.equal(local[:, :3], torch.zeros_like(local[:, :3]))
    assert torch.equal(local, module.local(module.to_v(x)))
    assert ((module(other) - module(x))[:, 3:].abs().amax(-1) > 1e-3).all()  # as keys of the first stage
    for bias in biases_of(module):
        assert bias.shape[2:] in [(9, 51), (51, 9)]
    reading, asking = biases_of(module)
    assert not reading[..., :3].any() and not asking[:, :, :3].any()


# --- rules for other sizes


def test_other_grids_keep_the_ends_of_rows_and_columns() -> None:
    biases = layer((4, 6)).mediator_biases["9"].reading
    other = biases.resized((7, 11))
    for name, size in (("rows", 7), ("columns", 11)):
        found, given = getattr(other, name), getattr(biases, name)
        assert found.shape[-1] == size
        assert torch.equal(found[..., [0, -1]], given[..., [0, -1]])
    assert torch.equal(other.table, biases.table) and other.table is not biases.table
    # from one place to the next in even steps: 7 places over 4 are half a place apart
    close(other.rows[..., 1], (biases.rows[..., 0] + biases.rows[..., 1]) / 2)


# --- cost


@pytest.mark.parametrize(("grid", "count"), [((8, 8), 4), ((8, 8), 16), ((16, 8), 9), ((32, 32), 64)])
def test_multiply_adds_are_those_of_the_formula(grid: tuple[int, int], count: int) -> None:
    """Projections 4 N D^2, both stages 4 n N D, convolution 9 N D; by both counters."""
    module = MediatorAttention(DIM, HEADS, grid, (count,)).eval()
    places = grid[0] * grid[1]
    wanted = 4 * places * DIM**2 + 4 * count * places * DIM + 9 * places * DIM
    x = torch.zeros(1, places, DIM)
    assert count_macs(lambda: module(x)) == pytest.approx(wanted, rel=0.01)
    counted = macs_by_module(module, {"hidden_states": x.to("meta")})
    assert counted is not None and counted[""] == pytest.approx(wanted, rel=0.01)


# --- attention backends


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MediatorAttention, SoftmaxGridAttention])
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_backends_that_add_the_biases(kind: Any, backend: str) -> None:
    module = layer(kind=kind).float()
    x = tokens(module).float()
    before = module(x)
    module.set_attention_backend(backend)
    close(module(x), before, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MediatorAttention, SoftmaxGridAttention])
@torch.no_grad()
def test_xformers_is_given_masks_as_it_takes_them(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones for every row and head, whose rows lie straight in memory, whatever the numbers of tokens."""
    op = fake_xformers.Op()
    fake_xformers.put_in_place(monkeypatch, op)
    module = layer((5, 5), (9,), kind=kind, extra=1).to(dtype)
    x = tokens(module).to(dtype)
    before = module(x)
    module.set_attention_backend("xformers")
    close(module(x), before, 1e-5 if dtype == torch.float32 else 0.05)
    both = [(2, HEADS, 9, 26), (2, HEADS, 26, 9)]
    assert op.seen == (both if kind is MediatorAttention else [(2, HEADS, 26, 26)])


def test_backends_that_take_biases_are_known_to_diffusers() -> None:
    assert set(TAKES_BIAS) < {backend.value for backend in AttentionBackendName}


@pytest.mark.parametrize("backend", [backend.value for backend in AttentionBackendName if backend not in TAKES_BIAS])
@pytest.mark.parametrize("kind", [MediatorAttention, SoftmaxGridAttention])
def test_other_backends_are_refused(kind: Any, backend: str) -> None:
    module = layer(kind=kind)
    module.set_attention_backend(backend)
    with pytest.raises(ValueError, match=f"attention backend '{backend}' cannot add the position biases; take one of"):
        module(tokens(module))


@torch.no_grad()
def test_without_biases_every_backend_may_be_tried() -> None:
    module = layer(use_bias=False).float()
    x = tokens(module).float()
    before = module(x)
    module.set_attention_backend("_native_flash")
    close(module(x), before, 1e-5)


@torch.no_grad()
def test_diffusers_default_backend_cannot_leave_the_biases_out() -> None:
    module = layer()
    x = tokens(module)
    before = module(x)
    with attention_backend("_native_flash"):  # refuses masks
        assert torch.equal(module(x), before)


def test_a_foreign_processor_is_refused() -> None:
    module = layer()
    before = module.processor
    with pytest.raises(TypeError, match="must be a GridAttnProcessor, got a SiTAttnProcessor"):
        module.set_processor(SiTAttnProcessor())
    assert module.processor is before
    module.set_processor(type(before)())


# --- wrong use


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((5,), "must be a square, such as 4, 16 or 64, got 5"),
        ((4, 0), "must be a square, such as 4, 16 or 64, got 0"),
        ((49,), "49 mediators need a grid of at least 7 x 7 tokens, got 8 x 6; take fewer"),
    ],
)
def test_numbers_of_mediators_that_do_not_fit(counts: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layer(counts=counts)


def test_only_numbers_with_biases_can_be_used() -> None:
    module = layer()
    with pytest.raises(ValueError, match=r"there are biases for \[4, 9\] mediators, got 16"):
        module.use(16)
    assert module.count == 9
    free = layer(use_bias=False)
    free.use(16)
    x = tokens(free)
    close(free(x), reference(free, x))
    with pytest.raises(ValueError, match="must be a square"):
        free.use(8)


@pytest.mark.parametrize("count", [47, 50])
def test_another_number_of_tokens(count: int) -> None:
    said = f"hidden_states must have 49 tokens, 1 extra ones and a grid of 8 x 6, got {count}"
    with pytest.raises(ValueError, match=said):
        layer(extra=1)(torch.zeros(1, count, DIM, dtype=torch.float64))


# --- torch


@pytest.mark.parametrize("count", [4, 9])
@torch.no_grad()
def test_it_compiles_in_one_graph(count: int) -> None:
    module = layer()
    module.use(count)
    x = tokens(module)
    compiled: nn.Module = torch.compile(module, backend="eager", fullgraph=True)  # type: ignore[assignment]
    close(compiled(x), reference(module, x))
    torch.compiler.reset()


@torch.no_grad()
def test_half_precision() -> None:
    module = layer()
    x = tokens(module)
    expected = module(x)
    output = module.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() < 0.03 * expected.norm()
    assert all(bias.dtype == torch.bfloat16 for bias in module.biases(x.bfloat16()))
