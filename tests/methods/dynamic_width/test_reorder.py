"""Which units are strongest, and moving them to where groups are contiguous, for every family."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dynamic_networks import FAMILIES, SIZES, flux, sd3, sit
from flowaccel.methods.dynamic_width.gated_layers import Bits
from flowaccel.methods.dynamic_width.importance import reorder_
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.models.routers import logistic_noise
from helpers import assert_close
from tiny import random_weights

HEADS = SIZES["num_attention_heads"]
WIDTH = HEADS * SIZES["attention_head_dim"]
TIMES = torch.tensor([0.2, 0.7])
Call = Callable[[Any], Tensor]


def at_two_times(family: str) -> tuple[nn.Module, Call]:
    """A stock network, and a call of it with two rows."""
    make, call = FAMILIES[family]
    return make(), lambda network: call(network, TIMES)


EACH = pytest.mark.parametrize("family", FAMILIES)


def made_dynamic(base: nn.Module) -> Any:
    """Ranked, with routers that answer with about as many zeros as ones, and another answer to every time."""
    network = make_dynamic(base, {"bias": 0.0, "token_bias": 0.0})
    for seed, router in enumerate(gated.gate.router for gated in network.dynamic.gated_layers):
        random_weights(router, seed, std=1.0)
    network.dynamic.noise = lambda path, shape: logistic_noise(
        shape, torch.Generator().manual_seed(zlib.crc32(path.encode()))
    )
    return network.eval()


def some_off(network: Any) -> Bits:
    """A plan's gates with about half of the units off."""
    generator = torch.Generator().manual_seed(4)
    drawn = (torch.randint(2, (gated.gate.units - 1,), generator=generator) for gated in network.dynamic.gated_layers)
    return tuple("1" + "".join(map(str, bits.tolist())) for bits in drawn)


def outputs(network: Any, call: Call) -> dict[str, Tensor]:
    """Of everything, of a plan, of what the routers say for every row, and of training."""
    dynamics, found = network.dynamic, {}
    with torch.no_grad():
        with dynamics.complete():
            found["complete"] = call(network)
        dynamics.chosen = some_off(network)
        found["plan"] = call(network)
        dynamics.chosen = None
        found["routers"] = call(network)
    network.train()
    torch.manual_seed(0)  # DiT drops labels by itself
    found["training"] = call(network).detach()
    network.eval()
    return found


@EACH
def test_moving_units_changes_no_output(family: str) -> None:
    base, call = at_two_times(family)
    network = made_dynamic(base)
    with torch.no_grad():
        untouched = call(base)
    before = outputs(network, call)
    results = list(before.values())
    assert all(not torch.allclose(one, other, atol=1e-3) for i, one in enumerate(results) for other in results[:i])
    arranged = [gated.gate.group_of.clone() for gated in network.dynamic.gated_layers]
    reorder_(network)
    for gated, former in zip(network.dynamic.gated_layers, arranged, strict=True):
        size = len(former) // gated.gate.units
        assert gated.gate.group_of.dtype == former.dtype
        assert gated.gate.group_of.tolist() == [member // size for member in range(len(former))]
    moved = {gated.rule.name for gated, former in zip(network.dynamic.gated_layers, arranged, strict=True)
             if not torch.equal(gated.gate.group_of, former)}  # fmt: skip
    assert moved == {gated.rule.name for gated in network.dynamic.gated_layers}  # of every kind some were out of place
    for name, value in outputs(network, call).items():
        assert_close(value, before[name], 1e-5)
    with torch.no_grad():
        assert torch.equal(call(base), untouched)  # which shared its weights


@EACH
def test_a_gate_switches_the_same_units_as_before(family: str) -> None:
    """For every gate alone, the rows that it takes hold the same numbers, in another order."""
    network = made_dynamic(at_two_times(family)[0])

    def taken(gated: Any) -> list[Tensor]:
        rows = [gated.elements(unit).nonzero().flatten() for unit in torch.eye(gated.gate.units)]
        return [gated.rows[0].weight[places].flatten().sort().values for places in rows]

    before = [taken(gated) for gated in network.dynamic.gated_layers]
    reorder_(network)
    for gated, parts in zip(network.dynamic.gated_layers, before, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(taken(gated), parts, strict=True))


def test_moving_twice_moves_nothing() -> None:
    network = made_dynamic(sit())
    reorder_(network)
    once = {key: value.clone() for key, value in network.state_dict().items()}
    parameters = list(network.parameters())
    reorder_(network)
    assert all(torch.equal(value, once[key]) for key, value in network.state_dict().items())
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))


