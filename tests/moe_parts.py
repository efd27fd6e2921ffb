"""Small mixture-of-experts layers and networks, and what they should compute, written slowly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.experts import ExpertShape
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.networks import moe_class
from flowaccel.methods.moe.plans import ExpertPlan
from flowaccel.methods.moe.routing import ROUTING
from flowaccel.methods.moe.settings import MoESettings
from tiny import random_weights

ROUTERS = tuple(ROUTING)
DIM, INNER, EXPERTS = 16, 24, 4
SMALL: dict[str, Any] = {"num_experts": EXPERTS, "layers": "all"}


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
    width, dtype = layer.gate.weight.shape[1], next(layer.experts.parameters()).dtype
    given = tokens(8, 64, seed=2, dtype=dtype, dim=width) if hidden is None else hidden
    return fit_layers(layer, lambda: layer.eval()(given) if layer.settings.thresholded else None, capacity)


def fit_layers(network: Any, run: Callable[[], Any], capacity: float | None = None) -> Any:
    """Fit thresholds, exact quantiles of the scores that `run()` makes; of the settings' capacity by default."""
    layers = [module for module in network.modules() if isinstance(module, MoEFeedForward)]
    for layer in layers:
        layer.thresholds.collecting = True
    with torch.no_grad():
        run()
    for layer in layers:
        layer.thresholds.collecting = False
        if layer.thresholds.kinds:
            layer.thresholds.fit(layer.settings.capacity if capacity is None else capacity)
        layer.eval()
    return network


def with_experts(base: Any, seed: int = 0, **settings: Any) -> Any:
    """The form with experts of `base`, with random weights of its own in them; routers that tell tokens apart."""
    torch.manual_seed(seed)
    network = moe_class(base).from_base(base, {**SMALL, **settings}).eval()
    for layer in moe_layers(network).values():
        random_weights(layer.experts, seed)
        random_weights(layer.gate, seed, std=0.5)
        if layer.capacity_predictor is not None:
            random_weights(layer.capacity_predictor, seed, std=0.5)
    return network


def fitted(pipe: Any, run: Callable[[Any], Any], seed: int = 0, **settings: Any) -> Any:
    """A network with experts for `pipe`, with thresholds fitted on `run(pipe)`, an image or several."""
    base = pipe.transformer
    pipe.transformer = network = with_experts(base, seed, **settings)
    fit_layers(network, lambda: run(pipe))
    pipe.transformer = base
    return network


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
