"""Checkpoints in the official layout: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flowaccel import CheckpointError, SiTTransformer2DModel, WeightsNotFoundError
from flowaccel.models.official import dit_transformer_from_official, load_official_state, preset_config
from helpers import RecordedTimes, assert_close, golden
from tiny import latent_sit

State = dict[str, Tensor]
OFFICIAL: State = golden("sit_tiny").group("sd/")
HEADS = 4


def load(source: Any, **options: Any) -> SiTTransformer2DModel:
    return SiTTransformer2DModel.from_official(source, **{"num_attention_heads": HEADS, **options})


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what is read


@pytest.mark.parametrize("name", ["sit_tiny", "sit_tiny_nosigma", "sit_tiny_p4"])
def test_round_trip_is_bit_exact(name: str) -> None:
    """There and back, with query, key and value split and fused again."""
    file = golden(name)
    assert same(file.network().to_official(), file.group("sd/"))


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("out_channels", [None, 2])
def test_learn_sigma_is_inferred(learn_sigma: bool, out_channels: int | None) -> None:
    network = latent_sit(learn_sigma=learn_sigma, out_channels=out_channels)
    options = {} if out_channels is None else {"out_channels": out_channels}
    loaded = load(network.to_official(), **options)
    assert loaded.config.learn_sigma is learn_sigma
    assert loaded.out_channels == (out_channels or 4)
    assert same(loaded.state_dict(), network.state_dict())


def test_heads_of_published_widths_are_known() -> None:
    network = SiTTransformer2DModel(**preset_config("SiT-S/2") | {"num_layers": 1, "sample_size": 4, "num_classes": 3})
    loaded = SiTTransformer2DModel.from_official(network.to_official())
    assert loaded.config.num_attention_heads == 6
    assert not loaded.training


def test_loaded_network_is_independent_of_the_given_dictionary() -> None:
    given = {key: value.clone() for key, value in OFFICIAL.items()}
    network = load(given)
    for value in given.values():
        value.zero_()
    assert same(network.to_official(), OFFICIAL)


def test_distributed_prefix_is_dropped() -> None:
    assert same(load({f"module.{key}": value for key, value in OFFICIAL.items()}).to_official(), OFFICIAL)


def variant(factor: float) -> State:
    return {key: value * factor for key, value in OFFICIAL.items()}


TRAINING = {
    "model": variant(2.0),
    "ema": variant(0.5),
    "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
    "args": argparse.Namespace(model="SiT-XL/2", epochs=1400),
}


@pytest.mark.parametrize(
    ("content", "which", "taken", "factor"),
    [
        (TRAINING, None, "ema", 0.5),
        (TRAINING, "model", "model", 2.0),
        ({key: TRAINING[key] for key in ("model", "args")}, None, "model", 2.0),
        ({"params": variant(3.0)}, "params", "params", 3.0),
        (OFFICIAL, None, None, 1.0),
    ],
    ids=["ema", "which=model", "model", "which=other", "flat"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_training_checkpoints(
    content: Any,
    which: str | None,
    taken: str | None,
    factor: float,
    legacy: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`ema`, then `model`, then the flat dictionary; and the log says which."""
    torch.save(content, tmp_path / "0400000.pt", _use_new_zipfile_serialization=not legacy)
    with caplog.at_level(logging.INFO, logger="flowaccel"):
        network = load(tmp_path / "0400000.pt", which=which)
    assert same(network.to_official(), variant(factor))
    assert [record.getMessage().split("took the entry ")[-1] for record in caplog.records] == (
        [repr(taken)] if taken else []
    )


def test_safetensors_and_paths_as_text(tmp_path: Path) -> None:
    save_file(OFFICIAL, tmp_path / "sit.safetensors")
    assert same(load(str(tmp_path / "sit.safetensors")).to_official(), OFFICIAL)


# --- the layout of DiT


