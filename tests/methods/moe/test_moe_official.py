"""Networks with experts in the layout of the official DiffMoE repository: what is read, written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from flowaccel import CheckpointError, SiTTransformer2DModel
from flowaccel.cli import app
from flowaccel.methods.dynamic_width.networks import DynamicSiTTransformer2DModel, make_dynamic
from flowaccel.methods.moe.control import moe_layers, set_moe_selection, unpack_experts
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel
from flowaccel.models.official import SIZES, preset_config
from helpers import GOLDEN, assert_close
from tiny import latent_sit, random_weights

HEADS, EXPERTS, WIDTH = 4, 4, 48
State = dict[str, Tensor]
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(network: Any) -> Tensor:
    found: Tensor = network(noise(3, 4, 8, 8), torch.tensor([0.1, 0.4, 0.9]), torch.tensor([1, 5, 10])).sample
    return found


@torch.no_grad()
def output(network: Any) -> Tensor:
    return call(network)


def untrained(base: dict[str, Any] | None = None, **settings: Any) -> Any:
    network = MoESiTTransformer2DModel.from_base(
        latent_sit(**{"out_channels": 8, "learn_sigma": False, **(base or {})}), {"num_experts": EXPERTS, **settings}
    )
    random_weights(network, 3, std=0.3)
    return network.eval()


def with_experts(base: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A network whose thresholds are those of one batch."""
    network = untrained(base, **settings).train()
    call(network).sum().backward()
    network.zero_grad()
    for layer in moe_layers(network).values():
        layer.commit()
    return network.eval()


def load(source: Any, **options: Any) -> Any:
    return MoESiTTransformer2DModel.from_official(source, **{"num_attention_heads": HEADS, **options})


OFFICIAL: State = with_experts().to_official()


# --- what is read and written


FORMS: dict[str, dict[str, Any]] = {
    "as published": {},
    "in all blocks": {"layers": "all"},
    "in the first block": {"layers": (0,)},
    "narrow experts": {"inner_dim": 40},
    "narrow experts in all blocks": {"layers": "all", "inner_dim": 40},
    "a shared one": {"shared_inner_dim": 8 * WIDTH},
    "gated": {"activation_fn": "swiglu", "bias": False},
    "gated, in all blocks": {"layers": "all", "activation_fn": "swiglu", "bias": False, "inner_dim": 40},
    "one expert": {"num_experts": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form: str) -> None:
    network = with_experts(**FORMS[form])
    state = network.to_official()
    loaded = load(state)
    assert not loaded.training
    assert torch.equal(output(loaded), output(network))
    assert [layer.shape for layer in moe_layers(loaded).values()] == [
        layer.shape for layer in moe_layers(network).values()
    ]
    mine = network.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in loaded.state_dict().items() if ".thresholds." not in key)
    again = loaded.to_official()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("layers", "depth", "read"),
    [
        ("odd", 4, "odd"),
        ("even", 4, "even"),
        ("all", 4, "all"),
        ("deep_half", 4, "deep_half"),
        ("first3_last1_dense", 6, "first3_last1_dense"),
        ((1, 2), 4, (1, 2)),
        ((0,), 1, "even"),
    ],
)
def test_the_blocks_are_read(layers: Any, depth: int, read: Any) -> None:
    state = with_experts({"num_layers": depth}, layers=layers, inner_dim=8).to_official()
    assert load(state).config.moe_config["layers"] == read


def test_half_of_the_channels_is_dropped_only_if_asked_for() -> None:
    network = with_experts({"learn_sigma": True, "out_channels": 4})
    state = network.to_official()
    assert load(state).out_channels == 8
    same = load(state, out_channels=4)
    assert same.config.learn_sigma
    assert torch.equal(output(same), output(network))


def test_settings_can_be_given() -> None:
    loaded = load(OFFICIAL, moe_config={"capacity": 2.0, "inference_selection": "gate_topk_count"})
    assert loaded.config.moe_config["num_experts"] == EXPERTS
    for layer in moe_layers(loaded).values():
        assert (layer.capacity, layer.selection) == (2.0, "gate_topk_count")
    with pytest.raises(ValueError, match=r"moe_config: unknown \['capacities'\]"):
        load(OFFICIAL, moe_config={"capacities": 2.0})


