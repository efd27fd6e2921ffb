"""How experts may be built, and what is said of what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from diffusers.models.attention import FeedForward
from torch import nn

from flowaccel.methods.moe.experts import ExpertShape
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.settings import MoESettings

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"router": "best"}, r"router must be one of \['diffmoe', .*\], got 'best'"),
    ({"router": None}, "router must be one of .*, got None"),
    ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
    ({"num_experts": 2.0}, "num_experts must be a whole number of at least 1, got 2.0"),
    ({"num_experts": True}, "num_experts must be a whole number of at least 1, got True"),
    ({"capacity": 0}, "capacity must be above 0 and at most num_experts=16, got 0"),
    ({"capacity": -1.0}, "capacity must be above 0"),
    ({"capacity": 16.5}, "capacity must be above 0 and at most num_experts=16, got 16.5"),
    ({"capacity": float("nan")}, "capacity must be above 0"),
    ({"capacity": "1"}, "capacity must be above 0 .*, got '1'"),
    *(
        ({"router": router, "capacity": 1.5}, f"capacity must be a whole number with router='{router}'.*got 1.5")
        for router in ("token_choice", "dit_moe", "deepseek")
    ),
    ({"inference_selection": "all"}, r"inference_selection must be one of \['predictor_mask', .*got 'all'"),
    (
        {"router": "expert_race", "inference_selection": "gate_threshold"},
        "inference_selection='gate_threshold' is for router='diffmoe', got 'expert_race'",
    ),
    ({"score_fn": "tanh"}, r"score_fn must be one of \['softmax', 'sigmoid', 'identity'\], got 'tanh'"),
    ({"norm_topk": True}, "norm_topk=True is for the routers .*'token_choice'.*, got router='diffmoe'"),
    ({"inner_dim": 0}, "inner_dim must be a whole number of at least 1, got 0"),
    ({"shared_inner_dim": 1.5}, "shared_inner_dim must be a whole number of at least 1, got 1.5"),
    ({"threshold_warmup": 0}, "threshold_warmup must be a whole number of at least 1, got 0"),
    ({"threshold_momentum": 1.0}, r"threshold_momentum must lie in \[0, 1\), got 1.0"),
    ({"routed_scale": 0}, "routed_scale must be above 0, got 0"),
    ({"aux_loss_weight": -1}, "aux_loss_weight must be at least 0, got -1"),
    ({"bias_rate": "0.1"}, "bias_rate must be at least 0, got '0.1'"),
    ({"gate_init_std": float("inf")}, "gate_init_std must be at least 0, got inf"),
    ({"expert_groups": 4}, "expert_groups=4 is for router='deepseek', got 'diffmoe'"),
    ({"router": "deepseek", "expert_groups": 3}, "expert_groups must divide num_experts=16.* got 3 and 1"),
    ({"router": "deepseek", "expert_groups": 2, "top_groups": 3}, "top_groups be at most expert_groups, got 2 and 3"),
    (
        {"router": "deepseek", "expert_groups": 8, "top_groups": 1, "capacity": 3},
        "top_groups=1 leaves fewer experts than capacity=3",
    ),
    ({"layers": "some"}, r"layers must be one of \['odd', .*got 'some'"),
    ({"layers": ()}, r"layers must list blocks by indices from 0, or be one of \['odd'.*got \(\)"),
    ({"layers": [0, -1]}, r"layers must list blocks by indices from 0.*got \[0, -1\]"),
    ({"layers": [True]}, r"layers must list blocks .*got \[True\]"),
    ({"layers": 3}, "layers must list blocks .*got 3"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG, ids=[str(entries) for entries, _ in WRONG])
def test_wrong_settings(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoESettings(**entries)


def test_unknown_entries() -> None:
    with pytest.raises(ValueError, match=r"moe_config: unknown \['experts', 'k'\]; allowed are \['router', "):
        MoESettings.of({"experts": 4, "k": 1})


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("odd", (1, 3, 5)),
        ("even", (0, 2, 4)),
        ("all", (0, 1, 2, 3, 4, 5)),
        ("deep_half", (3, 4, 5)),
        ("first3_last1_dense", (3, 4)),
        ([4, 0, 4], (0, 4)),
    ],
)
def test_layers(layers: Any, blocks: tuple[int, ...]) -> None:
    settings = MoESettings(layers=layers)
    assert settings.blocks(6) == blocks
    assert MoESettings.of(json.loads(json.dumps(asdict(settings)))) == settings


def test_layers_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"layers must be below the number of blocks, 6, got \[2, 6\]"):
        MoESettings(layers=(2, 6)).blocks(6)
    for layers, count in (("odd", 1), ("first3_last1_dense", 4)):
        with pytest.raises(ValueError, match=f"layers='{layers}' chooses none of {count} blocks"):
            MoESettings(layers=layers).blocks(count)


@pytest.mark.parametrize("activation_fn", ["gelu", "gelu-approximate", "geglu", "swiglu", "linear-silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_like_the_dense_feed_forward(activation_fn: str, bias: bool) -> None:
    inner_dim = 24
    dense = FeedForward(16, inner_dim=inner_dim, activation_fn=activation_fn, bias=bias)
    shape = ExpertShape(dim=16, inner_dim=inner_dim, activation_fn=activation_fn, bias=bias)
    assert ExpertShape.of(dense) == shape
    layer = MoEFeedForward.of(dense, {"num_experts": 2})
    assert layer.shape == shape
    expert = sum(parameter.numel() for parameter in dense.parameters())
    assert sum(parameter.numel() for parameter in layer.experts.parameters()) == 2 * expert
    other = MoEFeedForward.of(
        dense, {"inner_dim": 4, "activation_fn": "swiglu", "bias": not bias, "shared_inner_dim": 6}
    )
    assert other.shape == ExpertShape(dim=16, inner_dim=4, activation_fn="swiglu", bias=not bias)


def test_feed_forwards_that_experts_cannot_be_like() -> None:
    wrong: list[Any] = [FeedForward(16, activation_fn="geglu-approximate"), FeedForward(16, final_dropout=True)]
    for dense in (*wrong, nn.Linear(16, 16)):
        with pytest.raises(ValueError, match=r"experts can be made of a diffusers FeedForward with one of \['gelu', "):
            MoEFeedForward.of(dense)
