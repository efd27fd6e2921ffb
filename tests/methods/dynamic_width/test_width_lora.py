"""A user's LoRA on a pipeline that runs with dynamic width and a TD-LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import flowaccel
import tiny
from dynamic_networks import SIZES, dynamic, random_experts, relative
from flowaccel.methods.dynamic_width.accelerator import DynamicWidth
from flowaccel.methods.dynamic_width.adapter import WidthAdapter, add_timed_lora

FILE = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}


def images(pipe: Any, batch: int = 2) -> Tensor:
    made: Tensor = pipe(**tiny.sd3_arguments(batch)).images
    return made


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A folder with a LoRA that was trained on the stock network."""
    pipe = tiny.sd3_pipeline(**SIZES)
    targets = ["to_k", "to_out.0", "ff.net.2", "linear"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    return tmp_path


def test_loaded_scaled_fused_deleted_restored(lora: Path) -> None:
    pipe = tiny.sd3_pipeline(**SIZES)
    stock = images(pipe)
    trained = dynamic(tiny.sd3_pipeline(**SIZES).transformer)
    add_timed_lora(trained)
    random_experts(trained)
    network = WidthAdapter.of(trained).apply(pipe.transformer).eval()
    flowaccel.accelerate(pipe, DynamicWidth(network=network))
    without = images(pipe)
    assert relative(without, stock) > 1e-2

    pipe.load_lora_weights(lora, adapter_name="style", **FILE)
    whole = images(pipe)
    assert relative(whole, without) > 1e-2
    assert relative(images(pipe, 1), whole[:1]) < 1e-5
    pipe.set_adapters(["style"], [0.5])
    half = images(pipe)
    assert relative(half, whole) > 1e-3
    pipe.fuse_lora(components=["transformer"], adapter_names=["style"])
    assert relative(images(pipe), half) < 1e-5
    pipe.unfuse_lora(components=["transformer"])
    assert relative(images(pipe), half) < 1e-5
    pipe.delete_adapters("style")
    assert relative(images(pipe), without) < 1e-5
    flowaccel.restore(pipe)
    assert relative(images(pipe), stock) < 1e-5  # unfusing is exact but for rounding, and the weights are shared


def test_a_lora_that_was_there_before_goes_along(lora: Path) -> None:
    network = dynamic(tiny.sd3_pipeline(**SIZES).transformer)
    pipe = tiny.sd3_pipeline(**SIZES)
    pipe.load_lora_weights(lora, adapter_name="style", **FILE)
    stock = images(pipe)
    adapter = WidthAdapter.of(network)
    flowaccel.accelerate(pipe, DynamicWidth(network=adapter.apply(pipe.transformer).eval()))
    found = images(pipe)
    pipe.delete_adapters("style")
    assert relative(images(pipe), found) > 1e-2
    flowaccel.restore(pipe)
    assert torch.equal(images(pipe), stock)
