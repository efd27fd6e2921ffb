"""Derived rows are held against the first call: they are right, or refused before anything rests on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

import unwritten
from flowaccel import FeatureCache, UnsupportedModelError, accelerated
from flowaccel.hooks import FAMILIES, session_of
from unwritten import RIGHT, WRONG, Loop, looped

ALWAYS, NEVER = "fbcache:threshold=0", "fbcache:threshold=1e6"
"""When these compute."""


def assert_right(pipe: Loop, arguments: dict[str, Any]) -> None:
    expected, still = pipe(arguments), pipe(arguments, still=True)
    with accelerated(pipe, ALWAYS):
        assert torch.equal(pipe(arguments), expected)
    with accelerated(pipe, NEVER):
        torch.testing.assert_close(pipe(arguments, still=True), still, rtol=1e-4, atol=1e-5)
        records = session_of(pipe).run.records
        assert [record.what for record in records] == ["computed"] + ["reused"] * 3


@pytest.mark.parametrize("name", RIGHT)
def test_a_row_that_holds_is_used_whether_derived_or_written_meanwhile(name: str) -> None:
    assert_right(*looped(name))


def without_row(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Loop, dict[str, Any]]:
    """The pipeline of a network whose written row, if it has one, is left out."""
    for family in [family.name for family in FAMILIES.values() if name in family.networks]:
        monkeypatch.delitem(FAMILIES, family)
    return looped(name)


@pytest.mark.parametrize(
    "name",
    [
        *WRONG,
        "ConsisIDTransformer3DModel",
        "WanAnimateTransformer3DModel",
        "Lumina2Transformer2DModel",
        "HiDreamImageTransformer2DModel",
        "BriaFiboTransformer2DModel",
        "LTX2VideoTransformer3DModel",
        "WanVACETransformer3DModel",
    ],
)
def test_a_derived_row_that_does_not_hold_is_refused_for_blocks_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, arguments = without_row(name, monkeypatch)
    expected = pipe(arguments)
    for recipe in (ALWAYS, "taylorseer"):
        with (
            accelerated(pipe, recipe),
            pytest.raises(UnsupportedModelError, match=r"(?s)be derived: .*register_family"),
        ):
            pipe(arguments)
    with accelerated(pipe, FeatureCache(gate="interval", scope="output", interval=1)):
        assert torch.equal(pipe(arguments), expected)


@pytest.mark.parametrize(
    "name", ["ConsisIDTransformer3DModel", "WanAnimateTransformer3DModel", "Lumina2Transformer2DModel"]
)
def test_the_row_that_is_printed_instead_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = without_row(name, monkeypatch)
    with accelerated(pipe, ALWAYS), pytest.raises(UnsupportedModelError) as failure:
        pipe(arguments)
    try:
        exec(str(failure.value).split("accelerating:\n")[1], {})
        assert_right(pipe, arguments)
    finally:
        FAMILIES.pop("mine", None)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.layer(hidden_states)


class Leaky(ModelMixin, ConfigMixin):
    """Its output takes from the blocks, or hands on between them, what a row cannot say."""

    @register_to_config
    def __init__(self, leak: str = "", in_channels: int = 4) -> None:
        super().__init__()
        self.first, self.blocks = nn.ModuleList([Block(), Block()]), nn.ModuleList([Block() for _ in range(3)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        tokens, leak, kept = hidden_states, self.config.leak, []
        for block in self.first:
            tokens = block(tokens)
        if leak == "other tokens":
            tokens = hidden_states * 2
        for block in self.blocks:
            tokens = block(tokens)
            kept.append(tokens)
            if leak == "fewer tokens":
                tokens = tokens[:, 1:]
            if leak == "early end":
                break
        return (tokens + (kept[0] if leak == "skip" else 0),)


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        ("other tokens", "what leaves its blocks 'first'"),
        ("fewer tokens", "changes the tokens between its blocks 'blocks'"),
        ("early end", "ran 3 of its 5 blocks"),
        ("skip", "takes more from within the blocks than their last tokens"),
    ],
)
def test_a_network_that_does_more_than_its_row_says_is_told_from_one_that_does_not(leak: str, said: str) -> None:
    for network in (Leaky(), Leaky(leak)):
        pipe = Loop(network.eval(), FlowMatchEulerDiscreteScheduler())
        arguments = {"hidden_states": unwritten.noise(6, 4)}
        if not network.config.leak:
            assert_right(pipe, arguments)
            continue
        with accelerated(pipe, ALWAYS), pytest.raises(UnsupportedModelError, match=said):
            pipe(arguments)


def test_blocks_that_later_ones_reach_back_to_are_not_left_out() -> None:
    """HunyuanDiT's second half takes in what the blocks of its first half made."""
    pipe, arguments = looped("HunyuanDiT2DModel")
    expected = pipe(arguments, still=True)
    reused = {"gate": "interval", "interval": 9, "scope": "range", "warmup": 1, "last": 0}
    with accelerated(pipe, FeatureCache(**reused, back=1)):
        torch.testing.assert_close(pipe(arguments, still=True), expected, rtol=1e-4, atol=1e-5)
    with accelerated(pipe, FeatureCache(**reused, back=3)), pytest.raises(UnsupportedModelError, match="smaller back"):
        pipe(arguments)
