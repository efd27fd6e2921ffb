"""Paired differences between rows of a finished run."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from flowaccel.evaluation import Classes, Protocol, Results, evaluate, runner
from flowaccel.evaluation import compare_rows as compare
from flowaccel.evaluation.results import row
from flowaccel.recipe import preset

FLOWTURBO = "flowturbo-H1P2R2"
NETWORK = "test_compare:Quarters"
compare_rows = functools.partial(compare, features=NETWORK)


class Quarters(torch.nn.Module):
    """Four features, and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * images.float().unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).mean(-1).flatten(1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features @ torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("run")
    pipe = tiny.sit_pipeline(num_layers=1)
    protocol = Protocol(
        conditions=Classes((0, 1, 2)),
        steps=3,
        baseline_steps=(2,),
        num_samples=12,
        seed=4,
        rounds=3,
        latency_batch=2,
        resamples=25,
        features=NETWORK,
    )
    recipes = [preset("heun@3"), tiny.flowturbo(tiny.random_refiner(pipe.transformer))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_figures", lambda *_: None)
        return out, evaluate(pipe, recipes, protocol, out)


@pytest.fixture
def copied(finished: tuple[Path, Results], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.mark.parametrize("other", ["baseline", "baseline@2"])
def test_equals_what_the_result_file_says(other: str, finished: tuple[Path, Results]) -> None:
    found = compare_rows(finished[0], FLOWTURBO, other)
    assert (found["a"], found["b"]) == (FLOWTURBO, other)
    metrics = row(finished[1], FLOWTURBO)["metrics"]
    compared = {name: entry["versus"][other] for name, entry in metrics.items() if other in entry["versus"]}
    assert set(compared) == {"fid", "kid", "class_accuracy"} | ({"rel_l2"} if other != "baseline" else set())
    assert {name: {key: entry[key] for key in ("difference", "ci95")} for name, entry in found["metrics"].items()} == {
        name: {key: entry[key] for key in ("difference", "ci95")} for name, entry in compared.items()
    }


@pytest.mark.slow
def test_the_other_way_round_has_the_other_sign(finished: tuple[Path, Results]) -> None:
    there, back = (compare_rows(finished[0], *pair) for pair in ((FLOWTURBO, "baseline@2"), ("baseline@2", FLOWTURBO)))
    for name, entry in there["metrics"].items():
        other = back["metrics"][name]
        assert other["difference"] == pytest.approx(-entry["difference"])
        assert other["ci95"] == pytest.approx([-entry["ci95"][1], -entry["ci95"][0]])
    assert there["wall_clock"]["ratio"] == pytest.approx(1 / back["wall_clock"]["ratio"], rel=0.2)


def test_rows_without_a_stored_difference(finished: tuple[Path, Results]) -> None:
    found = compare_rows(finished[0], "baseline@2", "heun@3")
    values = [row(finished[1], name)["metrics"] for name in ("baseline@2", "heun@3")]
    for name, entry in found["metrics"].items():
        assert entry["difference"] == pytest.approx(values[0][name]["value"] - values[1][name]["value"])


def test_identical_rows_differ_by_nothing(finished: tuple[Path, Results]) -> None:
    found = compare_rows(finished[0], "heun@3", "baseline")
    for name, entry in found["metrics"].items():
        assert (entry["difference"], entry["ci95"], entry["stderr"]) == (0.0, [0.0, 0.0], 0.0), name
        assert entry["not_worse"]
    assert "rel_l2" not in found["metrics"]


def test_not_worse_follows_the_interval(finished: tuple[Path, Results]) -> None:
    found = compare_rows(finished[0], FLOWTURBO, "baseline@2")
    values = {name: entry["value"] for name, entry in row(finished[1], "baseline@2")["metrics"].items()}
    for name, entry in found["metrics"].items():
        low, high = entry["ci95"]
        worsening = -low if name == "class_accuracy" else high
        assert entry["not_worse"] == (worsening <= 0.05 * abs(values[name]))


def test_seconds_are_compared_round_by_round(finished: tuple[Path, Results]) -> None:
    found = compare_rows(finished[0], FLOWTURBO, "baseline")["wall_clock"]
    mine, theirs = (
        torch.tensor(row(finished[1], name)["latency_ms_per_image"]["per_round"]) for name in (FLOWTURBO, "baseline")
    )
    assert found["ratio"] == pytest.approx(float((mine / theirs).median()))
    assert found["ci95"][0] <= found["ratio"] <= found["ci95"][1]
    speedup = row(finished[1], FLOWTURBO)["speedup"]["wall_clock"]["value"]
    assert found["ratio"] == pytest.approx(1 / speedup)


def test_unknown_row_names_the_nearest(finished: tuple[Path, Results]) -> None:
    with pytest.raises(
        ValueError, match=r"no row called 'baseline@3': did you mean 'baseline@2'\? rows are baseline, bas"
    ):
        compare_rows(finished[0], FLOWTURBO, "baseline@3")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no result file at"):
        compare(tmp_path, "a", "b")


def test_another_feature_network_is_refused(finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch) -> None:
    import test_compare

    class Changed(Quarters):
        def __init__(self) -> None:
            super().__init__()
            torch.nn.init.constant_(self.scale, 1.01)

    monkeypatch.setattr(test_compare, "Quarters", Changed)
    with pytest.raises(ValueError, match=r"the run used test_compare:Quarters with fingerprint .*evaluate again"):
        compare_rows(finished[0], FLOWTURBO, "baseline")


def changed(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_missing_sample_is_named(copied: Path) -> None:
    (copied / "rows" / FLOWTURBO / "samples" / "000003.png").unlink()
    with pytest.raises(ValueError, match=r"flowturbo-H1P2R2.*000003\.png is missing or damaged"):
        compare_rows(copied, FLOWTURBO, "baseline@2")
    compare_rows(copied, "heun@3", "baseline@2")


def test_result_file_without_rounds_still_compares_quality(copied: Path) -> None:
    """The rounds are an optional key: files written by hand or by others lack them."""

    def strip(data: Any) -> None:
        for entry in data["rows"]:
            del entry["latency_ms_per_image"]["per_round"]

    before = compare_rows(copied, FLOWTURBO, "baseline")
    changed(copied / "results.json", strip)
    after = compare_rows(copied, FLOWTURBO, "baseline")
    assert after["metrics"] == before["metrics"]
    assert "wall_clock" not in after


def test_resumed_with_other_rounds_is_of_one_measurement(finished: tuple[Path, Results]) -> None:
    assert {len(entry["latency_ms_per_image"]["per_round"]) for entry in finished[1]["rows"]} == {3}
