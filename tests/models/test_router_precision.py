"""The precision of logits, and gates of exactly 0 or 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowaccel.models.routers import TokenRouter, WidthRouter, logistic_noise, straight_through

DTYPES = pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)


@DTYPES
@pytest.mark.parametrize("make", [lambda: WidthRouter(32, 4), lambda: TokenRouter(32)], ids=["width", "tokens"])
def test_logits_are_in_float32_or_wider(make: object, dtype: torch.dtype, wide: torch.dtype) -> None:
    torch.manual_seed(0)
    router: nn.Module = make().to(dtype)  # type: ignore[operator]
    given = torch.randn(5, 7, 32).to(dtype)
    logits = router(given)
    assert logits.dtype == wide
    exact = router.double()(given.double())
    torch.testing.assert_close(logits.double(), exact, atol=2e-5, rtol=1e-6)  # one rounding of bfloat16 would be 0.06


@pytest.mark.parametrize("tau", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_gates_are_exactly_zero_or_one(dtype: torch.dtype, tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(10_000, generator=generator)).to(dtype).requires_grad_()
    noise = logistic_noise((10_000,), generator).to(dtype)
    gates = straight_through(logits, noise, tau)
    assert set(gates.tolist()) == {0.0, 1.0}
    assert torch.equal(gates > 0.5, logits + noise > 0)
    gates.sum().backward()
    soft = torch.sigmoid((logits + noise).detach().double() / tau)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), soft * (1 - soft) / tau, atol=2e-3, rtol=2e-2)


def test_logits_are_wide_under_autocast() -> None:
    router = WidthRouter(8, 4)
    embedding = torch.randn(3, 8)
    expected = router(embedding)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(embedding), expected)
