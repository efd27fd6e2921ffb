"""The refiner's training loss for given draws, with all gradients."""

from __future__ import annotations

import pytest
import torch

from flowaccel.methods.flowturbo.train import RefinerTerms, refiner_terms
from flowaccel.models.official import sit_to_official
from helpers import assert_close, golden

FILE = golden("flowturbo_refiner_loss")
CASES = pytest.mark.parametrize("case", ["a", "b", "c"])


def terms(case: str, dtype: torch.dtype, refiner: torch.nn.Module) -> RefinerTerms:
    t = FILE["in/t"].to(dtype)
    time = t.reshape(-1, 1, 1, 1)
    state = time * FILE["in/x1"].to(dtype) + (1 - time) * FILE["in/x0"].to(dtype)
    delta, dropped, labels = FILE[f"{case}/delta"].to(dtype), FILE[f"{case}/drop_mask"].bool(), FILE["in/y"]
    return refiner_terms(refiner, FILE.network("base/", dtype), state, t, delta, labels, dropped, null_label=10)


@CASES
def test_terms_and_gradients(case: str) -> None:
    refiner = FILE.network("refiner/", out_channels=4)
    found = terms(case, torch.float32, refiner)
    names = {
        "v_t": found.velocity,
        "x_next": found.next_state,
        "t_next": found.next_time,
        "target": found.target,
        "refiner_offset": found.offset,
        "loss": found.loss,
        "loss_mean": found.loss.mean().reshape(1),
    }
    for name, value in names.items():
        assert_close(value.detach(), FILE[f"{case}/{name}"], 1e-5)
    assert found.next_time.max() > 1  # not clamped
    found.loss.mean().backward()
    assert all(parameter.grad is not None for parameter in refiner.parameters() if parameter.requires_grad)
    gradients = sit_to_official({name: p.grad for name, p in refiner.named_parameters() if p.requires_grad})
    expected = FILE.group(f"{case}/grad/")
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(gradients[name], value, 1e-5, relative=1e-4)


@CASES
@torch.no_grad()
def test_terms_in_double_precision(case: str) -> None:
    found = terms(case, torch.float64, FILE.network("refiner/", torch.float64, out_channels=4))
    assert_close(found.velocity, FILE[f"{case}64/v_t"], 1e-6)
    assert_close(found.target, FILE[f"{case}64/target"], 1e-6)
    assert_close(found.offset, FILE[f"{case}64/refiner_offset"], 1e-6)
    assert_close(found.loss, FILE[f"{case}64/loss"], 1e-6)
