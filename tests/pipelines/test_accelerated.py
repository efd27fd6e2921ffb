"""`AcceleratedPipeline`, and that what was saved loads and gives the same image in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import flowaccel
import tiny
from flowaccel import (
    FlowTurboScheduler,
    Recipe,
    RecipeConflictError,
    SiTPipeline,
    UnsupportedModelError,
    WeightsNotFoundError,
    accelerate,
    accelerated,
    is_accelerated,
    restore,
    zoo,
)
from flowaccel.pipelines import AcceleratedPipeline, load_pipeline
from flowaccel.recipe import FILE_NAME
from flowaccel.samplers import FlowRungeKuttaScheduler
from tiers import Process

# stock SD3 wants to be told that it has none
BARE: dict[str, Any] = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerated_pipeline.py"


def sit_image(pipe: Any) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(1)]
    return pipe(3, num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock pipeline saved while FlowTurbo with a refiner was on; beside it what it gave, accelerated and not."""
    folder = tmp_path_factory.mktemp("sd3") / "pipe"
    pipe = tiny.sd3_pipeline()
    torch.save(pipe(**tiny.sd3_arguments()).images, folder.parent / "plain.pt")
    with accelerated(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer))):
        pipe.save_pretrained(folder)
        torch.save(pipe(**tiny.sd3_arguments()).images, folder.parent / "accelerated.pt")
    return folder


@pytest.fixture(scope="module")
def sit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sit") / "pipe"
    pipe = tiny.sit_pipeline()
    with accelerated(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer))):
        pipe.save_pretrained(folder)
        torch.save(sit_image(pipe), folder.parent / "accelerated.pt")
    return folder


@pytest.fixture(scope="module")
def own_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "pipe"
    pipe = tiny.sd3_pipeline()
    pipe.scheduler = FlowRungeKuttaScheduler("heun", shift=3.0)
    pipe.save_pretrained(folder)
    return folder


def expected(folder: Path, name: str = "accelerated") -> torch.Tensor:
    return torch.load(folder.parent / f"{name}.pt", weights_only=True)


def test_takes_the_recipe_beside_the_components(sd3: Path) -> None:
    pipe = AcceleratedPipeline.from_pretrained(sd3, **BARE)
    assert type(pipe) is StableDiffusion3Pipeline
    assert isinstance(pipe.scheduler, FlowTurboScheduler)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(**tiny.sd3_arguments()).images, expected(sd3))
    assert type(restore(pipe).scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(pipe(**tiny.sd3_arguments()).images, expected(sd3, "plain"))


def test_given_recipe_comes_first(sd3: Path) -> None:
    pipe: Any = AcceleratedPipeline.from_pretrained(str(sd3), recipe="ab2", **BARE)
    assert type(pipe.scheduler).__name__ == "FlowAdamsBashforthScheduler"
    assert type(AcceleratedPipeline.from_pretrained(sd3, Recipe(), **BARE).scheduler) is FlowMatchEulerDiscreteScheduler


def test_without_any_recipe_it_is_the_pipeline(own_scheduler: Path) -> None:
    assert not is_accelerated(AcceleratedPipeline.from_pretrained(own_scheduler, **BARE))


def test_own_class(sit: Path) -> None:
    pipe = AcceleratedPipeline.from_pretrained(sit)
    assert type(pipe) is SiTPipeline
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(sit_image(pipe), expected(sit))


def test_arguments_pass_through(sd3: Path, tmp_path: Path) -> None:
    other = tiny.sd3_pipeline(seed=8).transformer
    pipe: Any = AcceleratedPipeline.from_pretrained(sd3, transformer=other, **BARE)
    assert pipe.transformer is other
    tiny.sd3_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert AcceleratedPipeline.from_pretrained(tmp_path, variant="fp16", local_files_only=True, **BARE)
    with pytest.raises(WeightsNotFoundError, match="incomplete or damaged"):
        AcceleratedPipeline.from_pretrained(tmp_path, **BARE)
    with pytest.raises(RecipeConflictError, match="carries parts that were made for a SD3Transformer2DModel"):
        AcceleratedPipeline.from_pretrained(sd3, transformer=tiny.sd3_pipeline(num_layers=2).transformer, **BARE)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(name: str, sd3: Path) -> None:
    pipe: Any = AcceleratedPipeline.from_pretrained(sd3, **{name: torch.bfloat16}, **BARE)
    assert pipe.transformer.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) else value
        for key, value in tiny.sd3_arguments().items()
    }
    assert torch.isfinite(pipe(**arguments).images).all()


