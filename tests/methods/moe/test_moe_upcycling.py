"""Networks with experts that compute what the dense one does, to be trained on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.moe.control import moe_layers, pack_experts, unpack_experts
from flowaccel.methods.moe.networks import MOE, MoESiTTransformer2DModel, upcycle_to_moe
from moe_parts import EXPERTS, ROUTERS

BY_TOKEN = ("token_choice", "dit_moe", "deepseek")
COPIES = tuple(router for router in ROUTERS if router != "expert_race")
WIDTH = 64
"""Hidden width of the dense feed-forward."""


def inputs(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, 8, 8, generator=generator), torch.full((rows,), 0.4), torch.arange(rows)


def output(network: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(*inputs(), return_dict=False)[0]
    return found


def settings(router: str, **more: Any) -> dict[str, Any]:
    return {"router": router, "num_experts": EXPERTS, "capacity": 2, "layers": "all", **more}


def fit(network: nn.Module, capacity: float) -> nn.Module:
    """Ready for use."""
    network.eval()
    for layer in moe_layers(network).values():
        layer.thresholds.collecting = True
    output(network)
    for layer in moe_layers(network).values():
        layer.thresholds.collecting = False
        if layer.settings.thresholded:
            layer.thresholds.fit(capacity)
    return network


def assert_alike(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


METHODS = [("copies", router) for router in COPIES] + [("shared", router) for router in ROUTERS]


@pytest.mark.parametrize(("method", "router"), METHODS)
def test_upcycling_changes_nothing_at_first(method: str, router: str) -> None:
    """While training, and in use at the capacity at which it starts."""
    base = tiny.sit_network()
    before, weights = output(base), {name: value.clone() for name, value in base.state_dict().items()}
    network = upcycle_to_moe(base, settings(router), method)
    assert type(network) is MoESiTTransformer2DModel
    layers = moe_layers(network)
    assert len(layers) == 3
    whole = method == "copies" and router not in BY_TOKEN
    assert {layer.capacity for layer in layers.values()} == {EXPERTS if whole else 2}
    assert_alike(output(network.train()), before)
    assert_alike(output(fit(network, EXPERTS if whole else 2)), before)
    assert network.config.moe_config["capacity"] == 2
    assert type(base) is MOE["SiTTransformer2DModel"].stock
    torch.testing.assert_close(output(base), before, atol=0, rtol=0)
    for name, value in base.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("method", ["copies", "shared"])
def test_experts_do_something(method: str) -> None:
    """That of which nothing is seen at first: other weights of one expert change the output."""
    network = upcycle_to_moe(tiny.sit_network(), settings("token_choice"), method)
    before = output(network)
    for layer in moe_layers(network).values():
        assert layer.plan is not None
        with torch.no_grad():
            layer.experts.w_out[int(layer.plan.experts[0])] += 0.5
    assert (output(network) - before).abs().max() > 1e-3


def test_narrow_experts_beside_the_dense_feed_forward() -> None:
    base = tiny.sit_network()
    network = upcycle_to_moe(base, settings("diffmoe", inner_dim=16), "shared")
    layer = next(iter(moe_layers(network).values()))
    assert layer.experts.w_in.shape == (EXPERTS, 16, 16)
    assert network.config.moe_config["shared_inner_dim"] == WIDTH
    assert_alike(output(network.train()), output(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["copies", "shared"])
def test_upcycling_keeps_the_type(method: str, dtype: torch.dtype) -> None:
    """Of all but what decides."""
    base = tiny.sit_network().to(dtype)
    network = upcycle_to_moe(base, settings("diffmoe"), method).train()
    for layer in moe_layers(network).values():
        assert {value.dtype for value in layer.experts.parameters()} == {dtype}
        deciding = (layer.gate, layer.gate_hidden, layer.capacity_predictor)
        parts = [part for part in deciding if part is not None]
        assert {value.dtype for part in parts for value in part.parameters()} == {torch.float32}
    with torch.no_grad():
        image, time, label = inputs()
        given = (image.to(dtype), time, label)
        expected, found = base(*given, return_dict=False)[0], network(*given, return_dict=False)[0]
    assert found.dtype == dtype
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-10
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_other_stock_networks() -> None:
    for pipe, arguments in ((tiny.sd3_pipeline(), tiny.sd3_arguments()), (tiny.flux_pipeline(), tiny.flux_arguments())):
        pipe.set_progress_bar_config(disable=True)
        before = pipe(**arguments).images
        arguments["generator"] = [value.manual_seed(value.initial_seed()) for value in arguments["generator"]]
        pipe.transformer = upcycle_to_moe(pipe.transformer, settings("token_choice"))
        assert moe_layers(pipe.transformer)
        torch.testing.assert_close(torch.as_tensor(pipe(**arguments).images), torch.as_tensor(before))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    (
        settings("expert_race"),
        "copies",
        "needs weights that sum to 1, and router='expert_race'.*method='shared'",
    ),
    (settings("diffmoe", score_fn="sigmoid"), "copies", "router='diffmoe' has score_fn='sigmoid'"),
    (settings("token_choice", norm_topk=False), "copies", "method='copies' needs norm_topk=True"),
    (settings("token_choice", routed_scale=2.5), "copies", "method='copies' needs routed_scale=1, got 2.5"),
    (settings("diffmoe", inner_dim=16), "copies", f"as wide as the dense feed-forward, {WIDTH}.*got inner_dim=16"),
    (settings("diffmoe", shared_inner_dim=8), "copies", "no shared one; got .*shared_inner_dim=8: use method='shared'"),
    (settings("diffmoe", shared_inner_dim=8), "shared", f"keeps the dense feed-forward of width {WIDTH}, got .*=8"),
    (
        settings("diffmoe", activation_fn="swiglu"),
        "copies",
        "activation_fn must be .* dense .*, 'gelu-approximate'",
    ),
    (settings("diffmoe", activation_fn="gelu"), "shared", "activation_fn must be that of the dense .* got 'gelu'"),
    (settings("diffmoe", bias=False), "copies", "bias must be that of the dense feed-forward, True.* got False"),
    (settings("diffmoe", layers=(3,)), "shared", r"layers must be below the number of blocks, 3, got \[3\]"),
    (settings("diffmoe"), "split", "method must be 'copies' or 'shared', got 'split'"),
    ({"experts": 3}, "copies", r"moe_config: unknown \['experts'\]"),
]


@pytest.mark.parametrize(("given", "method", "message"), WRONG)
def test_wrong_combinations(given: dict[str, Any], method: str, message: str) -> None:
    base = tiny.sit_network()
    with pytest.raises(ValueError, match=message):
        upcycle_to_moe(base, given, method)
    assert not moe_layers(base)


def test_networks_without_a_form_with_experts() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no form with experts; there is one for SiT.*, Flux"):
        upcycle_to_moe(nn.Linear(2, 2), {})


def test_unpacked_experts_are_not_saved(tmp_path: Path) -> None:
    network = fit(upcycle_to_moe(tiny.sit_network(), settings("diffmoe"), "shared"), 2)
    before = output(network)
    unpack_experts(network)
    with pytest.raises(ValueError, match=r"experts of transformer_blocks.0.ff are unpacked.*pack_experts\(network\)"):
        network.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pack_experts(network)
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(output(MoESiTTransformer2DModel.from_pretrained(tmp_path).eval()), before)
