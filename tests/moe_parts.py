"""Small mixture-of-experts layers, and what they should compute, written slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.methods.moe.experts import ExpertShape
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.plans import ExpertPlan
from flowaccel.methods.moe.routing import ROUTING
from flowaccel.methods.moe.settings import MoESettings

ROUTERS = tuple(ROUTING)
DIM, INNER, EXPERTS = 16, 24, 4


def moe_layer(
    router: str = "diffmoe",
    *,
    seed: int = 0,
    dim: int = DIM,
    inner_dim: int = INNER,
    activation_fn: str = "gelu-approximate",
    bias: bool = True,
    **settings: Any,
) -> MoEFeedForward:
    """A layer with random weights, whose experts differ and whose gate is decided; not fitted, and training."""
    torch.manual_seed(seed)
    shape = ExpertShape(dim=dim, inner_dim=inner_dim, activation_fn=activation_fn, bias=bias)
    layer = MoEFeedForward(MoESettings(router=router, **{"num_experts": EXPERTS, **settings}), shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return layer


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32, dim: int = DIM) -> Tensor:
    """(*shape, D)."""
    return torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fit(layer: MoEFeedForward, hidden: Tensor | None = None, capacity: float | None = None) -> MoEFeedForward:
    """Ready for use: evaluating, with thresholds, where there are any, that were fitted to `hidden`."""
    layer.eval()
    if layer.settings.thresholded:
        width, dtype = layer.gate.weight.shape[1], next(layer.experts.parameters()).dtype
        hidden = tokens(8, 64, seed=2, dtype=dtype, dim=width) if hidden is None else hidden
        layer.thresholds.collecting = True
        with torch.no_grad():
            layer(hidden)
        layer.thresholds.collecting = False
        layer.thresholds.fit(layer.settings.capacity if capacity is None else capacity)
    return layer


def weights_of(plan: ExpertPlan, pool: int) -> Tensor:
    """(S, E): what every expert's output is multiplied by for every token, 0 where it is not taken."""
    found = torch.zeros(pool, len(plan.counts), dtype=plan.weights.dtype)
    return found.index_put((plan.tokens, plan.experts), plan.weights, accumulate=True)


def every_expert(layer: MoEFeedForward, pool: Tensor, weights: Tensor) -> Tensor:
    """Run all experts on all of (S, D) and sum up with `weights` (S, E)."""
    experts, output = layer.experts, torch.zeros_like(pool)
    for index in range(len(experts)):
        hidden = pool @ experts.w_in[index].T
        hidden = layer.shape.activate(hidden if experts.b_in is None else hidden + experts.b_in[index])
        computed = hidden @ experts.w_out[index].T
        computed = computed if experts.b_out is None else computed + experts.b_out[index]
        output = output + weights[:, index : index + 1] * computed
    output = layer.settings.routed_scale * output
    return output if layer.shared is None else output + layer.shared(pool)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Those of all parameters; 0 where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same names, and tensors that differ no more than `tolerance`."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
