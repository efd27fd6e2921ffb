"""What is imported when: listing and help need neither torch nor diffusers."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import pytest

import flowaccel
from flowaccel import FlowTurboScheduler
from flowaccel.pipelines import load_pipeline
from tiers import Process

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "matplotlib")

LISTS = """
import json, sys
from typer.testing import CliRunner
from flowaccel.cli import app
import flowaccel
for arguments in (["--help"], ["--version"], ["recipes"], ["recipes", "--json"], ["recipes", "--rules"],
                  ["zoo", "list"], ["zoo", "list", "--json"], ["train", "--help"], ["zoo", "--help"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
from flowaccel.recipe import PRESETS
from flowaccel.recipe.registry import ACCELERATORS, NETWORKS
assert "fbcache" in PRESETS and "mediators" in ACCELERATORS and "AccelerationPolicy" in NETWORKS
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.quick
def test_help_and_lists_import_no_torch(process: Process) -> None:
    assert {*json.loads(process("-c", LISTS).stdout.splitlines()[-1])}.isdisjoint(HEAVY)


def test_a_folder_with_our_classes_loads_after_the_import_alone(process: Process, tmp_path: Path) -> None:
    """diffusers finds the classes that model_index.json names, though nothing of flowaccel was used yet."""
    pipe = load_pipeline("zoo:t2i-shapes")
    pipe.scheduler = FlowTurboScheduler("H2P2")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["flowaccel", "FlowTurboScheduler"]
    script = """
        import sys
        import flowaccel
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
        print(type(pipe).__name__, type(pipe.scheduler).__name__, pipe.scheduler.config.blocks)
    """
    printed = process("-c", textwrap.dedent(script), tmp_path).stdout.splitlines()[-1]
    assert printed == "StableDiffusion3Pipeline FlowTurboScheduler H2P2"


PLUGIN = """
from flowaccel.recipe import Method, Preset

METHOD = Method(
    accelerators={"idle": "idle_method:Idle"},
    presets={"idle": Preset(summary="Does nothing.", make="idle_method:Idle")},
    former={"lazy": "idle_method:former"},
)


def __getattr__(name):
    from dataclasses import dataclass
    from flowaccel import Accelerator

    @dataclass(frozen=True)
    class Idle(Accelerator):
        name = "idle"
        level: int = 0

        def attach(self, pipe):
            return lambda: None

    if name == "Idle":
        globals()["Idle"] = Idle
        return Idle
    raise AttributeError(name)


def former(data):
    return {**data, "name": "idle"}
"""


def install(folder: Path, name: str, value: str, source: str) -> None:
    """What pip leaves of a distribution with one module and one entry point."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[flowaccel.methods]\n{name} = {value}\n")


def test_methods_of_other_distributions_come_in(process: Process, tmp_path: Path) -> None:
    install(tmp_path, "idle_method", "idle_method:METHOD", PLUGIN)
    install(tmp_path, "broken_method", "broken_method:METHOD", "raise RuntimeError('no luck')")
    taking = (
        "from flowaccel.recipe import Method, Preset\nMETHOD = Method(presets={'heun': Preset(summary='', make='x:y')})"
    )
    install(tmp_path, "taking_method", "taking_method:METHOD", taking)
    install(tmp_path, "other_method", "other_method:METHOD", "METHOD = 3")
    script = """
        import json, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from flowaccel.recipe import PRESETS
        from flowaccel.recipe import Recipe, preset, registry, resolve
        said = [str(one.message) for one in caught if "another distribution" in str(one.message)]
        made = preset("idle:level=3@4")
        assert made.accelerators[0].level == 3 and made.num_inference_steps == 4, made
        assert resolve("heun+idle").accelerators[1].name == "idle"
        made.save_pretrained("saved")
        assert Recipe.from_pretrained("saved").accelerators == made.accelerators
        print(json.dumps([PRESETS["idle"], sorted(said)]))
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = process("-c", textwrap.dedent(script), cwd=tmp_path, env=environment)
    summary, said = json.loads(ended.stdout.splitlines()[-1])
    assert summary == "Does nothing."
    for message, reason in zip(
        said, ("no luck", "it is a int, not a", "the name 'heun' in presets is taken"), strict=True
    ):
        assert message.endswith(reason) or reason in message


def test_every_name_can_be_imported() -> None:
    for name in flowaccel.__all__:
        assert getattr(flowaccel, name) is not None
    assert set(flowaccel.__all__) <= set(dir(flowaccel))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flowaccel.no_such_name
