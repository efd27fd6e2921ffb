"""Counting multiply-adds looks at a network and changes nothing about it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AnyFlowTransformer3DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

import families
import tiny
from flowaccel import accelerated, report
from flowaccel.hooks import macs_by_module, networks, shapes_of

State = dict[str, Any]


def state_of(value: Any, path: str = "", seen: set[int] | None = None) -> State:
    """All that can be reached from a network by attributes, entries and items: which object it is, and of tensors also
    the device and how often they were written to.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return {}
    seen.add(id(value))
    found: State = {path: (type(value), id(value))}
    if isinstance(value, Tensor):
        return {path: (id(value), str(value.device), value.dtype, tuple(value.shape), value._version)}
    if isinstance(value, (str, bytes, int, float, type, types.ModuleType)):
        return {path: value}
    if isinstance(value, dict):
        inner: Any = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    else:
        inner = getattr(value, "__dict__", {}).items()
    for name, one in list(inner):
        found |= state_of(one, f"{path}.{name}", seen)
    return found


@pytest.mark.parametrize("case", families.CASES.values(), ids=lambda case: case.name)
def test_report_changes_no_attribute_of_a_family(case: families.Case) -> None:
    pipe = case.make()
    with accelerated(pipe, "fbcache"):
        case(pipe)
        before = {name: state_of(network) for name, network in networks(pipe).items()}
        assert bool(report(pipe).macs) == case.counted
        assert {name: state_of(network) for name, network in networks(pipe).items()} == before


# --- networks that keep tables in plain attributes


def z_image() -> tuple[nn.Module, dict[str, Any]]:
    """Its table of positions is made by the first call."""
    network = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 6, 6], axes_lens=[64, 8, 8],
    )  # fmt: skip
    return network, {"x": [torch.randn(4, 1, 4, 4)], "t": torch.tensor([0.5]), "cap_feats": [torch.randn(5, 8)]}


def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    """Its table is a list that the constructor makes. A call reads lengths from the mask, so it is not counted."""
    network = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(16, 8, 8), cap_feat_dim=8,
    )  # fmt: skip
    return network, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
    }


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    """Its tables are attributes that the constructor makes, and parts of them are cached by the class."""
    network = QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return network, {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 2)]],
    }


def any_flow() -> tuple[nn.Module, dict[str, Any]]:
    """Its table is kept for the device of the last call."""
    network = AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=16, num_layers=1, rope_max_seq_len=8,
    )  # fmt: skip
    return network, {
        "hidden_states": torch.randn(1, 1, 4, 4, 4),
        "timestep": torch.full((1, 1), 500.0),
        "r_timestep": torch.full((1, 1), 400.0),
        "encoder_hidden_states": torch.randn(1, 5, 8),
    }


@pytest.mark.parametrize("ran", [False, True], ids=["before any call", "after a call"])
@pytest.mark.parametrize("make", [z_image, lumina2, qwen, any_flow], ids=lambda make: make.__name__)
@torch.no_grad()
def test_counting_leaves_tables_in_plain_attributes(make: Callable[[], Any], ran: bool) -> None:
    network, arguments = make()
    network.eval()
    expected = copy.deepcopy(network)(**arguments, return_dict=False)[0]
    if ran:
        network(**arguments)
    before = state_of(network)
    counted = macs_by_module(network, shapes_of(arguments))
    assert counted is None if make is lumina2 else counted[""] > 0
    assert state_of(network) == before
    found = network(**arguments, return_dict=False)[0]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# --- what surrounds a network's modules


def test_counting_calls_nobody_who_surrounds_the_network() -> None:
    """Neither a wrapper, nor a hook of torch, nor one of diffusers; the count is that of the untouched network."""
    network = tiny.sit_network()
    arguments = {
        "hidden_states": torch.randn(1, 1, 8, 8),
        "timestep": torch.ones(1),
        "class_labels": torch.ones(1).long(),
    }
    plain = macs_by_module(network, shapes_of(arguments))
    called = []
    block, forward = network.transformer_blocks[0], network.forward
    apply_layerwise_casting(block, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    block.register_forward_hook(lambda *_: called.append("hook"))
    network.forward = lambda *args, **kwargs: called.append("wrapper") or forward(*args, **kwargs)
    before = state_of(network)
    assert macs_by_module(network, shapes_of(arguments)) == plain
    assert not called and state_of(network) == before


def test_somebodys_own_forward_is_counted() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    network.forward = types.MethodType(lambda self, input: self[1](input), network)
    assert macs_by_module(network, {"input": torch.ones(1, 4, device="meta")})[""] == 32


def test_counting_copies_no_data() -> None:
    """Not of parameters, nor of what a module keeps beside them; what cannot be copied cannot be counted."""
    layer = nn.Linear(2, 2, bias=False)
    huge = torch.empty(1).expand(2**40)
    layer.kept = [huge]
    layer.weight = nn.Parameter(torch.empty(1).expand(2**20, 2**20))
    assert macs_by_module(layer, {"input": torch.ones(1, 2**20, device="meta")})[""] == 2**40
    layer.generator = torch.Generator()
    assert macs_by_module(layer, {"input": torch.ones(1, 2**20, device="meta")}) is not None
    layer.running = (number for number in ())
    assert macs_by_module(layer, {"input": torch.ones(1, 2**20, device="meta")}) is None
