"""Our SiT computes what the official one does."""

from __future__ import annotations

import pytest
import torch

from flowaccel.pipelines.sit import guide
from helpers import assert_close, golden

FILES = ("sit_tiny", "sit_tiny_nosigma", "sit_tiny_p4")
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "group", "tolerance"),
    [(torch.float32, "out", 1e-5), (torch.float64, "out64", 1e-9)],
    ids=["float32", "float64"],
)


@pytest.mark.parametrize("name", FILES)
@PRECISIONS
@torch.no_grad()
def test_forward(name: str, dtype: torch.dtype, group: str, tolerance: float) -> None:
    file = golden(name)
    output = file.network(dtype=dtype)(file["in/x"].to(dtype), file["in/t"], file["in/y"]).sample
    assert_close(output, file[f"{group}/forward"], tolerance)


@pytest.mark.parametrize("name", FILES)
@PRECISIONS
@torch.no_grad()
def test_forward_with_guidance(name: str, dtype: torch.dtype, group: str, tolerance: float) -> None:
    """The stored second half of the input differs from the first, and must not matter."""
    file = golden(name)
    first = file["in/x_cfg"].chunk(2)[0].to(dtype)
    output = file.network(dtype=dtype)(torch.cat([first, first]), file["in/t_cfg"], file["in/y_cfg"]).sample
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
