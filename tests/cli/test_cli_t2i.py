"""Text to image from the command line: prompts, lengths, arguments, and what the zoo knows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import tiny
from flowaccel import Recipe, Sampler, VelocityRefiner, zoo
from flowaccel.cli import app, demo
from flowaccel.cli.generate import free_arguments, parse_arguments
from flowaccel.data import PROMPT_SETS, REFERENCE_SETS, shapes
from flowaccel.data.shapes import SPLITS
from flowaccel.evaluation import compare_rows, load_results, runner

ENTRY = zoo.entry("t2i-shapes")
CAPTION = "three solid blue squares"
LONG = " ".join([CAPTION] * 4)  # 16 words and two ends, where 16 tokens are kept
COMMANDS: dict[str, list[str]] = {
    "generate": ["--steps", "2"],
    "evaluate": ["--steps", "2", "--num-samples", "4", "--rounds", "2", "--latency-batch", "1", "--metrics", "kid"],
    "calibrate": ["--method", "ab_cache", "--target-speedup", "1.2", "--steps", "6", "--num-samples", "2"],
}


@pytest.fixture(scope="module", autouse=True)
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tiny.shapes_zoo(tmp_path_factory.mktemp("zoo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "_ROOT", root)
        patch.setitem(REFERENCE_SETS, "shapes", lambda: shapes("reference", 20))
        patch.setattr(runner, "write_figures", lambda *_: None)
        yield root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str, *more: str, pipe: str = "zoo:t2i-shapes", code: int = 0) -> Any:
    arguments = [command, pipe, *COMMANDS[command], "--device", "cpu", "--out", "out", *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def fails(command: str, *more: str) -> str:
    said = " ".join(run(command, *more, code=2).stderr.split())
    assert not Path("out").exists()
    return said


# prompts


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_prompts_are_refused_before_anything_is_made(command: str) -> None:
    Path("empty.txt").write_text("\n  \n")
    Path("latin.txt").write_bytes("zwei Kühe".encode("latin-1"))
    for given, message in {
        "empty.txt": "empty.txt holds no prompt",
        "latin.txt": "latin.txt is not UTF-8 text (",
        "nowhere.txt": "there is no file of prompts nowhere.txt",
        "zoo:shape": "unknown set of prompts 'zoo:shape': did you mean 'zoo:shapes'? there are zoo:shapes, ",
    }.items():
        assert message in fails(command, "--prompts", given)


@pytest.mark.slow
def test_prompts_of_the_zoo() -> None:
    found = json.loads(run("generate", "--prompts", "zoo:shapes-held-out", "--num-images", "2", "--json").stdout)
    assert len(found["files"]) == 2
    Path("first.txt").write_text("\n".join(PROMPT_SETS["shapes-held-out"]()[:2]))
    run("generate", "--prompts", "first.txt", "--out", "same")
    for name in ("00000.png", "00001.png"):
        assert Path("out", name).read_bytes() == Path("same", name).read_bytes()
    assert "give --prompt or --prompts, not both" in fails_beside(
        "generate", "--prompt", "x", "--prompts", "zoo:shapes"
    )


def fails_beside(command: str, *more: str) -> str:
    return " ".join(run(command, *more, code=2).stderr.split())


@pytest.mark.parametrize("command", ["generate", "calibrate"])
def test_a_pipeline_with_prompts_needs_some(command: str) -> None:
    assert "needs --prompt TEXT" in fails(command) and "zoo:shapes-held-out" in fails(command)


# lengths


def test_prompts_that_are_cut_off() -> None:
    Path("long.txt").write_text(f"{CAPTION}\n{LONG}\n{LONG} x\n")
    message = (
        "2 of 3 prompts are longer than StableDiffusion3Pipeline keeps and would be cut off; the first is "
        f"{LONG!r} with 18 tokens where 16 are kept; shorten them"
    )
    assert message in fails("evaluate", "--prompts", "long.txt")
    assert message in fails("calibrate", "--prompts", "long.txt", "--num-samples", "3")
    said = " ".join(run("generate", "--prompts", "long.txt").stderr.split())
    assert said.count("cut off") == 1 and f"warning: {message}" in said
    assert len(list(Path("out").glob("*.png"))) == 3


# arguments


def test_arguments_are_parsed() -> None:
    assert parse_arguments(["height=512", "negative_prompt=a blurry cat", "clip_skip=null", "x=[1.5]", "y="]) == {
        "height": 512,
        "negative_prompt": "a blurry cat",
        "clip_skip": None,
        "x": [1.5],
        "y": "",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_argument_is_refused_before_anything_is_made(command: str) -> None:
    assert "does not take the argument 'hight'" in fails(command, "--prompts", "zoo:shapes", "--argument", "hight=16")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hight=16", "does not take the argument 'hight'; did you mean 'height'? its arguments are prompt, "),
        ("prompt=cat", "'prompt' is set by flowaccel; use --prompts"),
        ("prompt_2=cat", "'prompt_2' is set by flowaccel; use --prompts"),
        ("num_inference_steps=3", "'num_inference_steps' is set by flowaccel; use --steps"),
        ("guidance_scale=3", "use --guidance-scale"),
        ("latents=3", "use --seed"),
        ("output_type=pt", "leave it out"),
        ("mu=NaN", "'mu' must be a plain number"),
        ("height", "--argument must look like NAME=VALUE, such as height=512, got 'height'"),
    ],
)
def test_wrong_arguments(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        free_arguments(tiny.sd3_pipeline(), "folder", [argument])


def test_an_argument_given_twice() -> None:
    both = ["--prompt", CAPTION, "--argument", "height=16"]
    assert "height is given both by --height and by --argument" in fails("generate", *both, "--height", "16")
    assert "--argument height is given twice" in fails("generate", *both, "--argument", "height=32")


def test_generate_hands_arguments_on() -> None:
    from PIL import Image

    run("generate", "--prompt", CAPTION, "--argument", "height=16", "--argument", "negative_prompt=a circle")
    with Image.open("out/00000.png") as image:
        assert image.size == (32, 16)
    first = Path("out/00000.png").read_bytes()
    run("generate", "--prompt", CAPTION, "--argument", "height=16")
    assert Path("out/00000.png").read_bytes() != first


def test_calibrate_hands_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusion3Pipeline

    seen: list[dict[str, Any]] = []
    original = StableDiffusion3Pipeline.encode_prompt

    def encode_prompt(self: Any, **options: Any) -> Any:
        seen.append(options)
        return original(self, **options)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", encode_prompt)
    run("calibrate", "--prompt", CAPTION, "--argument", "negative_prompt=x", "--argument", "max_sequence_length=3")
    assert {(options["negative_prompt"], options["max_sequence_length"]) for options in seen} == {("x", 3)}
    calibration = json.loads(Path("out/flowaccel.json").read_text())["accelerators"][-1]["calibration"]
    assert calibration["guidance_scale"] == ENTRY.guidance_scale


# what the zoo knows


@pytest.mark.slow
def test_evaluate_with_nothing_but_a_recipe() -> None:
    options = ["--steps", "3", "--num-samples", "3", "--rounds", "2", "--latency-batch", "1", "--baseline-steps", "2"]
    with pytest.warns(UserWarning, match="Frechet distance of 3 samples"):
        result = CliRunner().invoke(
            app, ["evaluate", "zoo:t2i-shapes", "--recipe", "euler@2", *options, "--device", "cpu", "--out", "out"]
        )
    assert result.exit_code == 0, result.output
    results = load_results("out")
    protocol: Any = results["protocol"]
    assert protocol["dataset"] == "zoo:shapes, 500 prompts"
    assert protocol["metrics"] == ["fid", "clip_score", "attribute_accuracy", "rel_l2"]
    assert (protocol["features"], protocol["clip"]) == ("zoo:shapes-features", "zoo:shapes-clip")
    assert (protocol["reference"], protocol["attributes"]) == ("zoo:shapes", "zoo:shapes")
    assert (protocol["guidance_scale"], protocol["arguments"]) == (ENTRY.guidance_scale, ENTRY.arguments)
    assert set(results["rows"][1]["metrics"]) == {"fid", "clip_score", "attribute_accuracy", "rel_l2"}
    assert set(compare_rows("out", "baseline@2", "baseline")["metrics"]) == {"fid", "clip_score", "attribute_accuracy"}
    manifest = json.loads(Path("out/rows/baseline/manifest.json").read_text())
    assert manifest["arguments"] == {"max_sequence_length": 16}
    said = run("evaluate", "--num-samples", "3", "--steps", "3", "--argument", "height=16", code=2).stderr
    assert "holds samples made differently (arguments: there {'max_sequence_length': 16}" in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nothing is calibrated")  # `balanced`, for this tiny network
def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        demo.TASKS, "t2i", replace(demo.TASKS["t2i"], steps=4, baseline_steps=(1, 2), recipes=("ab_cache", "ab2@2"))
    )
    options = ["--num-samples", "50", "--rounds", "2", "--device", "cpu", "--out", "out"]
    result = CliRunner().invoke(app, ["demo", "--task", "t2i", *options])
    assert result.exit_code == 0, result.output
    assert "zoo:t2i-shapes: 50 images a row, a demo-sized sample." in result.stderr
    results = load_results("out")
    names = [row["recipe"] for row in results["rows"]]
    assert names == ["baseline", "baseline@1", "baseline@2", "ab_cache", "ab2@2"]
    assert all(set(row["metrics"]) == {"fid", "attribute_accuracy"} for row in results["rows"])


def test_generate_makes_what_evaluate_measures() -> None:
    run("evaluate", "--baseline-steps", "1")
    run("generate", "--prompts", "zoo:shapes", "--num-images", "4", "--out", "made")
    for i in range(4):
        made, measured = (
            torch.frombuffer(bytearray(pixels(path)), dtype=torch.uint8).int()
            for path in (f"made/{i:05d}.png", f"out/rows/baseline/samples/{i:06d}.png")
        )
        assert (made - measured).abs().max() <= 1


def pixels(path: str) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [["clip_skip=1", "negative_prompt=a cat"], {"clip_skip": 1, "negative_prompt": "a cat"}]
)
def test_arguments_in_a_yaml_file(form: Any) -> None:
    Path("config.yaml").write_text(yaml.safe_dump({"argument": form, "prompts": "zoo:shapes-held-out"}))
    run("evaluate", "--config", "config.yaml", "--baseline-steps", "1", "--reference", "zoo:shapes", "--metrics", "")
    protocol: Any = load_results("out")["protocol"]
    assert protocol["arguments"] == {"clip_skip": 1, "negative_prompt": "a cat", "max_sequence_length": 16}
    assert protocol["dataset"] == "zoo:shapes-held-out, 500 prompts"


def test_weights_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_ROOT", tmp_path / "empty")
    assert "weights of zoo:t2i-shapes are missing" in fails("evaluate")


def test_every_entry_has_a_builder() -> None:
    from flowaccel.zoo_build.builders import BUILDERS

    assert set(BUILDERS) == set(zoo.ENTRIES)


@pytest.mark.slow
def test_a_refiner_is_trained_on_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPLITS, "generator", 30)
    train = ["train", "refiner", "zoo:t2i-shapes", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    result = CliRunner().invoke(app, [*train, "--data", "shapes", "--guidance-scale", "3", "--out", "refiner"])
    assert result.exit_code == 0, result.output
    Recipe([Sampler("flowturbo", {"blocks": "H1P1R1"}), VelocityRefiner("refiner")]).save_pretrained("recipe")
    said = json.loads(run("generate", "--prompt", CAPTION, "--recipe", "recipe", "--steps", "3", "--json").stdout)
    assert len(said["files"]) == 1
    result = CliRunner().invoke(app, [*train, "--data", "digits", "--out", "other"])
    assert result.exit_code == 2
    assert "--data digits has no captions" in " ".join(result.stderr.split())