@torch.no_grad()
def test_dit_layout_as_the_stock_class() -> None:
    """diffusers spaces the frequencies by 1/127: near by itself, equal once the test gives it 1/128."""
    file = golden("sit_tiny")
    network = dit_transformer_from_official(OFFICIAL, overrides={"num_attention_heads": HEADS})
    assert type(network) is DiTTransformer2DModel
    assert not network.training

    def output() -> Tensor:
        return network(file["in/x"], timestep=file["in/t"], class_labels=file["in/y"]).sample[:, :4]

    expected = file["out/forward"]
    stock = (output() - expected).abs().max() / expected.abs().max()
    assert 1e-5 < stock < 2e-2
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert_close(output(), expected, 1e-5)
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj = RecordedTimes()
    network.double()  # in which an eps of 1e-5 would show
    precise = network(file["in/x"].double(), timestep=file["in/t"], class_labels=file["in/y"]).sample[:, :4]
    assert_close(precise, file["out64/forward"], 1e-9)


def test_dit_layout_refuses_what_sit_refuses() -> None:
    with pytest.raises(CheckpointError, match="pass num_attention_heads="):
        dit_transformer_from_official(OFFICIAL)
    with pytest.raises(CheckpointError, match=r"1 misfits.*missing transformer_blocks\.1\.ff\.net\.2\.bias"):
        dit_transformer_from_official(without("blocks.1.mlp.fc2.bias"), overrides={"num_attention_heads": HEADS})


# --- what is refused


def without(key: str) -> State:
    return {name: value for name, value in OFFICIAL.items() if name != key}


def replaced(key: str, value: Tensor) -> State:
    return {**OFFICIAL, key: value}


STATES: dict[str, tuple[State, str]] = {
    "unknown key": (replaced("decoder.weight", torch.zeros(1)), "unexpected key 'decoder.weight'"),
    "unknown part of a block": (
        replaced("blocks.0.attn.q_norm.weight", torch.zeros(1)),
        "unexpected key 'blocks.0.attn.q_norm.weight'",
    ),
    "block without a number": (replaced("blocks.x.mlp.fc1.weight", torch.zeros(1)), "unexpected key 'blocks.x"),
    "block far away": (
        replaced("blocks.999999999.mlp.fc2.bias", torch.zeros(48)),
        r"missing transformer_blocks\.2\.",
    ),
    "missing block": ({k: v for k, v in OFFICIAL.items() if "blocks.0." not in k}, r"\['blocks\.0\..*missing"),
    "missing key": (without("blocks.1.mlp.fc1.bias"), r"1 misfits.*missing transformer_blocks\.1\.ff\.net\.0"),
    "missing hidden width": (without("blocks.0.mlp.fc1.weight"), r"not an official.*blocks\.0\.mlp\.fc1\.weight"),
    "missing table": (without("pos_embed"), r"not an official SiT or DiT checkpoint: \['pos_embed'\] missing"),
    "foreign network": ({"conv1.weight": torch.zeros(8, 3, 7, 7)}, r"not an official.*it has \['conv1\.weight'\]"),
    "wrong shape": (
        replaced("blocks.0.mlp.fc2.weight", torch.zeros(48, 7)),
        r"checkpoint \(48, 7\), model \(48, 192\)",
    ),
    "wrong number of axes": (replaced("x_embedder.proj.weight", torch.zeros(48)), r"x_embedder\.proj\.weight \(48,\)"),
    "scalar": (replaced("pos_embed", torch.zeros(())), r"unexpected shapes: pos_embed \(\)"),
    "no elements": (replaced("x_embedder.proj.weight", torch.zeros(48, 4, 0, 0)), "unexpected shapes: x_embedder"),
    "not three parts": (replaced("blocks.1.attn.qkv.weight", torch.zeros(7, 48)), "must stack query, key and value"),
    "table of another grid": (replaced("pos_embed", torch.zeros(1, 15, 48)), r"pos_embed: checkpoint \(1, 15, 48\)"),
}