def test_training_checkpoints_and_files(tmp_path: Path) -> None:
    doubled = {key: value if "ema_decay" in key else 2 * value for key, value in OFFICIAL.items()}
    torch.save({"model": doubled, "ema": OFFICIAL}, tmp_path / "0030000.pt")
    save_file({key: value.contiguous() for key, value in OFFICIAL.items()}, tmp_path / "diffmoe.safetensors")
    for loaded, expected in (
        (load(tmp_path / "0030000.pt"), OFFICIAL),
        (load(tmp_path / "0030000.pt", which="model"), doubled),
        (load(str(tmp_path / "diffmoe.safetensors")), OFFICIAL),
    ):
        found = loaded.to_official()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_thresholds_of_0_were_never_fitted() -> None:
    network = untrained()
    state = network.to_official()
    assert not any(value.any() for key, value in state.items() if "expert_threshold" in key)
    with pytest.raises(ValueError, match="never fitted"):
        output(load(state))
    trained = load(state).train()
    call(trained).sum().backward()
    for layer in moe_layers(trained).values():
        layer.commit()
    assert output(trained.eval()).isfinite().all()


def test_thresholds_of_the_gate_are_not_in_the_layout() -> None:
    """Read as 0 they would let every token take every expert."""
    network = with_experts()
    loaded = load(network.to_official())
    set_moe_selection(loaded, "gate_threshold")
    with pytest.raises(ValueError, match="never fitted"):
        output(loaded)
    loaded.train()
    call(loaded).sum().backward()
    for path, layer in moe_layers(loaded).items():
        layer.commit()
        fresh, own = layer.thresholds.gate, moe_layers(network)[path].thresholds.gate
        assert_close(fresh, own, 1e-6)  # the first value as it is, not averaged with what was not there
    set_moe_selection(network, "gate_threshold")
    assert_close(output(loaded.eval()), output(network), 1e-5)


# --- sizes


def preset(name: str, experts: int, pixels: int) -> Any:
    """A published size, without memory."""
    with torch.device("meta"):
        return MoESiTTransformer2DModel(
            **preset_config(f"{name}/2"),
            sample_size=pixels,
            out_channels=8,
            learn_sigma=False,
            moe_config={"num_experts": experts},
        )


