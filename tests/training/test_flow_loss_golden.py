"""SiT's own training loss on the linear path, with gradients."""

from __future__ import annotations

import pytest
import torch

from flowaccel.models.official import sit_to_official
from flowaccel.samplers.paths import LINEAR, flow_loss
from helpers import assert_close, golden, with_recorded_times

FILE = golden("sit_ode_sde")


@pytest.mark.parametrize(
    ("dtype", "group", "tolerance", "gradients"),
    [(torch.float32, "out", 1e-5, 1e-4), (torch.float64, "out64", 1e-9, 1e-9)],
    ids=["float32", "float64"],
)
def test_loss_and_gradients(dtype: torch.dtype, group: str, tolerance: float, gradients: float) -> None:
    network = golden("sit_tiny").network(dtype=dtype)
    if dtype == torch.float64:
        with_recorded_times(network)
    data, noise, t = (FILE[f"in/loss_{name}"].to(dtype) for name in ("x1", "x0", "t"))
    state = LINEAR.interpolate(data, noise, t)
    output = network(state, t, FILE["in/loss_y"]).sample
    loss = flow_loss(LINEAR, output, data, noise, t)
    assert_close(state, FILE[f"{group}/loss/xt"], tolerance)
    assert_close(LINEAR.velocity(data, noise, t), FILE[f"{group}/loss/ut"], tolerance)
    assert_close(output.detach(), FILE[f"{group}/loss/pred"], tolerance)
    assert_close(loss.detach(), FILE[f"{group}/loss/loss"], tolerance)
    assert_close(loss.mean().detach().reshape(1), FILE[f"{group}/loss/loss_mean"], tolerance)
    loss.mean().backward()
    official = sit_to_official({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    for name, expected in FILE.group(f"{group}/loss/grad/").items():
        assert_close(official[name], expected, tolerance, relative=gradients)
