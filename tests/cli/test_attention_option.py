"""`--attention` of `generate` and `evaluate`, with recipes that bring another network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import attention_backend
from typer.testing import CliRunner

import fake_xformers
import tiny
from flowaccel import Mediators, Recipe
from flowaccel.cli import app
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel

COUNT = 4


@pytest.fixture(autouse=True)
def global_backend() -> Iterator[None]:
    """diffusers also switches what every network without a choice of its own uses: put back here."""
    with attention_backend("native"):
        yield


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake_xformers.Op:
    """In an empty folder with a pipeline, `pipe`, and a recipe, `mediators`."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sit_pipeline()
    pipe.save_pretrained("pipe")
    network = MediatorSiTTransformer2DModel.from_base(pipe.transformer, {"counts": (COUNT,)})
    Recipe([Mediators(network)]).save_pretrained("mediators")
    op = fake_xformers.Op()
    fake_xformers.put_in_place(monkeypatch, op)
    return op


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--recipe", "mediators", "--device", "cpu"])


def mediators_ran(op: fake_xformers.Op) -> bool:
    return any(shape is not None and shape[2] == COUNT for shape in op.seen)


def test_generate(op: fake_xformers.Op) -> None:
    result = run("generate", "pipe", "--classes", "3", "--steps", "2", "--out", "out", "--attention", "xformers")
    assert result.exit_code == 0, result.output
    assert mediators_ran(op)
    assert len(list(Path("out").glob("*.png"))) == 1


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_backend_that_cannot_take_the_biases(command: str, op: fake_xformers.Op) -> None:
    judged = ["--features", "zoo:digits-features", "--reference", "zoo:digits", "--num-samples", "4"]
    more = judged if command == "evaluate" else ["--classes", "3"]
    result = run(command, "pipe", *more, "--steps", "2", "--out", "out", "--attention", "flash")
    assert result.exit_code == 2, result.output
    assert "'_native_flash' cannot add the position biases; take one of" in " ".join(result.stderr.split())
    assert command == "evaluate" or not list(Path("out").rglob("*.png"))  # evaluate makes rows in turn


@pytest.mark.slow
def test_evaluate_from_a_file_records_it(op: fake_xformers.Op) -> None:
    options = {
        "attention": "xformers",
        "steps": 2,
        "baseline_steps": "1",
        "num_samples": 4,
        "rounds": 2,
        "latency_batch": 2,
        "metrics": "rel_l2",
        "features": "zoo:digits-features",
        "reference": "zoo:digits",
        "out": "out",
    }
    Path("options.yaml").write_text(yaml.safe_dump(options))
    result = run("evaluate", "pipe", "--config", "options.yaml")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/results.json").read_text())["environment"]["attention"] == "xformers"
    assert mediators_ran(op)
