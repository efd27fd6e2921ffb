"""Products do not depend on where their operands lie in memory; see `MKL_CBWR` in conftest.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear


def placed(value: Tensor, floats: int) -> Tensor:
    """A copy that lies so many floats behind a multiple of 64 bytes, as tensors read from a file do."""
    memory = torch.empty(value.numel() + 32)
    begin = -(memory.data_ptr() // 4) % 16 + floats
    return memory[begin : begin + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 256, 16), (1, 48, 288)])
def test_products_are_the_same_wherever_their_operands_lie(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    operands = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    expected = linear(*(placed(value, 0) for value in operands))
    for moved in range(3):
        for floats in (1, 2, 4):
            found = linear(*(placed(value, floats * (i == moved)) for i, value in enumerate(operands)))
            assert torch.equal(found, expected), (moved, floats)
