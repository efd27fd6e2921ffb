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
        ("--method teacash --target-speedup 2", "method must be one of ab_cache"),
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


# -- step grids


@pytest.mark.parametrize("method", ["boss", "oss"])
def test_a_grid_is_written_and_can_be_used(method: str, plain: str, tmp_path: Path) -> None:
    out = str(tmp_path / "grid")
    options = ["--classes", "0-1", "--recipe", "euler", "--steps", "2", "--fine-steps", "5", "--held-out", "3"]
    said = run(plain, "--method", method, *options, "--guidance-scale", "2", "--out", out).stderr
    for part in ("grid: 1, ", "against 5 steps, mean of 3 held-out images", "searched grid of 2 steps", "own 2 steps"):
        assert part in said
    assert out in said
    recipe = Recipe.from_pretrained(out)
    assert (recipe.name, recipe.num_inference_steps) == (f"{method}-2", 2)
    used = ["generate", plain, "--recipe", out, "--classes", "1", "--guidance-scale", "2"]
    result = CliRunner().invoke(app, [*used, "--out", str(tmp_path / "images")])
    assert result.exit_code == 0, result.output
    assert "calibrated" not in result.stderr
    result = CliRunner().invoke(app, [*used, "--steps", "3", "--out", str(tmp_path / "more")])
    assert result.exit_code == 2
    assert "grid of 2 steps, but num_inference_steps is 3" in result.stderr.replace("\n", " ")


def test_a_grid_as_json(plain: str, tmp_path: Path) -> None:
    options = ["--recipe", "euler", "--steps", "3", "--fine-steps", "6", "--num-samples", "2", "--metric", "x0"]
    found = json.loads(run(plain, "--method", "boss", *options, "--out", str(tmp_path), "--json").stdout)
    calibration = found["calibration"]
    assert (calibration["method"], calibration["metric"], calibration["fine_steps"]) == ("boss", "x0", 6)
    assert (calibration["images"], calibration["held_out"], calibration["steps"]) == (2, 2, 3)
    (sampler,) = found["recipe"]["accelerators"]
    assert sampler["options"]["grid"][0] == 1 and len(sampler["options"]["grid"]) == 4


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.2, -0.1), "the searched grid is better (difference -0.2 to -0.1, 95% interval)"),
        ((-0.1, 0.1), "is not shown to be better than the pipeline's own (difference -0.1 to +0.1"),
        ((0.1, 0.2), "is WORSE than the pipeline's own"),
        (None, "is not shown to be better than the pipeline's own (one image)"),
    ],
)
def test_the_verdict(interval: Any, verdict: str, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowaccel.methods.grids.fit._interval", lambda differences: interval)
    options = ["--recipe", "euler", "--steps", "2", "--fine-steps", "3", "--num-samples", "1"]
    assert verdict in run(plain, "--method", "boss", *options, "--out", str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method bos --steps 3", "method must be one of ab_cache"),
        ("--method boss --recipe euler", "--method boss makes a step grid and needs --steps"),
        ("--method teacache --steps 4", "--method teacache makes a cache and needs --target-speedup"),
        ("--method boss --steps 3 --target-speedup 2", "--target-speedup is not for --method boss"),
        ("--method oss --steps 3 --warmup 2", "--warmup is not for --method oss, which makes a step grid; leave it"),
        ("--method oss --steps 3 --predictor hold", "--predictor is not for --method oss"),
        ("--method teacache --target-speedup 2 --fine-steps 9", "--fine-steps is not for --method teacache, which"),
        ("--method teacache --target-speedup 2 --held-out 9", "--held-out is not for --method teacache"),
        ("--method boss --steps 3", "(heun) evaluates the network 2 times a step; put the recipe 'euler' under it"),
        ("--method boss --recipe euler --steps 9 --fine-steps 8", "steps must be a whole number in 1 .. 8"),
        ("--method boss --recipe euler --steps 0", "steps must be a whole number in 1 .. 60"),
        ("--method boss --recipe easycache --steps 3", "holds 'feature_cache'; search first"),
        ("--method boss --recipe euler --steps 3 --metric psnr", "metric must be one of state, x0, got 'psnr'"),
        ("--method boss --steps 3 --prompt cat", "takes classes, not prompts"),
    ],
)
def test_wrong_use_of_grids_is_exit_code_2(options: str, message: str, plain: str, tmp_path: Path) -> None:
    result = run(plain, *options.split(), "--num-samples", "1", "--out", str(tmp_path / "out"), code=2)
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_grid_for_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured on the prompts that follow those of the search."""
    pipe = tiny.wan_pipeline()
    asked: list[Any] = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: (asked.append(kwargs["prompt"]), encode(*args, **kwargs))[1]
    monkeypatch.setattr("flowaccel.cli.calibrate.open_pipeline", lambda *_: pipe)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    sizes = ["--height", "16", "--width", "16", "--num-frames", "5", "--num-samples", "2", "--held-out", "1"]
    options = ["--prompts", str(prompts), "--steps", "2", "--fine-steps", "4", *sizes]
    run("anything", "--method", "oss", *options, "--out", str(tmp_path / "out"))
    assert ["one", "two"] in asked and ["three"] in asked
    assert asked.count(["three"]) == 3  # fine, default and searched
    (sampler,) = Recipe.from_pretrained(tmp_path / "out").accelerators
    assert sampler.calibration.conditions == 2  # type: ignore[attr-defined]
