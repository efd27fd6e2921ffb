"""`save_pretrained` of an accelerated pipeline: the components of before, the recipe, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler

import tiny
from flowaccel import Accelerator, Recipe, Sampler, accelerate, accelerated, is_accelerated, restore
from flowaccel.recipe import FILE_NAME, Method, registry
from flowaccel.samplers import FlowTurboScheduler


def saved_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_components_are_those_of_before(tmp_path: Path) -> None:
    pipe = tiny.sd3_pipeline()
    pipe.save_pretrained(tmp_path / "before")
    state = tiny.snapshot(pipe)
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer)))
    pipe.save_pretrained(tmp_path / "accelerated")
    assert isinstance(pipe.scheduler, FlowTurboScheduler)
    assert pipe.config["scheduler"] == ("flowaccel", "FlowTurboScheduler")
    before, found = saved_files(tmp_path / "before"), saved_files(tmp_path / "accelerated")
    extra = {name: found.pop(name) for name in set(found) - set(before)}
    assert found == before
    assert sorted(extra) == [FILE_NAME, "refiner/config.json", "refiner/diffusion_pytorch_model.safetensors"]
    assert json.loads(extra[FILE_NAME])["base"]["class"] == "SD3Transformer2DModel"
    restore(pipe)
    assert tiny.snapshot(pipe) == state
    assert "save_pretrained" not in vars(pipe)
    pipe.save_pretrained(tmp_path / "after")
    assert saved_files(tmp_path / "after") == before


class Wide(Accelerator):
    """A variant: another transformer, with a learned part that would like to be called like the old one."""

    name: ClassVar[str] = "wide"
    kind = "variant"

    def attach(self, pipe: Any) -> Any:
        old = pipe.transformer
        pipe.transformer = tiny.sit_network(seed=4)

        def detach() -> None:
            pipe.transformer = old

        return detach


def test_variants_are_saved_as_the_original(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(registry.register(Method(accelerators={"wide": Wide})))
    pipe = tiny.sit_pipeline()
    original = pipe.transformer
    with accelerated(pipe, Recipe([Wide(), Sampler("euler")])):
        variant, scheduler = pipe.transformer, pipe.scheduler
        pipe.save_pretrained(tmp_path)
        assert (pipe.transformer, pipe.scheduler) == (variant, scheduler)
    read = type(original).from_pretrained(tmp_path / "transformer")
    assert torch.equal(read.proj_out.weight, original.proj_out.weight)
    assert not torch.equal(read.proj_out.weight, variant.proj_out.weight)


def test_what_the_user_exchanged_meanwhile_is_saved_as_it_is(tmp_path: Path) -> None:
    pipe = tiny.sd3_pipeline()
    accelerate(pipe, "euler")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=7.0)
    pipe.save_pretrained(tmp_path)
    assert FlowMatchHeunDiscreteScheduler.from_pretrained(tmp_path / "scheduler").config.shift == 7.0


def test_a_refiner_beside_the_pipeline_travels(tmp_path: Path) -> None:
    tiny.save_sit_pipeline(tmp_path / "pipe")
    pipe = type(tiny.sit_pipeline()).from_pretrained(tmp_path / "pipe")
    with accelerated(pipe, "flowturbo-H1P2R2"):
        pipe.save_pretrained(tmp_path / "copy")
    (recipe,) = [Recipe.from_pretrained(tmp_path / "copy")]
    assert recipe.accelerators[1].refiner == tmp_path / "copy" / "refiner"
    assert recipe.name == "flowturbo-H1P2R2"


def test_arguments_pass_through(tmp_path: Path) -> None:
    pipe = tiny.sd3_pipeline()
    with accelerated(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer))):
        pipe.save_pretrained(tmp_path / "a", variant="fp16", max_shard_size="10KB")
        pipe.save_pretrained(tmp_path / "b", False)
        pipe.save_pretrained(save_directory=str(tmp_path / "c"))
    shards = [path.name for path in (tmp_path / "a" / "transformer").glob("*.fp16-0000*.safetensors")]
    assert len(shards) > 1
    assert (tmp_path / "b" / "transformer" / "diffusion_pytorch_model.bin").is_file()
    for name in "abc":
        assert (tmp_path / name / "refiner" / "diffusion_pytorch_model.safetensors").is_file()
        assert (tmp_path / name / FILE_NAME).is_file()


def test_push_to_hub_uploads_the_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sit_pipeline()
    seen: dict[str, Any] = {}

    def uploaded(self: Any, folder: Any, repo_id: str, **options: Any) -> None:
        seen.update(names={path.name for path in Path(folder).iterdir()}, repo_id=repo_id, **options)

    module = DiffusionPipeline.__module__
    monkeypatch.setattr(f"{module}.create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *_, **__: type("Card", (), {"save": print}))
    monkeypatch.setattr(f"{module}.populate_model_card", lambda card: card)
    monkeypatch.setattr(type(pipe), "_upload_folder", uploaded)
    with accelerated(pipe, "heun"):
        pipe.save_pretrained(str(tmp_path / "x"), push_to_hub=True, repo_id="me/x", commit_message="m")
    assert {FILE_NAME, "model_index.json", "transformer", "scheduler"} <= seen["names"]
    assert (seen["repo_id"], seen["commit_message"]) == ("me/x", "m")


def test_a_failed_save_leaves_the_pipeline_accelerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd3_pipeline()
    state = tiny.snapshot(pipe)
    accelerate(pipe, "heun")
    inside, scheduler = tiny.snapshot(pipe), pipe.scheduler

    def refuse(*_: Any, **__: Any) -> None:
        assert pipe.scheduler is scheduler, "a run in another thread would see it change"
        raise OSError("disk full")

    monkeypatch.setattr(pipe.transformer, "save_pretrained", refuse)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert pipe.scheduler is scheduler
    assert tiny.snapshot(pipe) == inside
    assert is_accelerated(pipe)
    restore(pipe)
    assert tiny.snapshot(pipe) == state
