"""`flowaccel calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from flowaccel import Recipe
from flowaccel.cli import app


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("calibrate") / "pipe"
    tiny.sit_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_recipe_is_written_and_can_be_used(plain: str, tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    options = ["--classes", "0-1", "--steps", "6", "--recipe", "euler", "--seed", "3", "--predictor", "newton"]
    said = run(plain, "--method", "teacache", "--target-speedup", "1.3", *options, "--out", out).stderr
    for part in ("fit: R^2", "signal seen", "threshold:", "predicted:", "measured:", "relative L2 error", out):
        assert part in said
    recipe = Recipe.from_pretrained(out)
    assert recipe.num_inference_steps == 6
    used = ["generate", plain, "--recipe", out, "--classes", "1", "--report", "--out", str(tmp_path / "images")]
    result = CliRunner().invoke(app, used)
    assert result.exit_code == 0, result.output
    assert "reused" in result.stderr and "calibrated" not in result.stderr


def test_json(plain: str, tmp_path: Path) -> None:
    options = ["--num-samples", "2", "--steps", "4", "--warmup", "2", "--last", "0", "--max-run", "1"]
    found = run(
        plain, "--method", "magcache", "--target-speedup", "1.2", *options, "--out", str(tmp_path), "--json"
    ).stdout
    data = json.loads(found)
    assert data["calibration"]["method"] == "magcache"
    assert data["calibration"]["measured_speedup"] >= 1.2
    assert data["recipe"] == json.loads((tmp_path / "flowaccel.json").read_text())
    (cache,) = data["recipe"]["accelerators"]
    assert (cache["guard"]["warmup"], cache["guard"]["last"], cache["guard"]["max_run"]) == (2, 0, 1)
    assert len(cache["gate"]["ratios"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method teacash --target-speedup 2", "method must be one of teacache"),
        ("--method teacache --target-speedup 1", "must be a number above 1, got 1"),
        ("--method teacache --target-speedup 7", "allows 4.00 at most"),
        ("--method teacache --target-speedup 2 --steps 2", "steps must be at least 3, got 2"),
        ("--method teacache --target-speedup 2 --predictor magic", "--predictor must be one of hold"),
        ("--method teacache --target-speedup 2 --last -1", "last must be a whole number of at least 0, got -1"),
        ("--method teacache --target-speedup 2 --recipe easycache", "it holds 'feature_cache' twice"),
        ("--method teacache --target-speedup 2 --prompt cat", "takes classes, not prompts"),
        ("--method teacache --target-speedup 2 --prompts missing.txt", "takes classes, not prompts"),
        ("--method teacache --target-speedup 2 --num-frames 3", "does not take --num-frames"),
    ],
)
def test_wrong_use_is_exit_code_2(options: str, message: str, plain: str, tmp_path: Path) -> None:
    given = options if "--steps" in options else f"{options} --steps 4"
    result = run(plain, *given.split(), "--num-samples", "1", "--out", str(tmp_path / "out"), code=2)
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_no_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowaccel.cli.calibrate.open_pipeline", lambda *_: tiny.sd3_pipeline())
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    arguments = ["anything", "--method", "teacache", "--target-speedup", "2"]
    assert "needs --prompt TEXT or --prompts FILE" in run(*arguments, code=2).output
    assert "holds no prompt" in run(*arguments, "--prompts", str(empty), code=2).output
    assert "missing.txt" in run(*arguments, "--prompts", "missing.txt", code=2).output
