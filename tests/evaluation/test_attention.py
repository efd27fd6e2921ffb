"""Choosing an attention backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import attention_backend
from torch import nn

import tiny
from flowaccel import MissingExtraError
from flowaccel.evaluation import attention, set_attention


@pytest.fixture(autouse=True)
def global_backend() -> Iterator[None]:
    """diffusers also switches what every network without a choice of its own uses: put back here."""
    with attention_backend("native"):
        yield


def backends(network: nn.Module) -> set[Any]:
    found = {
        getattr(module.processor, "_attention_backend", None)
        for module in network.modules()
        if hasattr(module, "processor")
    }
    return {getattr(backend, "value", backend) for backend in found}


def image(pipe: Any) -> torch.Tensor:
    return pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_sdpa() -> None:
    pipe = tiny.sit_pipeline()
    before = image(pipe)
    set_attention(pipe, "sdpa")
    assert backends(pipe.transformer) == {"native"}
    assert torch.equal(image(pipe), before)


def test_flash_is_torchs_own_kernel_where_it_runs() -> None:
    pipe = tiny.sit_pipeline()
    before = image(pipe)
    try:
        set_attention(pipe, "flash")
    except ValueError as error:
        assert "attention 'flash' does not work on cpu" in str(error)
        assert backends(pipe.transformer) == {None}
    else:
        assert backends(pipe.transformer) == {"_native_flash"}
        torch.testing.assert_close(image(pipe), before, rtol=0, atol=1e-4)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"attention must be one of \['flash', 'sdpa', 'xformers'\], got 'sage'"):
        set_attention(tiny.sit_pipeline(), "sage")


def test_missing_xformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    pipe = tiny.sit_pipeline()
    with pytest.raises(MissingExtraError, match=r"pip install 'flowaccel\[xformers\]'"):
        set_attention(pipe, "xformers")
    assert backends(pipe.transformer) == {None}


def fake_xformers(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = kernel
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_xformers_without_kernels_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: Any) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs: ...")

    fake_xformers(monkeypatch, kernel)
    pipe = tiny.sit_pipeline()
    with pytest.raises(
        ValueError, match=r"does not work on cpu with torch\.float32 \(No operator found .*\); use sdpa$"
    ):
        set_attention(pipe, "xformers")
    assert backends(pipe.transformer) == {None}


def test_a_backend_that_diffusers_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.BACKENDS, "sdpa", "no such backend")
    with pytest.raises(ValueError, match="diffusers refuses attention 'sdpa' for SiTTransformer2DModel"):
        set_attention(tiny.sit_pipeline(), "sdpa")


def test_pipelines_with_a_unet() -> None:
    class WithUnet:
        unet = tiny.sit_network()
        device = torch.device("cpu")

    set_attention(WithUnet(), "sdpa")
    assert backends(WithUnet.unet) == {"native"}
