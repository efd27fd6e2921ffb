"""The command line and recipes: those saved with a pipeline, the report of a call, benchmark scripts that use them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import tiny
from commands import run
from flowaccel import accelerate
from flowaccel.evaluation import load_results
from flowaccel.pipelines import load_pipeline
from tiers import Process

ROOT = Path(__file__).resolve().parents[2]
FLOWTURBO = "flowturbo-H1P2R2"
CLASSES = shlex.split("--classes 0-1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline folder with a refiner and no recipe."""
    return str(tiny.save_sit_pipeline(tmp_path_factory.mktemp("plain") / "pipe", num_layers=1))


@pytest.fixture(scope="module")
def saved(plain: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same pipeline, saved while it was accelerated."""
    pipeline = load_pipeline(plain)
    accelerate(pipeline, FLOWTURBO)
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def test_a_saved_recipe_is_used_and_can_be_left(plain: str, saved: str) -> None:
    found = run("generate", saved, *CLASSES, "--out", "found")
    assert FLOWTURBO in found.stderr and "--recipe none" in found.stderr
    run("generate", plain, *CLASSES, "--recipe", FLOWTURBO, "--out", "asked")
    left = run("generate", saved, *CLASSES, "--recipe", "none", "--steps", "4", "--out", "left")
    assert FLOWTURBO not in left.stderr
    run("generate", plain, *CLASSES, "--steps", "4", "--out", "plain")
    assert files("found") == files("asked")
    assert files("left") == files("plain")
    assert files("found") != files("left")


def test_another_recipe_than_the_saved_one(plain: str, saved: str) -> None:
    run("generate", saved, *CLASSES, "--recipe", "flowturbo-H2P0R0", "--out", "other")
    run("generate", plain, *CLASSES, "--recipe", "flowturbo-H2P0R0", "--out", "asked")
    assert files("other") == files("asked")


@pytest.mark.slow
def test_evaluate_measures_the_saved_recipe(saved: str) -> None:
    small = "--num-samples 8 --rounds 2 --steps 3 --latency-batch 2 --metrics rel_l2 --baseline-steps 2"
    networks = "--features zoo:digits-features --reference zoo:digits"
    run("evaluate", saved, *shlex.split(f"{small} {networks} --out found"))
    run("evaluate", saved, *shlex.split(f"{small} {networks} --recipe none --out left"))
    assert FLOWTURBO in [row["recipe"] for row in load_results("found")["rows"]]
    assert FLOWTURBO not in [row["recipe"] for row in load_results("left")["rows"]]


def test_the_report_counts_the_calls(plain: str) -> None:
    text = run("generate", plain, *CLASSES, "--recipe", FLOWTURBO, "--report", "--out", "a").stderr
    # Two of the Heun step, one of each pseudo-corrector step, and two of each released refiner step.
    assert "8 network calls (4 computed, 4 refined)" in text
    untouched = run("generate", plain, *CLASSES, "--steps", "3", "--report", "--out", "b").stderr
    assert "6 network calls (6 computed)" in untouched


def test_the_report_changes_no_image(plain: str) -> None:
    run("generate", plain, *CLASSES, "--steps", "3", "--report", "--out", "with")
    run("generate", plain, *CLASSES, "--steps", "3", "--out", "without")
    assert files("with") == files("without")


def test_json_stays_json_beside_the_report(plain: str) -> None:
    result = run("generate", plain, *CLASSES, "--recipe", FLOWTURBO, "--report", "--json", "--out", "a")
    assert len(json.loads(result.stdout)["files"]) == 2


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.name)
def test_every_benchmark_says_how_it_is_used(script: Path, process: Process) -> None:
    assert "--record" in process(script, "--help").stdout