def test_frozen_weights_stay_frozen() -> None:
    network = made_dynamic(sit())
    network.transformer_blocks.requires_grad_(False)
    reorder_(network)
    assert not any(parameter.requires_grad for parameter in network.transformer_blocks.parameters())
    assert all(gated.gate.router.weight.requires_grad for gated in network.dynamic.gated_layers)


def test_units_below_adapters_are_not_moved() -> None:
    network = made_dynamic(sit())
    network.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge or unload the adapters first"):
        reorder_(network)


def weight(block: nn.Module, name: str) -> Tensor:
    return block.get_submodule(name).weight.detach()  # type: ignore[return-value]


def head_size(block: nn.Module, name: str, head: int, width: int, *, text: bool) -> float:
    """Sum of absolute weights of queries, keys, values and of the columns that read them."""
    units = slice(head * width, (head + 1) * width)
    rows = ["to_q", "to_k", "to_v", *(["add_q_proj", "add_k_proj", "add_v_proj"] if text else [])]
    columns = ["to_out.0", *(["to_add_out"] if text and getattr(block, name).to_add_out is not None else [])]
    size = sum(weight(block, f"{name}.{row}")[units].abs().sum() for row in rows)
    return float(size + sum(weight(block, f"{name}.{column}")[:, units].abs().sum() for column in columns))


def channel_size(block: nn.Module, rows: str, columns: str, channel: int, start: int = 0) -> float:
    """Sum of absolute weights and bias of a hidden channel, and of the column that reads it."""
    bias = block.get_submodule(rows).bias.detach()[channel]  # type: ignore[index, operator, union-attr]
    read = weight(block, columns)[:, start + channel]
    return float(weight(block, rows)[channel].abs().sum() + bias.abs() + read.abs().sum())


def assert_ranked(groups: Tensor, sizes: list[float], units: int) -> None:
    """Equal groups, each one's weakest member at least as large as the next one's strongest."""
    parts = [[size for size, group in zip(sizes, groups.tolist(), strict=True) if group == unit]
             for unit in range(units)]  # fmt: skip
    assert {len(part) for part in parts} == {len(sizes) // units}
    assert all(min(part) >= max(later) - 1e-4 for part, later in itertools.pairwise(parts))


def test_units_are_ranked_by_their_weights() -> None:
    """SD3.5's blocks: joint attention in two streams, a second attention, and two feed-forwards."""
    network = made_dynamic(sd3())
    seen = set()
    for gated in network.dynamic.gated_layers:
        block = network.transformer_blocks[gated.block]
        name, units = gated.rule.name, gated.gate.units
        seen.add(name)
        if gated.rule.kind == "heads":
            sizes = [head_size(block, name, head, gated.each, text=name == "attn") for head in range(units)]
        else:
            sizes = [
                channel_size(block, f"{name}.net.0.proj", f"{name}.net.2", i) for i in range(gated.rows[0].out_features)
            ]
        assert_ranked(gated.gate.group_of, sizes, units)
    assert seen == {"attn", "attn2", "ff", "ff_context"}


def test_channels_of_a_fused_block_are_ranked_by_their_weights() -> None:
    """FLUX's single-stream block reads attention and hidden channels with one layer."""
    network = made_dynamic(flux())
    gated_layers = [gated for gated in network.dynamic.gated_layers if gated.rule.name == "proj_mlp"]
    for gated, block in zip(gated_layers, network.single_transformer_blocks, strict=True):
        width = block.proj_mlp.in_features
        sizes = [channel_size(block, "proj_mlp", "proj_out", i, start=width) for i in range(4 * width)]
        assert_ranked(gated.gate.group_of, sizes, HEADS)


@pytest.mark.parametrize("strongest", range(HEADS))
def test_the_strongest_head_and_channels_are_always_on(strongest: int) -> None:
    base = copy.deepcopy(sit())
    block: Any = base.transformer_blocks[1]
    channels = list(range(strongest, 4 * WIDTH, HEADS))
    with torch.no_grad():
        size = SIZES["attention_head_dim"]
        block.attn.to_v.weight[size * strongest : size * (strongest + 1)] += 9
        block.ff.net[2].weight[:, channels] += 9
    gated_layers = {gated.path: gated for gated in make_dynamic(base).dynamic.gated_layers}
    heads = gated_layers["transformer_blocks.1.attn"].gate.group_of
    hidden = gated_layers["transformer_blocks.1.ff"].gate.group_of
    assert heads[strongest] == 0
    assert (hidden == 0).nonzero().flatten().tolist() == channels
