"""Coefficients, conversions and losses of the three paths, as SiT's transport code computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.samplers import paths
from helpers import assert_close, golden

FILE = golden("sit_transport_paths")
PATHS = {"Linear": paths.LINEAR, "GVP": paths.GVP, "VP": paths.VP}
# values reach 6e3; in float64 the official code still has float32 constants in places
TOLERANCES = {"out": {"tolerance": 1e-5, "relative": 1e-4}, "out64": {"tolerance": 1e-7, "relative": 1e-6}}
GROUPS = pytest.mark.parametrize("group", ["out", "out64"])
NAMES = pytest.mark.parametrize("name", PATHS)


def given(key: str, group: str) -> Tensor:
    return FILE[f"in/{key}"].to(torch.float64 if group == "out64" else torch.float32)


def check(actual: Tensor, name: str, key: str, group: str) -> None:
    expected = FILE[f"{group}/{name}/{key}"]
    options: dict[str, Any] = TOLERANCES[group]
    assert_close(actual, expected.reshape(actual.shape), **options)


@NAMES
@GROUPS
@pytest.mark.parametrize("key", ["alpha", "d_alpha", "sigma", "d_sigma"])
def test_coefficients(name: str, group: str, key: str) -> None:
    check(getattr(PATHS[name], key)(given("t", group)), name, key, group)


@NAMES
@GROUPS
def test_drift_variance(name: str, group: str) -> None:
    check(PATHS[name].drift_variance(given("t", group)), name, "drift_var", group)


@NAMES
@GROUPS
def test_states_and_velocities(name: str, group: str) -> None:
    path, t = PATHS[name], given("t", group)
    data, noise = given("x1", group), given("x0", group)
    check(path.interpolate(data, noise, t), name, "xt", group)
    check(path.velocity(data, noise, t), name, "ut", group)


@NAMES
@GROUPS
def test_conversions(name: str, group: str) -> None:
    path, t, state = PATHS[name], given("t", group), given("x", group)
    check(path.score_from_velocity(given("v", group), state, t), name, "score_from_velocity", group)
    check(path.noise_from_velocity(given("v", group), state, t), name, "noise_from_velocity", group)
    check(path.velocity_from_score(given("s", group), state, t), name, "velocity_from_score", group)


@NAMES
@GROUPS
@pytest.mark.parametrize("form", ["SBDM", "sigma", "linear", "decreasing"])
@pytest.mark.parametrize("norm", [0.5, 1.0])
def test_diffusion(name: str, group: str, form: str, norm: float) -> None:
    actual = paths.diffusion(PATHS[name], given("t", group), form.lower(), norm)
    check(actual, name, f"diffusion_{form}_norm{norm}", group)


LOSSES = sorted(key.removeprefix("out/Linear/loss_") for key in FILE.tensors if key.startswith("out/Linear/loss_"))


@NAMES
@GROUPS
@pytest.mark.parametrize("case", LOSSES)
@torch.no_grad()
def test_losses(name: str, group: str, case: str) -> None:
    prediction, weighting = case.split("_")
    path, t = PATHS[name], given("t", group)
    network = golden("sit_tiny").network(dtype=t.dtype)
    output = network(FILE[f"{group}/{name}/xt"], t, FILE["in/y"]).sample
    data, noise = given("x1", group), given("x0", group)
    actual = paths.flow_loss(path, output, data, noise, t, prediction=prediction, weighting=weighting)
    check(actual, name, f"loss_{case}", group)
