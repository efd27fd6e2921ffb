"""Experts: every way to run them gives what all experts on all tokens would give, and none does that much work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowaccel.evaluation import count_macs
from flowaccel.methods.moe import experts as experts_module
from flowaccel.methods.moe.control import set_experts_backend
from flowaccel.methods.moe.experts import BACKENDS, Experts, ExpertShape
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.plans import ExpertPlan
from moe_parts import (
    DIM,
    EXPERTS,
    INNER,
    ROUTERS,
    assert_same,
    every_expert,
    fit,
    gradients,
    moe_layer,
    tokens,
    weights_of,
)

RUNS = tuple(name for name in BACKENDS if name != "auto")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that ran, in order."""
    found: list[str] = []

    def spied(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            found.append(name)
            return run(*args)

        return call

    for name, run in experts_module._RUN.items():
        monkeypatch.setitem(experts_module._RUN, name, spied(name, run))
    return found


def ready(layer: MoEFeedForward, training: bool) -> MoEFeedForward:
    return layer.train() if training else fit(layer)


def plan_of(layer: MoEFeedForward, hidden: Tensor) -> ExpertPlan:
    return layer.route(hidden.flatten(0, 1), len(hidden)).plan


@pytest.mark.parametrize("training", [True, False], ids=["training", "use"])
@pytest.mark.parametrize("router", ROUTERS)
def test_backends_compute_what_all_experts_would(router: str, training: bool, ran: list[str]) -> None:
    capacity = 2 if router == "deepseek" else 1  # weights that sum to 1 have no gradient alone
    layer = ready(moe_layer(router, capacity=capacity, aux_loss_weight=0.0), training)
    hidden = tokens(3, 10)

    def grads(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        layer.zero_grad()
        given = hidden.clone().requires_grad_()
        output = run(given)
        output.square().sum().backward()
        assert given.grad is not None
        return output.detach(), {"input": given.grad, **gradients(layer)}

    def slow(given: Tensor) -> Tensor:
        weights = weights_of(plan_of(layer, given), 30)
        return every_expert(layer, given.flatten(0, 1), weights).view_as(given)

    expected, slopes = grads(slow)
    assert expected.abs().max() > 0.1
    assert slopes["gate.weight"].abs().max() > 1e-3
    even = plan_of(layer, hidden).each is not None
    for backend in RUNS:
        set_experts_backend(layer, backend)
        output, found = grads(layer)
        assert ran[-1] == ("loop" if backend == "bmm" and not even else backend)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert_same(found, slopes, 1e-4)


@pytest.mark.parametrize("activation_fn", ["gelu", "gelu-approximate", "linear-silu", "geglu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_activations(activation_fn: str, bias: bool) -> None:
    layer = moe_layer("expert_choice", activation_fn=activation_fn, bias=bias, shared_inner_dim=8, routed_scale=2.5)
    hidden = tokens(2, 8)
    expected = every_expert(layer, hidden.flatten(0, 1), weights_of(plan_of(layer, hidden), 16)).view_as(hidden)
    for backend in RUNS:
        set_experts_backend(layer, backend)
        torch.testing.assert_close(layer(hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", RUNS)
def test_types(backend: str, dtype: torch.dtype, ran: list[str]) -> None:
    """Decisions and sums are those of wide types; float64 has no grouped kernel."""
    layer = fit(moe_layer("diffmoe", seed=4).to(dtype))
    hidden = tokens(2, 16, dtype=dtype)
    set_experts_backend(layer, backend)
    if backend == "bmm":
        layer.train()
    ran.clear()
    output = layer(hidden)
    assert ran == ["loop" if backend == "grouped_mm" and dtype == torch.float64 else backend]
    assert output.dtype == dtype
    wide = moe_layer("diffmoe", seed=4).to(dtype).double()
    wide.thresholds.load_state_dict(layer.thresholds.state_dict())
    wide.train(layer.training)
    assert torch.equal(plan_of(wide, hidden.double()).mask(32), plan_of(layer, hidden).mask(32))
    torch.testing.assert_close(output.double(), wide(hidden.double()), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(backend: str, given: torch.dtype, ran: list[str]) -> None:
    layer = fit(moe_layer("diffmoe"))
    if backend == "bmm":
        layer.train()
    set_experts_backend(layer, backend)
    hidden = tokens(2, 16, dtype=given).requires_grad_()
    ran.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden)
    assert ran == [backend]
    assert output.dtype == given
    assert layer.plan is not None
    chosen = layer.plan.mask(32)
    expected = layer(hidden.detach().float())
    assert torch.equal(chosen, layer.plan.mask(32))
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)
    output.square().sum().backward()
    assert gradients(layer)["experts.w_in"].abs().max() > 0


@pytest.mark.parametrize(
    ("dim", "inner_dim", "autocast"), [(15, 24, False), (16, 22, False), (12, 24, True)], ids=["D", "H", "autocast"]
)
def test_grouped_products_need_aligned_rows(dim: int, inner_dim: int, autocast: bool, ran: list[str]) -> None:
    """A width of 12 is aligned in float32, not in bfloat16; of 22 gated channels, the 44 rows are aligned, too."""
    layer = moe_layer("token_choice", dim=dim, inner_dim=inner_dim, activation_fn="swiglu")
    hidden = tokens(2, 8, dim=dim)
    expected = layer(hidden)
    set_experts_backend(layer, "grouped_mm")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(hidden)
    assert ran == ["loop", "loop"]
    torch.testing.assert_close(found, expected, atol=0.1 if autocast else 0, rtol=0)


@pytest.mark.parametrize("backend", RUNS)
def test_experts_without_tokens(backend: str) -> None:
    """All tokens to one expert; then no pairs at all."""
    layer = moe_layer("token_choice", aux_loss_weight=0.0, shared_inner_dim=8)
    set_experts_backend(layer, backend)
    hidden = tokens(2, 8).abs().requires_grad_()
    with torch.no_grad():
        layer.gate.weight.zero_()[2] = 1.0
    layer(hidden).square().sum().backward()
    assert layer.plan is not None
    assert layer.plan.counts.tolist() == [0, 0, 16, 0]
    slopes = gradients(layer)["experts.w_in"].abs().amax((1, 2))
    assert slopes[2] > 0
    assert slopes[[0, 1, 3]].max() == 0
    none = fit(moe_layer("expert_threshold", shared_inner_dim=8))
    set_experts_backend(none, backend)
    none.thresholds.gate.fill_(2.0)  # no softmax is above
    torch.testing.assert_close(none(hidden), none.shared(hidden))


@pytest.mark.parametrize("router", ROUTERS)
def test_fewer_tokens_than_experts(router: str) -> None:
    """Three tokens among eight experts: an expert that takes any takes at least one."""
    layer = moe_layer(router, num_experts=8)
    for training in (True, False):
        ready(layer, training)
        output = layer(tokens(1, 3))
        assert output.isfinite().all()
        assert layer.plan is not None
        expected = every_expert(layer, tokens(3), weights_of(layer.plan, 3))
        torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=1e-5)


def test_auto_takes_what_runs(ran: list[str]) -> None:
    layer = moe_layer("diffmoe")
    layer(tokens(2, 8))
    fit(layer)
    ran.clear()
    layer(tokens(2, 8))
    layer.train()(tokens(2, 8))
    assert ran == ["loop", "bmm"]  # without a GPU, a grouped product would be a loop as well
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'loop', 'bmm', 'grouped_mm'\], got 'fast'"):
        set_experts_backend(layer, "fast")


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_without_data(router: str, backend: str) -> None:
    layer = moe_layer(router, shared_inner_dim=8).to("meta")
    set_experts_backend(layer, backend)
    mask = torch.ones(2, 8, dtype=torch.bool, device="meta")
    output = layer(torch.empty(2, 8, DIM, device="meta"), token_mask=mask)
    assert output.shape == (2, 8, DIM)


def test_every_backend_is_counted() -> None:
    """Multiply-adds of the experts are those of the tokens that they take, whatever runs them."""
    layer = moe_layer("expert_choice", capacity=2.0).eval()
    hidden = tokens(2, 8)
    for backend in RUNS:
        set_experts_backend(layer, backend)
        gate = 16 * DIM * EXPERTS
        assert count_macs(lambda: layer(hidden)) == gate + 2 * 16 * 2 * DIM * INNER


# -- memory

POOL, WIDE, MANY = 1024, 32, 8
"""S, H and E where all experts on all tokens would show: E * S * D is four times S * H."""


class _Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return found


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Bytes by storage."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
@pytest.mark.parametrize("router", ROUTERS)
def test_memory_does_not_grow_with_the_experts(router: str, backend: str, ran: list[str]) -> None:
    layer = moe_layer(router, num_experts=MANY, inner_dim=WIDE, aux_loss_weight=0.0)
    set_experts_backend(layer, backend)
    hidden = tokens(4, POOL // 4).requires_grad_()
    used = POOL * WIDE * 4
    assert used * 4 == POOL * MANY * DIM * 4
    with _Largest() as largest, kept_for_backward() as kept:
        layer(hidden).square().sum().backward()
    assert ran[0] == backend or backend == "bmm"
    assert largest.bytes < 1.5 * used
    assert sum(kept.values()) < 8 * used
    if not layer.settings.thresholded:
        return
    fit(layer, hidden)
    with torch.no_grad(), _Largest() as largest:
        layer(hidden)
    assert largest.bytes < 1.5 * used


def test_measuring_sees_what_all_experts_take() -> None:
    layer = moe_layer(num_experts=MANY, inner_dim=WIDE)
    with _Largest() as largest:
        torch.einsum("sd,ehd->esh", tokens(POOL), layer.experts.w_in)
    assert largest.bytes == POOL * MANY * WIDE * 4


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation_fn must be one of \[.*'swiglu'\], got 'relu'"):
        Experts(2, ExpertShape(dim=4, inner_dim=8, activation_fn="relu"))
