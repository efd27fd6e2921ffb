"""Files that name code, other places or huge sizes: nothing of it is imported, called or made room for.

`evilmod` lies in the working directory and on `sys.path`; importing it leaves a marker.
"""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import shutil
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flowaccel.cli
import tiny
from commands import fails, run
from flowaccel import CheckpointError, Recipe, UnsupportedModelError, accelerate
from flowaccel.errors import FlowaccelError, UnnamedCodeError
from flowaccel.evaluation import compare_rows, load_features
from flowaccel.evaluation.baselines.baselines import calibrated_to
from flowaccel.evaluation.baselines.subprocess_worker import OwnProcess
from flowaccel.evaluation.features.extractors import runs_code
from flowaccel.evaluation.features.statistics import load_statistics
from flowaccel.evaluation.results import SCHEMA_VERSION
from flowaccel.pipelines import load_pipeline
from flowaccel.training.loop import resume_state

EVIL = """
from pathlib import Path
Path({marker!r}).touch()
import torch
class go(torch.nn.Module):
    def forward(self, images):
        return images.float().flatten(1)[:, :4]
"""
CODE = ["evilmod:go", "evilmod.go:now", "os:abort", "subprocess:Popen", "inception:evil.pt"]


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that is there once evil code has run; the test fails if it is there at its end."""
    found = tmp_path / "marker"
    (tmp_path / "evilmod.py").write_text(EVIL.format(marker=str(found)))
    torch.save({"evil": 1}, tmp_path / "evil.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: found.touch())
    yield found
    assert not found.exists()
    sys.modules.pop("evilmod", None)


def results(folder: Path, **protocol: Any) -> Path:
    """A run folder with a valid result file whose protocol is the given one."""
    metric = {"value": 1.0, "n": 4, "stderr": 0.1, "ci95": [0.8, 1.2], "higher_is_better": False, "display": "d"}
    row = {
        "num_inference_steps": 2,
        "nfe": 2,
        "latency_ms_per_image": {"median": 1.0, "p10": 1.0, "p90": 1.0, "rounds": 2},
        "speedup": {"wall_clock": {"value": 1.0, "ci95": [1.0, 1.0]}},
        "metrics": {"fid": metric},
    }
    own = {
        "dataset": "10 classes",
        "num_samples": 4,
        "seed": 0,
        "batch_size": 2,
        "feature_extractor": "zoo:digits-features",
        "fingerprint": "0" * 16,
        "reference": "zoo:digits",
        "metrics": ["fid"],
        "conditions": {"classes": [0]},
        "resamples": 20,
    }
    content = {
        "schema": SCHEMA_VERSION,
        "protocol": own | protocol,
        "environment": {},
        "rows": [{"recipe": name, **row} for name in ("baseline", "evil")],
    }
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


# --- result files


@pytest.mark.parametrize("option", ["features", "clip"])
@pytest.mark.parametrize("name", CODE)
def test_a_result_file_chooses_no_code(name: str, option: str, tmp_path: Path) -> None:
    stored = {"feature_extractor": name} if option == "features" else {"clip": name, "clip_fingerprint": "0" * 16}
    folder = results(tmp_path / "run", **stored)
    with pytest.raises(UnnamedCodeError, match=f"{option}={name!r}"):
        compare_rows(folder, "evil", "baseline")
    said = fails("compare", str(folder), "--a", "evil", "--b", "baseline", "--json")
    command = said.partition("name it yourself: ")[2]
    assert shlex.split(command)[-8:] == [str(folder), "--a", "evil", "--b", "baseline", "--json", f"--{option}", name]


def test_the_printed_command_goes_on(tmp_path: Path, marker: Path) -> None:
    folder = results(
        tmp_path / "run", feature_extractor="evilmod:go", fingerprint=load_features("evilmod:go").fingerprint
    )
    said = fails("compare", str(folder), "--a", "evil", "--b", "baseline")
    command = shlex.split(said.partition("name it yourself: ")[2])
    assert "000000.png is missing" in fails(*command[command.index("compare") :])  # past the network
    marker.unlink()


def test_another_name_than_that_of_the_run_is_refused(tmp_path: Path) -> None:
    folder = results(tmp_path / "run", feature_extractor="evilmod:go")
    with pytest.raises(ValueError, match=r"features must be the network of the run, which used 'evilmod:go'"):
        compare_rows(folder, "evil", "baseline", features="evilmod:stop")


@pytest.mark.parametrize(("name", "code"), [("inception", False), ("clip:folder", False), ("zoo:../evil", False)])
def test_what_names_data_runs_no_code(name: str, code: bool) -> None:
    assert runs_code(name) is code


def test_the_fingerprint_is_compared_before_torchscript_is_loaded() -> None:
    """`torch.jit.load` leaves the marker here."""
    with pytest.raises(ValueError, match=r"the run used inception:evil\.pt with fingerprint 00, here it has"):
        load_features("inception:evil.pt", expected="00")


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"feature_extractor": "zoo:../../evil"}, "unknown zoo entry"),
        ({"feature_extractor": 3}, "feature_extractor must be str"),
        ({"attributes": "evilmod:go", "metrics": ["attribute_accuracy"]}, "fingerprint 0000"),
        ({"metrics": ["evilmod:go"]}, "fingerprint 0000"),
        ({"resamples": 10**12}, "ask for 1000000000000 resamples"),
        ({"conditions": ["evilmod"]}, "conditions must be an object"),
    ],
    ids=str,
)
def test_other_values_of_a_result_file(protocol: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in fails("compare", str(results(tmp_path / "run", **protocol)), "--a", "evil", "--b", "baseline")


def test_a_result_file_that_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    assert "is not JSON" in fails("compare", str(tmp_path), "--a", "evil", "--b", "baseline")


# --- options in a YAML file


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("option", ["features", "clip"])
def test_a_yaml_file_chooses_no_code(name: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(json.dumps({option: name, "num_samples": 4}))
    said = fails("evaluate", "zoo:sit-digits", "--config", "options.yaml")
    assert shlex.split(said.partition("name it yourself: ")[2])[-5:] == [
        "zoo:sit-digits", "--config", "options.yaml", f"--{option}", name,
    ]  # fmt: skip


def test_yaml_makes_no_objects(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"features: !!python/object/apply:os.mknod [{marker}]")
    assert "is not YAML" in fails("evaluate", "zoo:sit-digits", "--config", "options.yaml")


# --- the working directory


@pytest.mark.parametrize("safe", [False, True])
def test_python_m_leaves_the_working_directory_off_the_path(
    safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` puts it first, unless it was told not to; what comes first then is to stay."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), "others"])
    monkeypatch.setattr(sys, "argv", ["-m", "recipes"])
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(safe_path=safe))
    names = {"__name__": "flowaccel", "__file__": flowaccel.__file__}
    exec(Path(flowaccel.__file__).read_text(), names)  # run_path would put its own argv in place
    assert sys.path == ([str(tmp_path), "others"] if safe else ["others"])


def test_a_command_leaves_the_working_directory_off_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "path", ["others"])
    monkeypatch.setattr(sys.modules["flowaccel.cli.app"], "app", lambda: seen.append(list(sys.path)))
    flowaccel.cli.main()
    assert seen == [["others"]]


def test_a_module_that_the_person_names_may_lie_in_the_working_directory(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.remove(str(tmp_path))
    tiny.photos(tmp_path / "photos", mode="L")
    said = fails("stats", "photos", "--features", "evilmod:missing", "--out", "photos.safetensors")
    assert "has no attribute 'missing'" in said
    assert str(tmp_path) not in sys.path
    run("stats", "photos", "--features", "evilmod:go", "--out", "photos.safetensors")
    marker.unlink()


def test_a_row_of_its_own_starts_without_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **_: started.append(command))
    process = object.__new__(OwnProcess)
    process._log = tmp_path / "row" / "process.log"
    process.__enter__()
    assert started[0][1] == "-P"


# --- pipelines


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sit_pipeline(tmp_path_factory.mktemp("pipe") / "pipe", num_layers=1)


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def index_of(*shards: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights = folder / "transformer/diffusion_pytorch_model.safetensors"
        weights.rename(folder / "other.safetensors")
        torch.save({}, folder / "transformer/evil.bin")
        content = {"metadata": {}, "weight_map": {f"p{i}": shard for i, shard in enumerate(shards)}}
        (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))

    return make


def component(*named: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder / "model_index.json", transformer=list(named))


def beside_the_weights(folder: Path) -> None:
    (folder / "transformer/evilmod.py").write_text((folder.parent / "evilmod.py").read_text())
    edited(folder / "model_index.json", transformer=["evilmod", "go"])


PIPELINES: dict[str, tuple[Callable[[Path], None], str]] = {
    "module": (component("evilmod", "go"), "no other module is imported"),
    "module beside the weights": (beside_the_weights, "no other module is imported"),
    "module that is imported already": (component("subprocess", "missing"), "no other module is imported"),
    "function": (component("os", "abort"), "no other module is imported"),
    "pipeline within": (component("diffusers", "DiffusionPipeline"), "no network, scheduler"),
    "onnx": (component("diffusers", "OnnxRuntimeModel"), "no network, scheduler"),
    "no class": (component("diffusers", None), "must name a library and a class"),
    "pipeline class": (lambda d: edited(d / "model_index.json", _class_name=["evilmod", "go"]), "needs the class"),
    "pickled shard": (index_of("evil.bin"), "must name .safetensors files beside it"),
    "shard elsewhere": (index_of("../other.safetensors"), "must name .safetensors files beside it"),
    "absolute shard": (index_of("/etc/evil.safetensors"), "must name .safetensors files beside it"),
    "no shards": (index_of(), "must name .safetensors files beside it"),
    "many layers": (
        lambda d: edited(d / "transformer/config.json", num_layers=10**9),
        "declares num_layers=1000000000",
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_pipeline_loads_or_is_one_clear_error(seed: int, saved_pipeline: Path, tmp_path: Path) -> None:
    """A few bytes of one file are others, or its end is missing."""
    folder, chance = Path(shutil.copytree(saved_pipeline, tmp_path / "pipe")), random.Random(seed)
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    else:
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(min(len(content), 4096))] = chance.randrange(256)
    file.write_bytes(content)
    with contextlib.suppress(FlowaccelError, ValueError, OSError):
        load_pipeline(folder)


@pytest.mark.parametrize("case", PIPELINES)
def test_a_pipeline_folder_chooses_no_code_place_or_size(case: str, saved_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_pipeline, tmp_path / "pipe"))
    harm, message = PIPELINES[case]
    harm(folder)
    with pytest.raises((UnsupportedModelError, CheckpointError, FileNotFoundError), match=message):
        load_pipeline(folder)


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_trust_in_any_spelling_is_refused(value: Any, saved_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True is not allowed"):
        load_pipeline(saved_pipeline, trust_remote_code=value)


# --- recipes

RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "accelerator": ({"accelerators": [{"name": "evilmod:go"}]}, "unknown 'evilmod:go'"),
    "component": (
        {"accelerators": [{"name": "feature_cache", "gate": {"name": "evilmod:go"}}]},
        "gate.name: unknown 'evilmod:go'",
    ),
    "sampler": ({"accelerators": [{"name": "sampler", "sampler": "evilmod:go"}]}, "evilmod:go"),
    "place above": (
        {"accelerators": [{"name": "velocity_refiner", "refiner": "../evil"}]}, "leads out of the recipe's folder",
    ),
    "absolute place": (
        {"accelerators": [{"name": "velocity_refiner", "refiner": "/evil"}]}, "leads out of the recipe's folder",
    ),
    "base": ({"accelerators": [], "base": {"class": ["evilmod"], "config": "x"}}, "base: must look like"),
    "steps": ({"accelerators": [], "num_inference_steps": 10**12}, "at most 10000 are run"),
    "steps of a sampler": (
        {"accelerators": [{"name": "sampler", "sampler": "flowturbo", "options": {"blocks": "H1000000000000"}}]},
        "at most 10000 are run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_chooses_no_code_place_or_size(case: str, tmp_path: Path) -> None:
    content, message = RECIPES[case]
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "flowaccel.json").write_text(json.dumps({"schema": 1, **content}))
    with pytest.raises(ValueError, match=message):
        Recipe.from_pretrained(folder)


PARTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "class": (lambda d: edited(d / "config.json", _class_name="evilmod:go"), "which is no network"),
    "pipeline as a class": (
        lambda d: edited(d / "config.json", _class_name="DiffusionPipeline"),
        "which is no network",
    ),
    "many layers": (lambda d: edited(d / "config.json", num_layers=10**9), "declares num_layers=1000000000"),
    "large table": (lambda d: edited(d / "config.json", sample_size=10**9), "declares sample_size=1000000000"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_learned_part_chooses_no_code_or_size(case: str, tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline(num_layers=1)
    recipe = tiny.flowturbo(tiny.random_refiner(pipe.transformer))
    recipe.save_pretrained(tmp_path / "recipe")
    harm, message = PARTS[case]
    harm(tmp_path / "recipe" / "refiner")
    with pytest.raises(CheckpointError, match=message):
        accelerate(pipe, tmp_path / "recipe")


# --- what a run, a training and statistics keep


@pytest.mark.parametrize(
    "content",
    [{"calibrate": True}, {"num_inference_steps": 3, "mag_ratios": "evilmod"}, {"num_inference_steps": None}, [], 3],
    ids=str,
)
def test_a_kept_calibration_is_numbers_alone(content: Any, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no calibration of native:mag"):
        calibrated_to(tmp_path / "calibration.json")


def test_a_training_state_chooses_no_code(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    state = {"step": "evilmod:go", "ema_steps": 0, "config": {"reward": "evilmod:go"}}
    save_file({"x": torch.zeros(1)}, tmp_path / "state.safetensors", {"state": json.dumps(state)})
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(CheckpointError, match="of another network"):
        resume_state(tmp_path, network, optimizer, tiny_average(network), {})


def tiny_average(network: torch.nn.Module) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(network.parameters())


def pickled_npz(path: Path) -> None:
    np.savez(path, mu=np.array([print], dtype=object), sigma=np.eye(1))


def huge_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu.npy", "sigma.npy"):
            with archive.open(name, "w") as member:
                header = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**7)}
                np.lib.format.write_array_header_1_0(member, header)


@pytest.mark.parametrize("harm", [pickled_npz, huge_header], ids=lambda harm: harm.__name__)
def test_statistics_hold_numbers_of_a_reasonable_size(harm: Callable[[Path], None], tmp_path: Path) -> None:
    harm(tmp_path / "s.npz")
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        load_statistics(tmp_path / "s.npz", features="f", fingerprint="0")
