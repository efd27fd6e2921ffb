"""Stock networks with experts: made, saved, loaded, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynamic_networks as networks
from flowaccel import CheckpointError
from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.moe.control import moe_layers, pack_experts, set_moe_selection, unpack_experts
from flowaccel.methods.moe.networks import MOE, moe_class, upcycle_to_moe
from flowaccel.methods.moe.settings import ROUTERS
from flowaccel.recipe.loading import load_network
from tiny import random_weights

FAMILIES = ("sit", "sd3", "flux", "dit")
EVERY = pytest.mark.parametrize("family", FAMILIES)
TIMES = torch.tensor([0.1, 0.5, 0.9])
ROUTING = ("gate.", "gate_hidden.", "capacity_predictor.", "thresholds.", "selection_bias")
BIASED = {"router": "deepseek", "capacity": 2}


@torch.no_grad()
def output(family: str, network: nn.Module) -> Tensor:
    return networks.FAMILIES[family][1](network, TIMES)


def with_experts(family: str, fitted: bool = True, **settings: Any) -> Any:
    """Random experts, whose thresholds are those of one call; other weights are the stock network's."""
    base = networks.FAMILIES[family][0]()
    network = moe_class(base).from_base(base, {"num_experts": 4, "layers": "all", **settings})
    for layer in moe_layers(network).values():
        random_weights(layer, 3, std=0.3)
    if fitted:
        networks.FAMILIES[family][1](network.train(), TIMES).sum().backward()
        network.zero_grad()
        for layer in moe_layers(network).values():
            layer.commit()
    return network.eval()


