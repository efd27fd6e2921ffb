"""`flowaccel evaluate --baseline`: what it writes, the YAML form, and bad input."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tiny
from flowaccel.cli import app
from flowaccel.evaluation.baselines import baselines

FBC, TAYLOR = "native:fbc:threshold=1e9", "native:taylorseer:cache_interval=2,max_order=0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_sit_pipeline(tmp_path_factory.mktemp("saved") / "pipe", num_layers=2))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(pipe: str, *more: str, code: int = 0) -> Any:
    small = "--num-samples 6 --rounds 2 --steps 4 --baseline-steps 2 --latency-batch 2 --metrics kid --device cpu"
    networks = "--features zoo:digits-features --reference zoo:digits --out run"
    result = CliRunner().invoke(app, ["evaluate", pipe, *small.split(), *networks.split(), *more])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.mark.slow
def test_baselines_are_rows(saved: str) -> None:
    found = json.loads(run(saved, "--baseline", FBC, "--baseline", TAYLOR, "--recipe", "fbcache", "--json").stdout)
    assert [row["recipe"] for row in found["rows"]] == ["baseline", "baseline@2", FBC, TAYLOR, "fbcache"]
    assert [row["family"] for row in found["rows"]] == ["baseline", "baseline", "native", "native", "fbcache"]
    assert "decides for the whole batch" in Path("run/report.html").read_text()


def test_baselines_from_a_file(saved: str) -> None:
    Path("options.yaml").write_text(yaml.safe_dump({"baseline": [TAYLOR]}))
    found = json.loads(run(saved, "--config", "options.yaml", "--json").stdout)
    assert found["protocol"]["baselines"] == [TAYLOR]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fbc", "unknown baseline 'fbc'"),
        ("native:fbc:rate=1", "unknown option 'rate'; options of native:fbc are threshold"),
        ("native:taylorseer:cache_interval=0", "does not work with SiTTransformer2DModel"),
        ("cache-dit", "pip install 'flowaccel[cache-dit]'"),
    ],
)
def test_bad_input_is_wrong_usage(name: str, message: str, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(library: str) -> str:
        if library == "cache-dit":
            raise PackageNotFoundError(library)
        return "1"

    monkeypatch.setattr(baselines, "version", version)
    result = run(saved, "--baseline", name, code=2)
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not list(Path(".").rglob("*.png"))
