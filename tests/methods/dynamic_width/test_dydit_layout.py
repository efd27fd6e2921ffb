"""Dynamic networks in the layout of the official DyDiT repository: what is read, written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flowaccel import CheckpointError, SiTTransformer2DModel
from flowaccel.methods.dynamic_width.networks import DynamicSiTTransformer2DModel, make_dynamic
from flowaccel.models.official import preset_config
from helpers import GOLDEN, assert_close
from tiny import latent_sit, random_weights

HEADS = 4
State = dict[str, Tensor]


def dynamic(base: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A network whose units are ranked, so not contiguous, and whose gates differ between times."""
    network = make_dynamic(latent_sit(**(base or {"out_channels": 8, "learn_sigma": False})), {"bias": 0.0, **settings})
    random_weights(network.dynamic.blocks, 3, std=1.0)
    return network.eval()


def load(source: Any, **options: Any) -> Any:
    return DynamicSiTTransformer2DModel.from_official(source, **{"num_attention_heads": HEADS, **options})


@torch.no_grad()
def output(network: Any) -> Tensor:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return network(x, torch.tensor([10, 400, 900]), torch.tensor([1, 5, 10])).sample


OFFICIAL: State = dynamic().to_official()


# --- what is read and written


@pytest.mark.parametrize("tokens", [True, False])
def test_there_and_back(tokens: bool) -> None:
    network = dynamic(tokens=tokens)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert any((gated.gate.group_of.diff() < 0).any() for gated in network.dynamic.gated_layers)
    state = network.to_official()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    loaded = load(state)
    assert not loaded.training
    assert loaded.dynamic.settings.tokens is tokens
    assert not any((gated.gate.group_of.diff() < 0).any() for gated in loaded.dynamic.gated_layers)
    assert_close(output(loaded), output(network), 1e-5)
    with loaded.dynamic.complete(), network.dynamic.complete():
        assert_close(output(loaded), output(network), 1e-5)
    again = loaded.to_official()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_half_of_the_channels_is_dropped_only_if_asked_for() -> None:
    network = dynamic({"learn_sigma": True})
    state = network.to_official()
    assert load(state).out_channels == 8
    same = load(state, out_channels=4)
    assert same.config.learn_sigma
    assert_close(output(same), output(network), 1e-5)


def test_settings_can_be_given() -> None:
    loaded = load(OFFICIAL, dynamic_config={"tau": 2.0})
    assert (loaded.dynamic.settings.tau, loaded.dynamic.settings.tokens) == (2.0, True)


def test_training_checkpoints_and_files(tmp_path: Path) -> None:
    doubled = {key: 2 * value for key, value in OFFICIAL.items()}
    torch.save({"model": doubled, "ema": OFFICIAL}, tmp_path / "0030000.pt")
    save_file({key: value.contiguous() for key, value in OFFICIAL.items()}, tmp_path / "dydit.safetensors")
    for loaded, expected in (
        (load(tmp_path / "0030000.pt"), OFFICIAL),
        (load(tmp_path / "0030000.pt", which="model"), doubled),
        (load(str(tmp_path / "dydit.safetensors")), OFFICIAL),
    ):
        found = loaded.to_official()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("size", ["S", "B", "XL"])
def test_published_sizes_have_the_official_number_of_parameters(size: str) -> None:
    counts = json.loads((GOLDEN / "param_counts.json").read_text())["DyDiT"]["counts"]
    with torch.device("meta"):
        network = DynamicSiTTransformer2DModel(**preset_config(f"{size}/2"), out_channels=8, learn_sigma=False)
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert trainable == counts[f"DiT-{size}/2 with routers, input_size=32"]["trainable"]


# --- what is refused


def december_2024() -> State:
    """Routers with one output more, for the gate that is always on today."""
    grown = dict(OFFICIAL)
    for key, value in OFFICIAL.items():
        if "_rate.router" in key:
            grown[key] = torch.cat([value[:1], value])
    return grown


REFUSED: dict[str, tuple[State, str]] = {
    "first release": (december_2024(), "router layout of December 2024: 4 outputs for 4 heads"),
    "static network": (latent_sit().to_official(), r"no routers.*SiTTransformer2DModel\.from_official.*make_dynamic"),
    "router missing": (
        {key: value for key, value in OFFICIAL.items() if key != "blocks.1.mlp_rate.router.bias"},
        r"1 misfits.*missing dynamic\.blocks\.1\.ff_gate\.router\.bias",
    ),
    "some token routers missing": (
        {key: value for key, value in OFFICIAL.items() if "blocks.1.token_selection" not in key},
        r"4 misfits.*missing dynamic\.blocks\.1\.tokens\.0\.weight",
    ),
    "another router": (
        {**OFFICIAL, "blocks.0.depth_rate.router.weight": torch.zeros(3, 48)},
        "unexpected key 'blocks.0.depth_rate.router.weight'",
    ),
    "other outputs": (
        {**OFFICIAL, "blocks.0.attn_rate.router.weight": torch.zeros(7, 48)},
        r"checkpoint \(7, 48\), model \(3, 48\)",
    ),
    "scalar": ({**OFFICIAL, "blocks.0.attn_rate.router.weight": torch.zeros(())}, r"checkpoint \(\), model \(3, 48\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit(case: str) -> None:
    state, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        load(state)


def test_a_static_reader_refuses_routers() -> None:
    with pytest.raises(CheckpointError, match=r"unexpected key 'blocks\.0\.attn_rate"):
        SiTTransformer2DModel.from_official(OFFICIAL, num_attention_heads=HEADS)


@pytest.mark.parametrize(("settings", "named"), [({"normalise": True}, "normalise=True"), ({"groups": 2}, "groups=2")])
def test_what_the_layout_cannot_say_is_not_written(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dynamic(**settings).to_official()


def test_adapters_are_not_written() -> None:
    network = dynamic()
    network.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="unload the adapters first"):
        network.to_official()
