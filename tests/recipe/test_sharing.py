"""Saving, the Hub (its client replaced), what a recipe was made for, and files that mean harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

import tiny
from flowaccel import (
    CheckpointError,
    Recipe,
    RecipeConflictError,
    Sampler,
    UnsupportedModelError,
    VelocityRefiner,
    WeightsNotFoundError,
    accelerate,
    accelerated,
    is_accelerated,
    restore,
)
from flowaccel.recipe import FILE_NAME, Base, resolve, saved_recipe

WEIGHTS = "refiner/diffusion_pytorch_model.safetensors"
PARTS = {f"refiner/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}


def image(pipe: Any) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(1)]
    return pipe(3, num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="pt").images


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pipe = tiny.sit_pipeline()
    recipe = tiny.flowturbo(tiny.random_refiner(pipe.transformer)).for_pipeline(pipe)
    recipe.save_pretrained(tmp_path / "recipe")
    return tmp_path / "recipe"


# saving


def test_files_written_before_there_was_a_base_are_read(tmp_path: Path) -> None:
    """Word for word what the first version of flowaccel wrote."""
    (tmp_path / FILE_NAME).write_text(
        '{"schema": 1, "name": "flowturbo-H2P4R2", "num_inference_steps": 8, "accelerators": ['
        '{"name": "sampler", "sampler": "flowturbo", "options": {"blocks": "H2P4R2", "refiner_mode": "released"}},'
        '{"name": "velocity_refiner", "refiner": null}]}'
    )
    assert Recipe.from_pretrained(tmp_path) == resolve("flowturbo-H2P4R2")


def test_saving_again_replaces_parts_and_keeps_the_rest(saved: Path) -> None:
    before = files(saved)
    (saved / "notes.txt").write_text("mine")
    (saved / "refiner" / "stale.json").write_text("{}")
    other = tiny.random_refiner(tiny.sit_network(), seed=5)
    tiny.flowturbo(other).save_pretrained(saved)
    after = files(saved)
    assert set(after) == set(before) | {"notes.txt"}
    assert after[WEIGHTS] != before[WEIGHTS]


@pytest.mark.parametrize("breaking", ["part", "json"])
def test_a_failed_save_changes_nothing(breaking: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(saved)
    refiner = tiny.random_refiner(tiny.sit_network(), seed=5)
    recipe = tiny.flowturbo(refiner)

    def half(folder: Path, **_: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{")
        raise OSError("disk full")

    if breaking == "part":
        monkeypatch.setattr(refiner, "save_pretrained", half)
    else:
        monkeypatch.setattr(json, "dumps", lambda *_, **__: half(saved.parent / "other"))
    for target in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="disk full"):
            recipe.save_pretrained(target)
        shutil.rmtree(saved.parent / "other", ignore_errors=True)
    assert files(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["recipe"]


def test_a_recipe_can_be_saved_over_the_parts_it_reads(saved: Path) -> None:
    before = files(saved)
    Recipe.from_pretrained(saved).save_pretrained(saved)
    assert set(files(saved)) == set(before)
    assert files(saved)[WEIGHTS] == before[WEIGHTS]


# what it was made for


def test_base_is_recorded_where_something_was_learned(saved: Path) -> None:
    data = json.loads((saved / FILE_NAME).read_text())
    assert data["base"]["class"] == "SiTTransformer2DModel"
    assert len(data["base"]["config"]) == 12
    assert resolve("heun").for_pipeline(tiny.sit_pipeline()).base is None
    assert Recipe.from_pretrained(saved).base == Base.of(tiny.sit_pipeline(seed=9))  # weights may differ


def test_base_survives_saving_and_loading_the_network(tmp_path: Path) -> None:
    pipe = tiny.sd3_pipeline(dual_attention_layers=(0,))
    found = Base.of(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path)
    assert Base.of(pipe) == found
    pipe.transformer = tiny.sd3_pipeline(dual_attention_layers=()).transformer
    assert Base.of(pipe) != found


def test_base_leaves_out_defaults() -> None:
    """So that an argument that a later diffusers adds does not estrange old recipes."""
    pipe = tiny.sit_pipeline()
    found, config = Base.of(pipe), pipe.transformer.config

    def without(name: str) -> Base:
        pipe.transformer._internal_dict = type(config)({key: config[key] for key in config if key != name})
        return Base.of(pipe)

    assert config["mlp_ratio"] == 4.0  # its default
    assert without("mlp_ratio") == found
    assert without("_use_default_values") == found
    assert without("sample_size") != found


def test_another_network_is_refused(saved: Path) -> None:
    other = tiny.sit_pipeline(num_attention_heads=4)
    with pytest.raises(
        RecipeConflictError, match=r"'flowturbo-H1P2R2' carries parts .* for a SiTTransformer2DModel \(configuration \w"
    ):
        accelerate(other, saved)
    with pytest.raises(UnsupportedModelError, match=r"SiTTransformer2DModel \(.*\), but the Stable.* has a SD3Transfo"):
        accelerate(tiny.sd3_pipeline(), saved)
    assert not is_accelerated(other)
    accelerate(tiny.sit_pipeline(), saved)


# the Hub


class FakeHub:
    """`snapshot_download`, `create_repo` and `upload_folder` on a folder: OWNER/NAME below `root`."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache, self.calls = root, cache, []

    def snapshot_download(self, repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append(("download", repo_id, tuple(allow_patterns), options))
        if not (self.root / repo_id).is_dir():
            response: Any = SimpleNamespace(headers={}, request=None)
            raise RepositoryNotFoundError("404 Client Error.\nmore", response=response)
        target = self.cache / repo_id / "0a1b2c"
        target.mkdir(parents=True, exist_ok=True)
        for path in (self.root / repo_id).rglob("*"):
            name = path.relative_to(self.root / repo_id)
            if path.is_file() and any(name.match(pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        return str(target)

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", repo_id, options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.calls.append(("upload", repo_id, options))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://example/{repo_id}/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub", tmp_path / "cache")
    for name in ("snapshot_download", "create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def test_push_and_pull(hub: FakeHub) -> None:
    pipe = tiny.sit_pipeline()
    recipe = tiny.flowturbo(tiny.random_refiner(pipe.transformer))
    assert recipe.push_to_hub("me/fast", private=True, token="t", commit_message="m") == "https://example/me/fast/1"
    assert hub.calls[0] == ("create", "me/fast", {"private": True, "token": "t", "exist_ok": True})
    assert hub.calls[1][2] == {"token": "t", "commit_message": "m", "create_pr": False}
    assert set(files(hub.root / "me/fast")) == PARTS | {FILE_NAME}
    with accelerated(pipe, recipe):
        expected = image(pipe)
    with accelerated(pipe, "me/fast"):
        assert torch.equal(image(pipe), expected)


def test_only_json_and_safetensors_are_downloaded(hub: FakeHub, saved: Path) -> None:
    shutil.copytree(saved, hub.root / "me/fast")
    for name in ("refiner/diffusion_pytorch_model.bin", "refiner/code.py", "evil.py", "big/model.safetensors"):
        (hub.root / "me/fast" / name).parent.mkdir(exist_ok=True)
        (hub.root / "me/fast" / name).write_bytes(b"x")
    Recipe.from_pretrained("me/fast", revision="main", cache_dir="c", token="t")
    assert set(files(hub.cache)) == {f"me/fast/0a1b2c/{name}" for name in PARTS | {FILE_NAME}}
    first, second = hub.calls
    assert first[2:] == (
        (FILE_NAME,),
        {"revision": "main", "cache_dir": "c", "local_files_only": False, "token": "t"},
    )
    assert second[2] == ("refiner/*.json", "refiner/*.safetensors")
    assert second[3]["revision"] == "0a1b2c"  # the same commit, also if the branch moves meanwhile


def test_the_real_cache_is_read_without_network(saved: Path, tmp_path: Path) -> None:
    """The layout that huggingface_hub keeps: files are links to blobs outside the snapshot."""
    commit, repository = "a" * 40, tmp_path / "cache" / "models--me--fast"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for number, (name, content) in enumerate(files(saved).items()):
        blob, link = repository / "blobs" / str(number), repository / "snapshots" / commit / name
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    recipe = Recipe.from_pretrained("me/fast", cache_dir=tmp_path / "cache", local_files_only=True)
    assert recipe == Recipe(
        [recipe.accelerators[0], VelocityRefiner(repository / "snapshots" / commit / "refiner")],
        "flowturbo-H1P2R2",
        base=Base.of(tiny.sit_pipeline()),
    )
    accelerate(tiny.sit_pipeline(), recipe)
    assert saved_recipe("me/fast", cache_dir=tmp_path / "cache", local_files_only=True) == recipe


def test_save_and_push(hub: FakeHub, tmp_path: Path) -> None:
    recipe = resolve("heun@4")
    recipe.save_pretrained(tmp_path / "four", push_to_hub=True, repo_id="me/four", private=True)
    assert resolve("me/four") == recipe == Recipe.from_pretrained(tmp_path / "four")
    recipe.save_pretrained(tmp_path / "five", push_to_hub=True)
    assert hub.calls[-1][1] == "five"
    with pytest.raises(TypeError, match="save_pretrained takes private only with push_to_hub=True"):
        recipe.save_pretrained(tmp_path / "six", private=True)


def test_path_comes_before_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resolve("heun@4").push_to_hub("me/fast")
    resolve("heun@3").save_pretrained(tmp_path / "me" / "fast")
    assert resolve("me/fast").num_inference_steps == 3
    shutil.rmtree(tmp_path / "me")
    assert resolve("me/fast").num_inference_steps == 4


def test_hub_errors_list_what_was_tried(hub: FakeHub) -> None:
    with pytest.raises(
        WeightsNotFoundError,
        match=r"cannot get recipe 'me/none': there is no file or folder of that name here, "
        r"no preset \(none, ab_cache, .*\), "
        r"and on the Hub: the Hub did not give flowaccel.json of me/none \(RepositoryNotFoundError: 404 Client Error",
    ):
        resolve("me/none")
    (hub.root / "me/empty").mkdir(parents=True)
    with pytest.raises(WeightsNotFoundError, match=r"me/empty on the Hub holds no recipe: it has no flowaccel\.json"):
        resolve("me/empty")
    assert saved_recipe("me/empty") is None


def test_a_hub_recipe_cannot_leave_its_repository(hub: FakeHub, saved: Path) -> None:
    data = json.loads((saved / FILE_NAME).read_text())
    data["accelerators"][1]["refiner"] = "../../../recipe/refiner"
    (hub.root / "me/evil").mkdir(parents=True)
    (hub.root / "me/evil" / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"accelerators\[1\]\.refiner: .* leads out of the recipe's folder"):
        resolve("me/evil")
    assert len(hub.calls) == 1


def test_without_network_the_hub_is_one_clear_error() -> None:
    with pytest.raises(WeightsNotFoundError, match="cannot get recipe 'nobody/nothing-here'"):
        resolve("nobody/nothing-here")


# files that mean harm


class Boom:
    def __reduce__(self) -> Any:
        return (Path("boom").touch, ())


def truncated(recipe: Path) -> None:
    (recipe / WEIGHTS).write_bytes((recipe / WEIGHTS).read_bytes()[:500])


def pickled(recipe: Path) -> None:
    torch.save({"x": Boom()}, recipe / WEIGHTS)


def pickle_beside(recipe: Path) -> None:
    torch.save({"x": Boom()}, recipe / "refiner" / "diffusion_pytorch_model.bin")
    (recipe / WEIGHTS).unlink()


def remote_code(recipe: Path) -> None:
    config = json.loads((recipe / "refiner/config.json").read_text())
    config |= {"_class_name": "Evil", "auto_map": {"AutoModel": "evil.Evil"}}
    (recipe / "refiner/config.json").write_text(json.dumps(config))
    (recipe / "refiner/evil.py").write_text("open('boom', 'w')")


@pytest.mark.parametrize("harm", [truncated, pickled, pickle_beside, remote_code], ids=lambda harm: harm.__name__)
def test_damaged_and_hostile_parts(
    harm: Callable[[Path], None], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    harm(saved)
    pipe = tiny.sit_pipeline()
    untouched, state = image(pipe), tiny.snapshot(pipe)
    with pytest.raises(CheckpointError, match="refiner"):
        accelerate(pipe, saved)
    assert tiny.snapshot(pipe) == state
    assert torch.equal(image(pipe), untouched)
    assert not Path("boom").exists()


def test_missing_part_is_named(saved: Path) -> None:
    shutil.rmtree(saved / "refiner")
    with pytest.raises(
        WeightsNotFoundError,
        match=r"flowaccel\.json: accelerators\[1\]\.refiner: the learned part 'refiner' is missing",
    ):
        Recipe.from_pretrained(saved)


def test_restore_after_a_failed_detach_still_undoes_the_rest() -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)

    class Failing(VelocityRefiner):
        name = "failing"
        tags = frozenset({"hook"})  # not those of a refiner, which needs R steps

        def attach(self, pipe: Any) -> Any:
            return lambda: 1 / 0

        def loaded(self, pipe: Any) -> Any:
            return self

    accelerate(pipe, [Sampler("heun"), Failing()])
    with pytest.raises(ZeroDivisionError):
        restore(pipe)
    assert tiny.snapshot(pipe) == state