@pytest.mark.parametrize("key", COUNTS["DiffMoE"]["counts"])
def test_published_sizes_have_the_official_number_of_parameters(key: str) -> None:
    name, pixels = key.split(" input_size=")
    size, experts = name.split("-E")
    network = preset(size, int(experts), int(pixels))
    parameters = list(network.parameters())
    assert COUNTS["DiffMoE"]["counts"][key] == {
        "total_with_pos_embed": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "num_state_dict_entries": len(network.to_official()),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("experts", [2, 16])
def test_what_experts_add_to_a_dense_network(size: str, experts: int) -> None:
    """E experts (D -> 4D -> D, biases), a gate and a predictor (D -> D -> E, biases) in every other block."""
    depth, width, _ = SIZES[size]
    dense = 8 * width**2 + 5 * width
    layer = experts * dense + width * experts + (width**2 + width) + (width * experts + experts)
    base = COUNTS["SiT"]["counts"][f"SiT-{size}/2 learn_sigma=True"]["total_with_pos_embed"]
    total = sum(parameter.numel() for parameter in preset(size, experts, 32).parameters())
    assert total == base + depth // 2 * (layer - dense)


# --- what is refused


def without(*parts: str) -> State:
    return {key: value for key, value in OFFICIAL.items() if not any(part in key for part in parts)}


def stray(key: str, value: Tensor) -> State:
    return {**OFFICIAL, key: value}


def differing(**other: Any) -> State:
    """Two blocks of four with experts, the second with others."""
    state = with_experts({"num_layers": 4}).to_official()
    theirs = with_experts({"num_layers": 4}, **other).to_official()
    return {key: value for key, value in state.items() if "blocks.3.mlp" not in key} | {
        key: value for key, value in theirs.items() if "blocks.3.mlp" in key
    }


FIRST = "blocks.1.mlp.experts.0"
REFUSED: dict[str, tuple[State, str]] = {
    "dense network": (latent_sit().to_official(), r"no experts.*SiTTransformer2DModel\.from_official.*upcycle_to_moe"),
    "gate alone": (without(".experts."), r"blocks\.1\.mlp\.experts: expert 0 is missing"),
    "expert missing": (without(".experts.2."), r"blocks\.1\.mlp\.experts: expert 2 is missing; there are \[0, 1, 3\]"),
    "last expert missing": (without(".experts.3."), r"checkpoint \(4, 48\), model \(3, 48\)"),
    "part missing": (without(f"{FIRST}.fc2.bias"), r"experts\.0 must have .*missing are \['fc2\.bias'\]"),
    "kinds mixed": (
        without(f"{FIRST}.") | {f"{FIRST}.{part}_proj.weight": torch.zeros(192, 48) for part in ("gate", "up", "down")},
        r"experts\.1 must have \['down_proj\.weight'.*unexpected \['fc1\.bias'",
    ),
    "shapes differ": (
        stray(f"{FIRST}.fc1.weight", torch.zeros(96, WIDTH)),
        r"experts\.1\.fc1\.weight must have 2 axes .* the shape of expert 0's fc1\.weight, \(96, 48\), got \(192, 48\)",
    ),
    "scalar": (stray(f"{FIRST}.fc1.bias", torch.zeros(())), r"experts\.0\.fc1\.bias must have 1 axes"),
    "empty": (
        {key: value[:0] if ".fc1." in key and ".experts." in key else value for key, value in OFFICIAL.items()},
        r"experts\.0\.fc1\.weight must have 2 axes that are not empty.*got \(0, 48\)",
    ),
    "number of experts differs": (
        differing(num_experts=2),
        r"must have the same, got block 1: 4 experts of width 192, shared width None; block 3: 2 experts",
    ),
    "width differs": (differing(inner_dim=40), "block 3: 4 experts of width 40"),
    "kind differs": (
        differing(activation_fn="swiglu", bias=False),
        "block 3: 4 experts of width 192, gated, shared width None",
    ),
    "one shared one": (differing(shared_inner_dim=40), "block 3: 4 experts of width 192, shared width 40"),
    "gate missing": (without("gate_weight"), r"missing transformer_blocks\.1\.ff\.gate\.weight"),
    "thresholds missing": (without("expert_threshold"), r"missing transformer_blocks\.1\.ff\.thresholds\.predictor"),
    "thresholds of others": (
        stray("blocks.1.mlp.expert_threshold", torch.ones(5)),
        r"thresholds\.predictor: checkpoint \(5,\), model \(4,\)",
    ),
    "dense feed-forward too": (
        stray("blocks.1.mlp.fc1.weight", torch.zeros(192, WIDTH)),
        r"unexpected transformer_blocks\.1\.ff\.net\.0\.proj\.weight",
    ),
    "unknown part": (
        stray("blocks.1.mlp.experts.scale", torch.zeros(1)),
        r"unexpected key 'blocks\.1\.mlp\.experts\.scale'",
    ),
    "unknown part of the network": (stray("blocks.1.moe.gate.weight", torch.zeros(1)), "unexpected key 'blocks.1.moe"),
    "block that is not there": (
        stray("blocks.9.mlp.experts.0.fc1.bias", torch.zeros(1)),
        r"blocks\.9\.mlp\.experts\.0 must have",
    ),
    "experts in a block that is not there": (
        OFFICIAL
        | {key.replace("blocks.1.", "blocks.900."): value for key, value in OFFICIAL.items() if ".mlp." in key},
        "block 900 has experts, and there are",
    ),
    "huge number": (stray("blocks.1.mlp.experts.99999999999.fc1.bias", torch.zeros(1)), "unexpected key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit(case: str) -> None:
    state, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        load(state)


@pytest.mark.parametrize("shape", [(96, 24), (96, WIDTH), (0, WIDTH)])
def test_gated_halves_of_two_shapes(shape: tuple[int, int]) -> None:
    state = with_experts(activation_fn="swiglu", bias=False).to_official()
    given = {key: torch.zeros(shape) if "gate_proj" in key else value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight must have .* expert 0's up_proj\.weight"):
        load(given)


def test_gated_experts_beside_a_plain_shared_one() -> None:
    state = with_experts(activation_fn="swiglu", bias=False).to_official()
    with pytest.raises(CheckpointError, match="gated experts beside a shared feed-forward"):
        load(state | {"blocks.1.mlp.shared_experts.fc1.weight": torch.zeros(384, WIDTH)})


def test_a_dense_reader_refuses_experts() -> None:
    with pytest.raises(CheckpointError, match=r"unexpected key 'blocks\.1\.mlp\.(experts|gate)"):
        SiTTransformer2DModel.from_official(OFFICIAL, num_attention_heads=HEADS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"router": "expert_race"}, "router='expert_race', score_fn=None"),
        ({"router": "token_choice"}, "router='token_choice'"),
        ({"inference_selection": "gate_threshold"}, "inference_selection='gate_threshold'"),
        ({"score_fn": "sigmoid"}, "score_fn='sigmoid'"),
        ({"routed_scale": 2.5}, "routed_scale=2.5"),
        ({"activation_fn": "gelu"}, "activation_fn='gelu' with bias=True"),
        ({"activation_fn": "swiglu"}, "activation_fn='swiglu' with bias=True"),
        (
            {"activation_fn": "swiglu", "bias": False, "shared_inner_dim": 40},
            "shared_inner_dim=40 with activation_fn='swiglu'",
        ),
    ],
)
def test_what_the_layout_cannot_say_is_not_written(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        untrained(**settings).to_official()


def test_unpacked_experts_are_not_written() -> None:
    network = with_experts()
    unpack_experts(network)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.ff are unpacked; call .*pack_experts"):
        network.to_official()


@pytest.mark.parametrize("target", ["to_q", "gate", "net.2"])
def test_adapters_are_not_written(target: str) -> None:
    network = with_experts()
    network.add_adapter(LoraConfig(target_modules=[target]))
    with pytest.raises(ValueError, match="unload adapters first"):
        network.to_official()


# --- the command line


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["convert", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return " ".join(result.stderr.split())


FORMS_OF_A_SIT: dict[str, tuple[type[SiTTransformer2DModel], Any]] = {
    "diffmoe": (MoESiTTransformer2DModel, with_experts),
    "dydit": (DynamicSiTTransformer2DModel, lambda: make_dynamic(latent_sit(out_channels=8, learn_sigma=False))),
}


@pytest.mark.parametrize("form", FORMS_OF_A_SIT)
def test_convert_writes_folders_and_back(form: str, tmp_path: Path) -> None:
    kind, make = FORMS_OF_A_SIT[form]
    state = {key: value.contiguous() for key, value in make().to_official().items()}
    source, folder, back = tmp_path / "official.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    save_file(state, source)
    said = run(str(source), "--to", form, "--num-attention-heads", str(HEADS), "--out", str(folder))
    assert '"num_layers": 2' in said
    assert torch.equal(
        output(kind.from_pretrained(folder)), output(kind.from_official(state, num_attention_heads=HEADS))
    )
    run(str(folder), "--to", "official", "--out", str(back))
    found = load_file(back)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_convert_says_what_it_cannot(tmp_path: Path) -> None:
    source, folder = tmp_path / "official.safetensors", tmp_path / "folder"
    out = ["--out", str(tmp_path / "x")]
    save_file({key: value.contiguous() for key, value in latent_sit().to_official().items()}, source)
    heads = ["--num-attention-heads", str(HEADS)]
    assert "the checkpoint has no experts" in run(str(source), "--to", "diffmoe", *heads, *out, code=2)
    assert "the checkpoint has no routers" in run(str(source), "--to", "dydit", *heads, *out, code=2)
    with_experts(routed_scale=2.0).save_pretrained(folder)
    assert "routed_scale=2.0, which has no place" in run(str(folder), "--to", "official", *out, code=2)
    run(str(source), "--to", "dit", *heads, "--out", str(tmp_path / "dit"))
    said = run(str(tmp_path / "dit"), "--to", "official", *out, code=2)
    assert "holds a DiTTransformer2DModel; a layout is known of SiTTransformer2DModel, Dynamic" in said
    assert not (tmp_path / "x").exists()