def edited(folder: Path, **changes: Any) -> None:
    """Write another `moe_config` into a saved network's configuration."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["moe_config"].update(changes)
    path.write_text(json.dumps(config))


# --- saved and loaded


@EVERY
@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_network_returns_the_same(family: str, router: str, tmp_path: Path) -> None:
    network = with_experts(family, router=router, capacity=2)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert again.config.moe_config == json.loads(json.dumps(network.config.moe_config))
    assert torch.equal(output(family, again), output(family, network))
    assert torch.equal(output(family, load_network(tmp_path, "transformer")), output(family, network))


@EVERY
@pytest.mark.parametrize("settings", [{}, {"router": "expert_race"}, BIASED], ids=["diffmoe", "race", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_decides_stays_in_float32(family: str, settings: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    network = with_experts(family, shared_inner_dim=8, **settings)
    network.save_pretrained(tmp_path)
    half = type(network).from_pretrained(tmp_path, torch_dtype=dtype)
    seen = set()
    for path, layer in moe_layers(half).items():
        expected = moe_layers(network)[path].state_dict()
        for name, value in layer.state_dict().items():
            if name.startswith(ROUTING):
                torch.testing.assert_close(value, expected[name], atol=0, rtol=0, equal_nan=True)
                seen.add(name.split(".")[0] + ".")
            else:
                assert value.dtype == dtype, name
    assert ("thresholds." in seen) == (settings != BIASED)
    assert ("selection_bias." in seen) == (settings == BIASED)


@EVERY
@pytest.mark.parametrize("packed", [True, False])
def test_unpacked_experts_are_the_same_and_are_not_saved(family: str, packed: bool, tmp_path: Path) -> None:
    network = with_experts(family)
    expected = output(family, network)
    unpack_experts(network)
    torch.testing.assert_close(output(family, network), expected, atol=1e-6, rtol=1e-6)
    if packed:
        pack_experts(network)
        network.save_pretrained(tmp_path)
        assert torch.equal(output(family, type(network).from_pretrained(tmp_path)), expected)
    else:
        with pytest.raises(ValueError, match=r"are unpacked, and are saved packed.*pack_experts\(network\)"):
            network.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []


@EVERY
def test_a_dense_network_loads_as_it_is(family: str, tmp_path: Path) -> None:
    """Its configuration has no `moe_config`, and None is no experts."""
    base = networks.FAMILIES[family][0]()
    base.save_pretrained(tmp_path)
    network = moe_class(base).from_pretrained(tmp_path)
    assert network.config.moe_config is None
    assert not moe_layers(network)
    assert torch.equal(output(family, network), output(family, base))
    network.save_pretrained(tmp_path / "again")
    assert torch.equal(output(family, type(network).from_pretrained(tmp_path / "again")), output(family, base))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"num_experts": 8},
            r"expected shape .*\[8.*num_experts, inner_dim and shared_inner_dim of moe_config must be",
        ),
        ({"num_experts": 2}, r"expected shape .*\[2.*upcycle_to_moe"),
        ({"inner_dim": 24}, r"expected shape .*24.*inner_dim"),
    ],
)
def test_weights_of_another_configuration(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    network = with_experts("sit")
    network.save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    for load in (type(network).from_pretrained, lambda folder: load_network(folder, "transformer")):
        with pytest.raises(CheckpointError, match=named) as caught:
            load(tmp_path)
        assert "ignore_mismatched_sizes" not in str(caught.value)  # diffusers' advice, which does not help here


@pytest.mark.parametrize("changes", [{"layers": [0]}, {"router": "token_choice"}, {"shared_inner_dim": 8}])
def test_weights_that_are_missing_or_left_over(changes: dict[str, Any], tmp_path: Path) -> None:
    with_experts("sit").save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="entries missing or unexpected"):
        load_network(tmp_path, "transformer")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": 4}, r"moe_config: unknown \['experts'\]; allowed are \['router', 'num_experts'"),
        ({"router": "random"}, "router must be one of"),
        ({"capacity": 5}, r"capacity must be above 0 and at most num_experts=4, got 5"),
        ({"layers": [0, 7]}, r"layers must be below the number of blocks, 2, got \[0, 7\]"),
        ({"layers": "first3_last1_dense"}, r"layers='first3_last1_dense' chooses none of 2 blocks"),
        ({"activation_fn": "relu"}, "activation_fn must be one of"),
    ],
)
def test_configurations_that_are_not_known(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    network = with_experts("sit")
    network.save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=named):
        type(network).from_pretrained(tmp_path)
    base = networks.sit()
    with pytest.raises(ValueError, match=named):
        moe_class(base).from_base(base, {"num_experts": 4, "layers": "all", **changes})


# --- made


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_experts_have_the_type_of_the_dense_network(family: str, dtype: torch.dtype) -> None:
    base = networks.FAMILIES[family][0]().to(dtype)
    network = upcycle_to_moe(base, {"num_experts": 4, "layers": "all"}, "shared")
    for layer in moe_layers(network).values():
        kinds = {name: value.dtype for name, value in layer.named_parameters()}
        assert {kind for name, kind in kinds.items() if name.startswith(ROUTING)} == {torch.float32}
        assert {kind for name, kind in kinds.items() if not name.startswith(ROUTING)} == {dtype}


UPCYCLED: dict[str, tuple[str, dict[str, Any]]] = {
    "copies, diffmoe": ("copies", {}),
    "copies, token choice": ("copies", {"router": "token_choice", "capacity": 2}),
    "copies, deepseek": ("copies", BIASED),
    "shared, diffmoe": ("shared", {}),
    "shared, race": ("shared", {"router": "expert_race", "inner_dim": 8}),
}


@EVERY
@pytest.mark.parametrize("case", UPCYCLED)
def test_an_upcycled_network_computes_what_the_dense_one_does(family: str, case: str) -> None:
    """While the experts train, which are all taken at first; the DiT itself would drop labels then."""
    method, settings = UPCYCLED[case]
    base = networks.FAMILIES[family][0]()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    network = upcycle_to_moe(base, {"num_experts": 4, "layers": "all", **settings}, method)
    for layer in moe_layers(network).values():
        layer.train()
    expected = output(family, base)
    torch.testing.assert_close(output(family, network), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not moe_layers(base)


def test_half_precision_is_upcycled_too() -> None:
    base = networks.sit().to(torch.bfloat16)
    network = upcycle_to_moe(base, {"num_experts": 4, "layers": "all"}).train()

    def call(model: nn.Module) -> Tensor:
        images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
        return model(images, TIMES, torch.arange(3), return_dict=False)[0].float()

    with torch.no_grad():
        expected = call(base)
        error = (call(network) - expected).norm() / expected.norm()
    assert error < 2e-2  # a few roundings to 8 bits


@EVERY
def test_thresholds_are_asked_for_before_use(family: str) -> None:
    """Without them every token would take every expert."""
    network = with_experts(family, fitted=False)
    with pytest.raises(ValueError, match="the thresholds that choose experts were never fitted"):
        output(family, network)
    set_moe_selection(network, "gate_threshold")
    with pytest.raises(ValueError, match="the thresholds that choose experts were never fitted"):
        output(family, network)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "copies of another width": (
        lambda: upcycle_to_moe(networks.sit(), {"layers": "all", "inner_dim": 8}),
        "experts as wide as the dense feed-forward, 64, and no shared one; got inner_dim=8",
    ),
    "copies in a race": (
        lambda: upcycle_to_moe(networks.sit(), {"layers": "all", "router": "expert_race"}),
        "router='expert_race' has score_fn='identity'; use method='shared'",
    ),
    "shared of another width": (
        lambda: upcycle_to_moe(networks.sit(), {"layers": "all", "shared_inner_dim": 8}, "shared"),
        "keeps the dense feed-forward of width 64, got shared_inner_dim=8",
    ),
    "no such method": (
        lambda: upcycle_to_moe(networks.sit(), {"layers": "all"}, "split"),
        "method must be 'copies' or 'shared', got 'split'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_upcycling_that_would_not_be_exact(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_without_a_form_with_experts() -> None:
    with pytest.raises(UnsupportedModelError, match=rf"LatteTransformer3DModel has no form.*{', '.join(MOE)}"):
        upcycle_to_moe(networks.latte(), {})
