"""Our mediator attention computes what the official one does: outputs, gradients, and networks for other sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.methods.mediators.attention import MediatorAttention
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.pipelines.sit_blocks import guide
from helpers import GOLDEN, assert_close, golden, with_recorded_times

ATTENTION, MODEL = golden("mediator_attention"), golden("mediator_model")
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["Attention-Mediators"]["counts"]
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "group", "tolerance"),
    [(torch.float32, "out", 1e-5), (torch.float64, "out64", 1e-9)],
    ids=["float32", "float64"],
)

# --- the layer


def ours(given: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Official weights, or gradients, of a layer by our names and in our shapes."""
    tables = f"mediator_biases.{count}"
    found = {
        f"to_{part}.{kind}": value
        for kind in ("weight", "bias")
        for part, value in zip("qkv", given[f"qkv.{kind}"].chunk(3), strict=True)
    }
    found |= {f"to_out.0.{kind}": given[f"proj.{kind}"] for kind in ("weight", "bias")}
    found |= {name: given[name] for name in ("dwc.weight", "dwc.bias")}
    return found | {
        f"{tables}.reading.table": given["an_bias"],
        f"{tables}.reading.rows": given["ah_bias"][0, ..., 0],
        f"{tables}.reading.columns": given["aw_bias"][0, :, :, 0],
        f"{tables}.asking.table": given["na_bias"],
        f"{tables}.asking.rows": given["ha_bias"][0, :, :, 0].transpose(1, 2),
        f"{tables}.asking.columns": given["wa_bias"][0, :, 0].transpose(1, 2),
    }


def layer(case: str, dtype: torch.dtype) -> MediatorAttention:
    config = ATTENTION.config[case]
    count = config["mediator_num"]
    module = MediatorAttention(config["dim"], config["num_heads"], tuple(config["latent_size"]), (count,))
    module.load_state_dict(ours(ATTENTION.group(f"{case}/sd/"), count))
    return module.to(dtype).eval()


def test_all_five_layers_are_compared() -> None:
    assert len(ATTENTION.config) == 5


@pytest.mark.parametrize("case", ATTENTION.config)
@pytest.mark.parametrize("held", [False, True], ids=["biases made anew", "biases held"])
@PRECISIONS
def test_layer(case: str, held: bool, dtype: torch.dtype, group: str, tolerance: float) -> None:
    module = layer(case, dtype)
    with torch.set_grad_enabled(not held):
        for _ in range(2):
            output = module(ATTENTION[f"{case}/in/x"].to(dtype)).detach()
            assert_close(output, ATTENTION[f"{case}/{group}/y"], tolerance)
    assert bool(module._folded) == held


@pytest.mark.parametrize("case", ATTENTION.config)
def test_gradients_of_the_layer(case: str) -> None:
    module = layer(case, torch.float32)
    x = ATTENTION[f"{case}/in/x"].clone().requires_grad_()
    (module(x) * ATTENTION[f"{case}/in/cotangent"]).sum().backward()
    expected = ATTENTION.group(f"{case}/out/grad/")
    assert x.grad is not None
    assert_close(x.grad, expected.pop("x"), 1e-5, relative=1e-4)
    found: dict[str, Any] = {name: parameter.grad for name, parameter in module.named_parameters()}
    wanted = ours(expected, ATTENTION.config[case]["mediator_num"])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, 1e-5, relative=1e-4)


# --- a network


def network(dtype: torch.dtype = torch.float32, **changed: Tensor) -> Any:
    """In float64 with the features of time as recorded, in float32 with its own; `changed` are other weights."""
    weights, heads = MODEL.group("sd/") | changed, MODEL.config["num_heads"]
    found = MediatorSiTTransformer2DModel.from_official(weights, num_attention_heads=heads)
    return with_recorded_times(found.to(dtype)) if dtype == torch.float64 else found


def test_configuration_is_read_from_the_weights() -> None:
    config = network().config
    assert (config.sample_size, config.num_layers) == (MODEL.config["input_size"], MODEL.config["depth"])
    assert config.mediator_config == {
        "counts": (MODEL.config["mediator_num"],),
        "layers": None,
        "per_layer": False,
        "use_bias": True,
        "use_dwc": True,
    }


@PRECISIONS
@torch.no_grad()
def test_forward(dtype: torch.dtype, group: str, tolerance: float) -> None:
    output = network(dtype)(MODEL["in/x"].to(dtype), MODEL["in/t"], MODEL["in/y"]).sample
    assert_close(output, MODEL[f"{group}/forward"], tolerance)


@PRECISIONS
@torch.no_grad()
def test_forward_with_guidance(dtype: torch.dtype, group: str, tolerance: float) -> None:
    """The stored second half of the input differs from the first, and must not matter."""
    first, t = MODEL["in/x_cfg"].chunk(2)[0].to(dtype), MODEL["in/t"]
    output = network(dtype)(torch.cat([first, first]), torch.cat([t, t]), MODEL["in/y_cfg"]).sample
    guided = guide(output, MODEL.notes["cfg_scale"], MODEL.notes["guided_channels"])
    assert_close(guided, MODEL[f"{group}/forward_with_cfg"], tolerance)


def test_official_weights_there_and_back() -> None:
    found, given = network().to_official(), MODEL.group("sd/")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


def test_weights_for_a_larger_image() -> None:
    """The position table is a fresh one, the biases are interpolated with their ends in place, all else is copied."""
    other = network().resized(MODEL.notes["resized_input_size"])
    found, changed = other.to_official(), MODEL.group("resized/sd/")
    assert {key for key in changed if "attn" in key} == {
        f"blocks.{block}.attn.{name}_bias" for block in range(2) for name in ("ah", "aw", "ha", "wa")
    }
    expected = MODEL.group("sd/") | changed
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key in changed:
            assert_close(found[key], value, 1e-6)
        else:
            assert torch.equal(found[key], value)


@PRECISIONS
@torch.no_grad()
def test_forward_at_a_larger_image(dtype: torch.dtype, group: str, tolerance: float) -> None:
    """In float64 around the recorded weights, because resizing is float32 as upstream, to the machine's last bit."""
    other = network().resized(MODEL.notes["resized_input_size"])
    if dtype == torch.float64:
        other = network(dtype, **MODEL.group("resized/sd/"))
    x, t, labels = (MODEL[f"resized/in/{name}"] for name in ("x", "t", "y"))
    assert_close(other(x.to(dtype), t, labels).sample, MODEL[f"resized/{group}/forward"], tolerance)


# --- published sizes


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name: str) -> None:
    size, mediators, latent = name.split()
    count, sample_size = (int(value.partition("=")[2]) for value in (mediators, latent))
    settings = {"counts": (count,)}
    with torch.device("meta"):
        built = MediatorSiTTransformer2DModel.from_preset(size, sample_size=sample_size, mediator_config=settings)
    parameters = list(built.parameters())
    assert sum(p.numel() for p in parameters) == COUNTS[name]["total_with_pos_embed"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == COUNTS[name]["trainable"]
    assert len(built.to_official()) == COUNTS[name]["num_state_dict_entries"]
