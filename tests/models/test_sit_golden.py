"""Our SiT computes what the official one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowaccel.pipelines.sit_blocks import guide
from helpers import Golden, assert_close, golden, with_recorded_times
from tiny import latent_sit

FILES = ("sit_tiny", "sit_tiny_nosigma", "sit_tiny_p4")
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "group", "tolerance"),
    [(torch.float32, "out", 1e-5), (torch.float64, "out64", 1e-9)],
    ids=["float32", "float64"],
)


def network_of(file: Golden, dtype: torch.dtype) -> Any:
    """In float64 with the features of time as recorded, in float32 with its own."""
    network = file.network(dtype=dtype)
    return with_recorded_times(network) if dtype == torch.float64 else network


def test_features_of_time() -> None:
    """The only step that is float32 in a float64 network: as good as float32 can be, beside the formula in float64 and
    beside those of the machine that made the golden files.
    """
    recorded = golden("time_features")
    t = recorded["t"]
    found = latent_sit().double().time_proj(t)
    assert found.dtype == torch.float32
    arguments = t.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    exact = torch.cat([arguments.cos(), arguments.sin()], 1)
    bound = 1e-6 * t.clamp(min=1)[:, None]
    for expected in (exact, recorded["features"]):
        assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", FILES)
@PRECISIONS
@torch.no_grad()
def test_forward(name: str, dtype: torch.dtype, group: str, tolerance: float) -> None:
    file = golden(name)
    output = network_of(file, dtype)(file["in/x"].to(dtype), file["in/t"], file["in/y"]).sample
    assert_close(output, file[f"{group}/forward"], tolerance)


@pytest.mark.parametrize("name", FILES)
@PRECISIONS
@torch.no_grad()
def test_forward_with_guidance(name: str, dtype: torch.dtype, group: str, tolerance: float) -> None:
    """The stored second half of the input differs from the first, and must not matter."""
    file = golden(name)
    first = file["in/x_cfg"].chunk(2)[0].to(dtype)
    output = network_of(file, dtype)(torch.cat([first, first]), file["in/t_cfg"], file["in/y_cfg"]).sample
    guided = guide(output, file.notes["cfg_scale"], file.notes["guided_channels"])
    assert_close(guided, file[f"{group}/forward_with_cfg"], tolerance)


@pytest.mark.parametrize("name", FILES)
def test_configuration_is_read_from_the_weights(name: str) -> None:
    file = golden(name)
    network = file.network()
    assert sum(parameter.numel() for parameter in network.parameters()) == file.notes["num_params"]
    assert network.config.sample_size == file.config["input_size"]
    assert network.config.patch_size == file.config["patch_size"]
    assert network.config.num_layers == file.config["depth"]
    assert network.config.num_classes == file.config["num_classes"] == network.null_label == file.notes["null_class"]
    assert network.config.mlp_ratio == file.config["mlp_ratio"]
    assert network.config.learn_sigma == file.config["learn_sigma"]
