"""Small networks with experts, with thresholds that were fitted without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.networks import moe_class
from tiny import random_weights

SMALL: dict[str, Any] = {"num_experts": 4, "layers": "all"}


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


def fit(network: Any, run: Callable[[], Any], capacity: float | None = None) -> Any:
    """Fit thresholds, exact quantiles of the scores that `run()` makes; of the settings' capacity by default."""
    layers = moe_layers(network).values()
    for layer in layers:
        layer.thresholds.collecting = True
    with torch.no_grad():
        run()
    for layer in layers:
        layer.thresholds.collecting = False
        if layer.thresholds.kinds:
            layer.thresholds.fit(capacity or layer.settings.capacity)
        layer.eval()
    return network


def fitted(pipe: Any, run: Callable[[Any], Any], seed: int = 0, **settings: Any) -> Any:
    """A network with experts for `pipe`, with thresholds fitted on `run(pipe)`, an image or several."""
    base = pipe.transformer
    network = with_experts(base, seed, **settings)
    pipe.transformer = network
    fit(network, lambda: run(pipe))
    pipe.transformer = base
    return network
