"""cache-dit as a row of an evaluation, in the process of its own that it needs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from flowaccel import UnsupportedModelError
from flowaccel.evaluation import (
    Classes,
    Protocol,
    Results,
    Timing,
    compare_rows,
    console_table,
    evaluate,
    markdown_table,
    parse_baseline,
    runner,
)
from flowaccel.evaluation.baselines.baselines import OPTIONS
from flowaccel.evaluation.results import row
from flowaccel.pipelines import load_pipeline

cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed: pip install 'flowaccel[cache-dit]'")
process = pytest.importorskip("flowaccel.evaluation.baselines.cache_dit_process")
pytestmark = pytest.mark.slow

STEPS, LAYERS = 6, 3
EXACT = "cache-dit:Fn_compute_blocks=1,max_warmup_steps=1,residual_diff_threshold=0"
CACHED = "cache-dit:Fn_compute_blocks=1,max_warmup_steps=2,residual_diff_threshold=1e9,taylorseer_order=1"
PROTOCOL = Protocol(
    conditions=Classes(tuple(range(10))),
    steps=STEPS,
    num_samples=6,
    batch_size=3,
    features="zoo:digits-features",
    metrics=("kid", "rel_l2"),
    resamples=10,
    rounds=2,
    latency_batch=2,
)


class Interruption(BaseException):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "pipe"
    tiny.sit_pipeline(num_layers=LAYERS).save_pretrained(path)
    return path


def run(folder: Path, out: Path, *names: str, pipe: Any = None, notify: Any = None, **changes: Any) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_figures", lambda *_: None)
        protocol = replace(PROTOCOL, baselines=names, **changes)
        return evaluate(pipe or load_pipeline(folder), [], protocol, out, notify or (lambda *_: None))


def samples(out: Path, row: str) -> dict[str, bytes]:
    kept = [path for path in sorted(out.rglob("*.png")) if path.parent.parent.name.startswith(row)]
    return {path.name: path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(folder, out, EXACT, CACHED)


def test_the_options_are_those_of_cache_dit() -> None:
    fields = {field.name for field in dataclasses.fields(cache_dit.DBCacheConfig)}
    assert set(OPTIONS["cache-dit"]) - {"taylorseer_order"} == fields - {"cache_type"}


def test_a_cache_that_never_reuses_changes_no_bit(whole: tuple[Path, Results]) -> None:
    out, results = whole
    manifests = [json.loads(path.read_text()) for path in out.rglob("manifest.json")]
    assert [m["batch_size"] for m in manifests if m["recipe"]] == [3, 3]
    entry = row(results, EXACT)
    assert entry["metrics"]["rel_l2"]["value"] == 0
    assert entry["speedup"]["macs"] == pytest.approx(1)


def test_a_cache_that_reuses_leaves_work_out(whole: tuple[Path, Results]) -> None:
    entry = row(whole[1], CACHED)
    assert entry["family"] == "cache-dit"
    assert entry["metrics"]["rel_l2"]["value"] > 0
    assert entry["nfe"] == row(whole[1], "baseline")["nfe"]
    evaluations = 2 * STEPS  # Heun's method
    share = (2 * LAYERS + evaluations - 2) / (LAYERS * evaluations)
    assert share < 1 / entry["speedup"]["macs"] < 1.15 * share
    assert entry["baseline"]["package"] == f"cache-dit {cache_dit.__version__}"


def test_times_are_those_of_its_own_process(whole: tuple[Path, Results]) -> None:
    results = whole[1]
    here = row(results, "baseline")["latency_ms_per_image"]["per_round"]
    for name in (EXACT, CACHED):
        entry = row(results, name)
        own = entry["own_process"]
        there, timed = (Timing(seconds=tuple(own[key]), first_call_s=0) for key in ("untouched_per_round", "per_round"))
        assert entry["speedup"]["wall_clock"]["value"] == pytest.approx(there.ratio_to(timed).value)
        carried = [h * t / u for h, t, u in zip(here, timed.seconds, there.seconds, strict=True)]
        assert entry["latency_ms_per_image"]["per_round"] == pytest.approx(carried)
        assert "process of its own" in entry["remark"] and "batches of 3" in entry["remark"]


def test_reports_say_so(whole: tuple[Path, Results]) -> None:
    assert "own process" in markdown_table(whole[1])
    assert "process of its own" in str(console_table(whole[1]).caption)


def test_compare_takes_the_ratio_of_the_process(whole: tuple[Path, Results]) -> None:
    out, results = whole
    found = compare_rows(out, "baseline", CACHED)
    assert found["wall_clock"]["ratio"] == pytest.approx(row(results, CACHED)["speedup"]["wall_clock"]["value"])
    assert compare_rows(out, EXACT, CACHED)["wall_clock"]["ratio"] > 0


def test_killed_it_goes_on_and_ends_with_the_same_files(
    folder: Path, tmp_path: Path, whole: tuple[Path, Results]
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "samples" and done == PROTOCOL.num_samples + PROTOCOL.batch_size:
            raise Interruption

    with pytest.raises(Interruption):
        run(folder, tmp_path, CACHED, notify=interrupt)
    begun = samples(tmp_path, "row_cache-dit")
    assert len(begun) >= 3  # the process may have been ahead of the news
    (next(tmp_path.rglob("row_cache*")) / "samples" / "000001.png").unlink()
    run(folder, tmp_path, CACHED)
    made = samples(tmp_path, "row_cache-dit")
    assert len(made) == 6
    assert made == samples(whole[0], "row_cache-dit_Fn_compute_blocks_1_max_warmup_steps_2")


def test_an_unsupported_network_is_found_first(tmp_path: Path) -> None:
    tiny.sit_pipeline(num_layers=LAYERS).save_pretrained(tmp_path / "pipe")
    with pytest.raises(UnsupportedModelError, match=r"SiTTransformer2DModel: cache-dit .* fails in a trial"):
        run(tmp_path / "pipe", tmp_path / "run", "cache-dit:Fn_compute_blocks=4")
    assert not list((tmp_path / "run").rglob("*.png"))


def test_pipelines_that_cache_dit_does_not_know() -> None:
    pipe = tiny.sd3_pipeline()
    unknown = type("UnknownPipeline", (type(pipe),), {})(**pipe.components)
    with (
        pytest.raises(UnsupportedModelError, match="does not support UnknownPipeline"),
        process.cached(unknown, parse_baseline("cache-dit")),
    ):
        pass


def test_another_pipeline_than_the_one_on_disk_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe: Any = load_pipeline(folder)
    with torch.no_grad():
        pipe.transformer.patch_embed.weight += 1
    with pytest.raises(ValueError, match=r"another pipeline .*other weights.*save_pretrained"):
        run(folder, tmp_path, EXACT, pipe=pipe)
    assert not list(tmp_path.rglob("*.png"))
