"""Mediator attention by xformers, where its kernel works."""

from __future__ import annotations

import pytest
import torch

from flowaccel.methods.mediators.attention import MediatorAttention

ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")


def device_where_it_works() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.zeros(1, 8, 2, 16, device=device)
    try:
        ops.memory_efficient_attention(query, query, query, torch.zeros(1, 2, 8, 8, device=device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"xformers' kernel does not work on {device}: {str(error).splitlines()[0]}")
    return device


@torch.no_grad()
def test_it_adds_the_biases() -> None:
    device = device_where_it_works()
    torch.manual_seed(0)
    module = MediatorAttention(32, 2, (8, 8), (4, 16)).eval().to(device)
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(2, 64, 32, device=device)
    before = module(x)
    module.set_attention_backend("xformers")
    torch.testing.assert_close(module(x), before, atol=1e-4, rtol=1e-4)