def test_two_dtypes(sd3: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float16 and torch_dtype is torch\.bfloat16; give one"):
        AcceleratedPipeline.from_pretrained(sd3, torch_dtype=torch.bfloat16, dtype=torch.float16)


def test_it_has_no_instances() -> None:
    with pytest.raises(TypeError, match=r"call AcceleratedPipeline\.from_pretrained\(path_or_id, recipe=\.\.\.\), or"):
        AcceleratedPipeline(transformer=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_safetensors": False}, "use_safetensors=False is not allowed: flowaccel reads safetensors and JSON only"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not allowed: .* runs no foreign code"),
        ({"custom_pipeline": "x"}, "custom_pipeline is not allowed: flowaccel runs no code that comes with weights"),
    ],
)
def test_pickles_and_foreign_code_are_refused(arguments: dict[str, Any], message: str, sd3: Path) -> None:
    for load in (AcceleratedPipeline.from_pretrained, load_pipeline):
        with pytest.raises(ValueError, match=message):
            load(sd3, **arguments)


def test_misspelt_recipe_is_found_before_loading(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)
    with pytest.raises(ValueError, match="unknown recipe 'huen': did you mean 'heun'"):
        AcceleratedPipeline.from_pretrained(sd3, recipe="huen")


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"is not a pipeline: it has no model_index\.json"):
        AcceleratedPipeline.from_pretrained(tmp_path)
    with pytest.raises(WeightsNotFoundError, match="no folder here, and the Hub did not give it"):
        AcceleratedPipeline.from_pretrained("nobody/nothing-here")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WonderPipeline"}')
    with pytest.raises(UnsupportedModelError, match="needs the class 'WonderPipeline'"):
        AcceleratedPipeline.from_pretrained(tmp_path)


def test_a_bad_recipe_beside_the_components_is_an_error(sd3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3, tmp_path / "pipe"))
    data = json.loads((folder / FILE_NAME).read_text())
    data["accelerators"][1]["refiner"] = str(sd3 / "refiner")
    (folder / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"accelerators\[1\]\.refiner: .* leads out of the recipe's folder"):
        AcceleratedPipeline.from_pretrained(folder, **BARE)


def test_the_hub_is_asked_for_the_recipe_too(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((repo_id, allow_patterns[0], options.get("token")))
        return str(sd3)

    real = DiffusionPipeline.load_config.__func__
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(DiffusionPipeline, "load_config", classmethod(lambda cls, path, **_: real(cls, str(sd3))))
    monkeypatch.setattr(DiffusionPipeline, "download", classmethod(lambda cls, path, **_: str(sd3)))
    pipe: Any = AcceleratedPipeline.from_pretrained("me/sd3", token="t", **BARE)
    assert isinstance(pipe.scheduler, FlowTurboScheduler)
    assert asked == [("me/sd3", FILE_NAME, "t")] * 2 + [("me/sd3", "refiner/*.json", "t")]


# fresh processes


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "BARE": json.dumps(BARE)}


WITHOUT_FLOWACCEL = """
import json, os, sys
bare = json.loads(os.environ["BARE"])
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], **bare)
assert type(pipe).__name__ == "StableDiffusion3Pipeline"
assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 3.0
try:
    DiffusionPipeline.from_pretrained(sys.argv[2], **bare)
except ValueError as error:
    assert "import flowaccel before calling `from_pretrained`" in str(error), error
else:
    raise AssertionError("no error")
assert "flowaccel" not in sys.modules
"""

