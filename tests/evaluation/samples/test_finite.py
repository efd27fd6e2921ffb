"""NaN and infinity: in weights, in samples, and in what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from commands import fails, run
from flowaccel import CheckpointError, Recipe, VelocityRefiner, accelerated
from flowaccel.cli.generate import as_pil
from flowaccel.evaluation import Classes, Protocol
from flowaccel.evaluation.protocol import call
from flowaccel.evaluation.samples.finite import check_samples
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.models.weights import is_finite, not_finite
from flowaccel.training.sampling import Sampling

NAME = "proj_out.bias"


@pytest.fixture
def pipe() -> Any:
    return tiny.sit_pipeline(num_layers=1)


def spoilt(network: torch.nn.Module, value: float = float("nan")) -> None:
    with torch.no_grad():
        network.get_parameter(NAME)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    assert is_finite(torch.full((2, 3), 3.0).to(dtype))
    assert not is_finite(torch.tensor([1.0, value]).to(dtype))


@pytest.mark.parametrize("values", [torch.ones(2, dtype=torch.int64), torch.empty(0), torch.ones(2, device="meta")])
def test_values_that_cannot_be_otherwise(values: torch.Tensor) -> None:
    assert is_finite(values)


# --- samples


def test_evaluation_refuses_what_it_would_round_to_black(pipe: Any) -> None:
    protocol = Protocol(conditions=Classes((0,)), steps=1)
    call(pipe, protocol, [4, 5], 1)
    spoilt(pipe.transformer)
    with pytest.raises(FloatingPointError, match=rf"sample 4 .*\(2 of the 2 .* {NAME} in the weights of transformer"):
        call(pipe, protocol, [4, 5], 1)


def test_calibration_refuses_it_too(pipe: Any) -> None:
    spoilt(pipe.transformer)
    sampling = Sampling(conditions=Classes((0,)), steps=1, num_samples=3, first=7)
    with pytest.raises(FloatingPointError, match="sample 7 holds NaN"):
        list(sampling.run(pipe, lambda *_: None, "runs"))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_the_samples_that_are_not_finite_are_named(pipe: Any, kind: Callable[[Any], Any]) -> None:
    made = np.zeros((4, 2, 2, 3))
    check_samples(pipe, kind(made), range(4))
    made[2, 0, 0, 0] = np.inf
    with pytest.raises(FloatingPointError, match=r"sample 12 .*\(1 of the 4 .*arguments or the scheduler"):
        check_samples(pipe, kind(made), range(10, 14))


def test_the_cause_is_looked_for(pipe: Any) -> None:
    nan = np.full((1, 2, 2, 1), np.nan)
    with accelerated(pipe, Recipe()), pytest.raises(FloatingPointError, match="without the recipe"):
        check_samples(pipe, nan, [0])
    with pytest.raises(FloatingPointError, match="float16 overflows"):
        check_samples(pipe.to(torch.float16), nan, [0])


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_commands_say_so_and_write_no_sample(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny.save_sit_pipeline(tmp_path / "pipe", num_layers=1)
    options = ["--classes", "0,1", "--steps", "1", "--device", "cpu", "--out", "out"]
    if command == "evaluate":
        options += ["--features", "zoo:digits-features", "--reference", "zoo:digits", "--num-samples", "2"]
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[NAME][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    assert f"{NAME} in the weights of transformer" in fails(command, str(folder), *options, code=1)
    assert not [path for path in Path("out").rglob("*") if path.suffix in (".png", ".tmp")]


def test_generated_images_are_those_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` rounds numbers itself."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sit_pipeline(num_layers=1)
    arguments = {"num_inference_steps": 1, "class_labels": [1]}
    wanted, numbers = (
        pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type=kind).images for kind in ("pil", "np")
    )
    assert as_pil(numbers[0])[0].tobytes() == wanted[0].tobytes()
    assert as_pil(wanted[0]) == [wanted[0]]
    video = np.stack([numbers[0], numbers[0] * 0])
    assert [frame.size for frame in as_pil(video)] == [wanted[0].size] * 2


def test_samples_that_are_left_out_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(tiny.save_sit_pipeline(tmp_path / "pipe", num_layers=1))
    result = run("generate", folder, "--classes", "0-4", "--num-images", "2", "--steps", "1", "--out", "out")
    assert "only the first 2 of 5 prompts or classes" in result.stderr
    assert len(list(Path("out").glob("*.png"))) == 2
    assert all(isinstance(Image.open(path), Image.Image) for path in Path("out").glob("*.png"))


# --- learned parts


def test_a_learned_part_that_is_not_finite_is_refused(pipe: Any, tmp_path: Path) -> None:
    refiner = tiny.random_refiner(pipe.transformer)
    assert not_finite(refiner) is None
    spoilt(refiner, float("inf"))
    tiny.flowturbo(refiner).save_pretrained(tmp_path / "recipe")
    recipe = Recipe.from_pretrained(tmp_path / "recipe")
    with pytest.raises(CheckpointError, match=rf"refiner are damaged: {NAME} holds NaN or infinity"):
        recipe.loaded(pipe)
    assert not_finite(next(a for a in tiny.flowturbo(refiner).accelerators if isinstance(a, VelocityRefiner)).refiner)


def test_a_variant_that_is_not_finite_is_refused(pipe: Any, tmp_path: Path) -> None:
    from flowaccel import Mediators

    network = MediatorSiTTransformer2DModel.from_base(pipe.transformer, {"counts": [1, 4]})
    spoilt(network)
    network.save_pretrained(tmp_path / "mediators")
    with pytest.raises(CheckpointError, match=rf"mediators are damaged: {NAME}"):
        Mediators(network=tmp_path / "mediators").loaded(pipe)
