"""Results round-trip exactly, bad ones are refused with the path of the bad key, and a failed write changes nothing."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from flowaccel.evaluation.results import SCHEMA_VERSION, check_results, load_results, row, save_results
from flowaccel.evaluation.timing.environment import environment


def make_row(name: str) -> dict[str, Any]:
    return {
        "recipe": name,
        "num_inference_steps": 10,
        "nfe": 10,
        "latency_ms_per_image": {"median": 2.0, "p10": 1.9, "p90": 2.2, "rounds": 10},
        "speedup": {"wall_clock": {"value": 1.0, "ci95": [1.0, 1.0]}},
        "metrics": {
            "kid": {
                "value": 0.1,
                "n": 50,
                "stderr": 0.01,
                "ci95": [0.08, 0.12],
                "higher_is_better": False,
                "display": "KID, zoo:small, n=50",
                "versus": {"baseline": {"difference": 0.0, "ci95": [-0.1, 0.1]}},
            }
        },
        "pareto": True,
    }


@pytest.fixture
def results() -> Any:
    return {
        "schema": SCHEMA_VERSION,
        "protocol": {"dataset": "digits", "num_samples": 50, "seed": 0, "batch_size": 5},
        "environment": environment("cpu"),
        "rows": [make_row("baseline"), make_row("baseline@5"), make_row("heun@5")],
    }


def test_round_trip(results: Any, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.json"
    save_results(results, path)
    assert load_results(path) == results
    assert load_results(path.parent) == results
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_unknown_keys_survive(results: Any, tmp_path: Path) -> None:
    results["rows"][0]["note"] = {"from": "somebody"}
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results


def test_an_undefined_value_is_allowed(results: Any) -> None:
    results["rows"][0]["metrics"]["kid"] |= {"value": None, "stderr": None, "ci95": None}
    check_results(results)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_hold_is_named_and_the_old_file_stays(
    results: Any, tmp_path: Path, number: float
) -> None:
    path = tmp_path / "results.json"
    save_results(results, path)
    broken = copy.deepcopy(results)
    broken["rows"][2]["metrics"]["kid"]["ci95"][1] = number
    with pytest.raises(ValueError, match=r"rows\[2\]\.metrics\.kid\.ci95\[1\] is -?(nan|inf)"):
        save_results(broken, path)
    assert load_results(path) == results
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_nan_in_a_free_key_and_in_a_file(results: Any, tmp_path: Path) -> None:
    results["rows"][0]["extra"] = [{"loss": math.nan}]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    for refuse in (lambda: save_results(results, path), lambda: load_results(path)):
        with pytest.raises(ValueError, match=r"rows\[0\]\.extra\[0\]\.loss is nan"):
            refuse()


def test_a_failed_replace_leaves_no_temporary_file(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_results(results, tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("rows", 1, "nfe"), None, r"rows\[1\]\.nfe must be float, got None"),
        (("rows", 1, "nfe"), "many", r"rows\[1\]\.nfe must be float, got 'many'"),
        (("rows", 1, "pareto"), 1, r"rows\[1\]\.pareto must be bool, got 1"),
        (("rows", 1, "num_inference_steps"), True, r"num_inference_steps must be int, got True"),
        (("rows", 0, "metrics", "kid", "ci95"), [1.0], r"kid\.ci95 must be \[low, high\], got 1 values"),
        (("rows", 0, "metrics"), [], r"rows\[0\]\.metrics must be an object, got list"),
        (("rows",), [], "rows is empty"),
        (("rows", 1, "recipe"), "baseline", "must be unique, got more than once: baseline"),
        (("environment", "folder"), Path("x"), r"environment\.folder is a \w*Path"),
        (("schema",), SCHEMA_VERSION + 1, "update flowaccel"),
        (("schema",), 0, "evaluate again"),
    ],
)
def test_broken_results_are_named(results: Any, where: tuple[Any, ...], value: object, message: str) -> None:
    owner = results
    for key in where[:-1]:
        owner = owner[key]
    owner[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_results(results)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("protocol",), "protocol is missing"),
        (("rows", 2, "latency_ms_per_image", "p90"), r"rows\[2\]\.latency_ms_per_image\.p90 is missing"),
        (("rows", 0, "metrics", "kid", "display"), r"rows\[0\]\.metrics\.kid\.display is missing"),
        (("schema",), "no key 'schema'"),
    ],
)
def test_missing_keys_are_named(results: Any, where: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    owner = results
    for key in where[:-1]:
        owner = owner[key]
    del owner[where[-1]]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=message) as caught:
        load_results(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no result file at"):
        load_results(tmp_path / "absent.json")
    for content in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not JSON"):
            load_results(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a flowaccel result"):
        load_results(tmp_path)


def test_row_by_name(results: Any) -> None:
    assert row(results, "heun@5") is results["rows"][2]
    with pytest.raises(ValueError, match=r"no row called 'heum@5': did you mean 'heun@5'\? rows are baseline, "):
        row(results, "heum@5")


def test_environment_names_versions_and_no_machine() -> None:
    found = environment("cpu")
    assert {"torch", "diffusers", "python", "platform", "device", "cpu", "threads"} <= set(found)
    assert found["device"] == "cpu"
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