WITH_FLOWACCEL = """
import json, os, sys, torch
bare = json.loads(os.environ["BARE"])
import flowaccel
from diffusers import DiffusionPipeline
own = DiffusionPipeline.from_pretrained(sys.argv[2], **bare)
assert type(own.scheduler) is flowaccel.FlowRungeKuttaScheduler and own.scheduler.config.solver == "heun"
plain = flowaccel.SiTPipeline.from_pretrained(sys.argv[3])
assert type(plain.transformer) is flowaccel.SiTTransformer2DModel

from flowaccel.pipelines import AcceleratedPipeline
import tiny
sd3 = AcceleratedPipeline.from_pretrained(sys.argv[1], **bare)
sit = AcceleratedPipeline.from_pretrained(sys.argv[3])
for pipe in (sd3, sit):
    pipe.set_progress_bar_config(disable=True)
torch.save(sd3(**tiny.sd3_arguments()).images, sys.argv[4])
generator = [torch.Generator().manual_seed(1)]
made = sit(3, num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="pt").images
torch.save(made, sys.argv[5])
"""


def test_plain_diffusers_reads_the_folder(sd3: Path, own_scheduler: Path, process: Process) -> None:
    process("-c", WITHOUT_FLOWACCEL, sd3, own_scheduler, env=environment(), cwd=sd3.parent)


def test_a_fresh_process_makes_the_same_images(
    sd3: Path, own_scheduler: Path, sit: Path, tmp_path: Path, process: Process
) -> None:
    files = (tmp_path / "sd3.pt", tmp_path / "sit.pt")
    process("-c", WITH_FLOWACCEL, sd3, own_scheduler, sit, *files, env=environment(), cwd=sd3.parent)
    for folder, name in ((sd3, "sd3.pt"), (sit, "sit.pt")):
        assert torch.equal(torch.load(tmp_path / name, weights_only=True), expected(folder))


def test_example(tmp_path: Path, process: Process) -> None:
    ended = process(EXAMPLE, cwd=tmp_path)
    assert "saved and loaded, it gives the same images" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accelerated.png", "restored.png"]


def test_saved_pipeline_can_be_accelerated_by_its_own_folder(sit: Path) -> None:
    """The folder is a pipeline and a recipe in one."""
    pipe = SiTPipeline.from_pretrained(sit)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(sit_image(accelerate(pipe, sit)), expected(sit))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *(entry.name for entry in zoo.ENTRIES.values() if entry.kind == "recipe")])
def test_recipes_of_the_zoo_in_bfloat16(name: str | None) -> None:
    recipe = None if name is None else zoo.recipe_folder(name)
    pipe: Any = AcceleratedPipeline.from_pretrained(zoo.folder("sit-digits"), recipe, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    latents = pipe([3], num_inference_steps=2, generator=generator, output_type="latent").images
    assert torch.isfinite(latents).all()


def test_the_zoo_in_python() -> None:
    """`zoo:NAME` is a pipeline or a recipe wherever one is named."""
    pipe = AcceleratedPipeline.from_pretrained("zoo:sit-digits", recipe="ab2")
    assert flowaccel.is_accelerated(pipe) and type(pipe).__name__ == "SiTPipeline"
    flowaccel.restore(pipe)
    with flowaccel.accelerated(pipe, "zoo:sit-digits-width"):
        assert flowaccel.recipe.recipe_of(pipe).accelerators[0].name == "dynamic_width"
    with flowaccel.accelerated(pipe, "ab2@4+zoo:sit-digits-mediators"):
        assert flowaccel.recipe.recipe_of(pipe).name == "ab2@4+zoo:sit-digits-mediators"
    with pytest.raises(ValueError, match="unknown zoo entry 'zoo:sit-digit': did you mean 'zoo:sit-digits'"):
        AcceleratedPipeline.from_pretrained("zoo:sit-digit")
    with pytest.raises(ValueError, match="zoo:sit-digits is a pipeline, not a recipe"):
        flowaccel.accelerate(pipe, "zoo:sit-digits")