@pytest.mark.parametrize("case", STATES)
def test_weights_that_do_not_fit(case: str) -> None:
    state, message = STATES[case]
    with pytest.raises(CheckpointError, match=message):
        load(state)


def test_unknown_width_needs_the_heads() -> None:
    with pytest.raises(CheckpointError, match=r"how many heads a width of 48 has; pass num_attention_heads="):
        SiTTransformer2DModel.from_official(OFFICIAL)
    with pytest.raises(CheckpointError, match="num_attention_heads=5 does not divide the width of the weights, 48"):
        load(OFFICIAL, num_attention_heads=5)


class Hostile:
    """Pickles into a call that makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


class Foreign:
    """A harmless class that no checkpoint of ours holds."""


def torch_file(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def truncated(path: Path) -> None:
    torch.save(OFFICIAL, path)
    path.write_bytes(path.read_bytes()[:100_000])


def truncated_safetensors(path: Path) -> None:
    save_file(OFFICIAL, path)
    path.write_bytes(path.read_bytes()[:100_000])


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": ("a.pt", truncated, "cannot read .*truncated"),
    "truncated safetensors": ("a.safetensors", truncated_safetensors, "cannot read .*truncated"),
    "empty": ("a.pt", lambda path: path.write_bytes(b""), "cannot read"),
    "text": ("a.pt", lambda path: path.write_text("hello, I am a model\n"), "cannot read"),
    "text named safetensors": ("a.safetensors", lambda path: path.write_text("hello"), "cannot read"),
    "foreign object": ("a.pt", torch_file({"ema": OFFICIAL, "x": Foreign()}), "objects other than tensors"),
    "a tensor": ("a.pt", torch_file(torch.zeros(3)), "holds a Tensor, not a dictionary of tensors"),
    "a list": ("a.pt", torch_file([torch.zeros(3)]), "holds a list, not a dictionary of tensors"),
    "no tensors": ("a.pt", torch_file({"epoch": 3, "loss": 0.1}), "is not a state dict.*which="),
    "empty dictionary": ("a.pt", torch_file({}), "is not a state dict"),
    "tensors beside numbers": ("a.pt", torch_file({**OFFICIAL, "epoch": 3}), "is not a state dict"),
    "empty ema": ("a.pt", torch_file({"ema": {}, "model": OFFICIAL}), "is not a state dict"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_checkpoints(case: str, tmp_path: Path) -> None:
    name, write, message = FILES[case]
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_hostile_file_is_not_executed(legacy: bool, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    content = {"ema": OFFICIAL, "args": Hostile(witness)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="never executed"):
        load(tmp_path / "a.pt")
    assert not witness.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the trap does work
    assert witness.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_files_give_the_same_error_wherever_they_are_damaged(legacy: bool, tmp_path: Path) -> None:
    """Cut at random places, and with random bytes in the part that says what the file holds."""
    path, chance = tmp_path / "a.pt", random.Random(0)
    torch.save({"ema": OFFICIAL, "args": TRAINING["args"]}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for attempt in range(40):
        damaged = bytearray(whole)
        if attempt % 2:
            del damaged[chance.randrange(4000 if attempt % 4 == 1 else len(whole)) :]
        else:
            for _ in range(8):
                damaged[chance.randrange(4000)] = chance.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            load_official_state(path)  # a flipped bit may hit nothing that matters
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "folder.pt"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(
        WeightsNotFoundError, match=r"no checkpoint at .*; give the path of a \.pt or \.safetensors file"
    ):
        load(tmp_path / name)


def test_missing_entry(tmp_path: Path) -> None:
    torch.save(TRAINING, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"has no entry 'ema2'; it has \['args', 'ema', 'model', 'opt'\]"):
        load(tmp_path / "a.pt", which="ema2")


def test_weights_without_an_official_name_are_not_dropped() -> None:
    """An adapter that is neither merged nor unloaded would be lost."""
    network = latent_sit()
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"has no name in the official layout; merge or unload adapters"):
        network.to_official()
