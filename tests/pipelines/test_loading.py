"""`load_pipeline`: what it loads, and one clear error for everything else. The tests run without the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

import tiny
from flowaccel import SiTPipeline, UnsupportedModelError, WeightsNotFoundError
from flowaccel.pipelines import load_pipeline
from tiny import autoencoder, latent_sit_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    latent_sit_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipe"))


@pytest.mark.parametrize("kind", [str, Path])
def test_folder(saved: Path, kind: type) -> None:
    pipe = load_pipeline(kind(saved))
    assert type(pipe) is SiTPipeline
    assert pipe.transformer.dtype == torch.float32
    assert load_pipeline(saved, torch_dtype=torch.bfloat16, device="cpu").transformer.dtype == torch.bfloat16


@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_deprecated_argument(saved: Path) -> None:
    load_pipeline(saved, torch_dtype=torch.float32)


def test_stock_classes(tmp_path: Path) -> None:
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, num_embeds_ada_norm=3
    )
    DiTPipeline(network, autoencoder(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path)) is DiTPipeline


def test_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"is not a pipeline: it has no model_index.json"):
        load_pipeline(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsNotFoundError, match=r"is not a pipeline: it has no model_index.json"):
        load_pipeline(tmp_path / "file")


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "WonderPipeline"},
        {"_class_name": ["pipeline", "RemotePipeline"]},
        {"_class_name": "UNet2DModel"},
        {"_class_name": "logging"},
        {},
        ["SiTPipeline"],
    ],
    ids=str,
)
def test_class_that_is_no_pipeline(index: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UnsupportedModelError, match=r"needs the class .* which is no pipeline of flowaccel or diffusers"
    ):
        load_pipeline(tmp_path)


def test_damaged_index(copy: Path) -> None:
    (copy / "model_index.json").write_text("{")
    with pytest.raises(WeightsNotFoundError, match=r"the folder is incomplete or damaged .*not a valid JSON"):
        load_pipeline(copy)


def test_missing_and_truncated_weights(copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[:1000])
    with pytest.raises(WeightsNotFoundError, match=r"the folder is incomplete or damaged .*safetensors"):
        load_pipeline(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(WeightsNotFoundError, match=r"the folder is incomplete or damaged .*safetensors"):
        load_pipeline(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    """diffusers would take a .bin file where the safetensors file is missing."""
    state = latent_sit_pipeline().transformer.state_dict()
    torch.save(state, copy / "transformer" / "diffusion_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(WeightsNotFoundError, match=r"the folder is incomplete or damaged .*safetensors"):
        load_pipeline(copy)


def test_modules_named_by_the_folder_are_not_imported(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"transformer": ["antigravity", "Network"]}))
    with pytest.raises(ValueError, match=r"needs antigravity\.Network .* no other module is imported"):
        load_pipeline(copy)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "./no/such/folder"])
def test_neither_a_folder_nor_on_the_hub(name: str) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"it is no folder here, and the Hub did not give it.*download it"):
        load_pipeline(name)


def test_text_encoders_that_a_saved_pipeline_lacks(tmp_path: Path) -> None:
    """diffusers itself saves such a pipeline and cannot load it without `text_encoder_3=None`."""
    pipe = tiny.sd3_pipeline()
    pipe.save_pretrained(tmp_path / "sd3")
    loaded = load_pipeline(tmp_path / "sd3")
    assert loaded.text_encoder_3 is None and loaded.tokenizer is None
    arguments = tiny.sd3_arguments(steps=2)
    assert torch.equal(loaded(**arguments).images, pipe(**tiny.sd3_arguments(steps=2)).images)
