"""Other libraries' accelerators as rows: how they are named, what diffusers' caches do, and a whole evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import families
import tiny
from flowaccel import FlowaccelError, MissingExtraError, UnsupportedModelError
from flowaccel.evaluation import Classes, Protocol, Results, Timing, evaluate, runner
from flowaccel.evaluation.baselines import baselines
from flowaccel.evaluation.baselines import subprocess_worker as own_process
from flowaccel.evaluation.baselines.baselines import OPTIONS, Baseline, calibrated, check_native, native, parse_baseline
from flowaccel.evaluation.baselines.subprocess_worker import OwnProcess, carried_over
from flowaccel.evaluation.protocol import call, plan_rows
from flowaccel.evaluation.results import row
from flowaccel.evaluation.samples.processes import World

LAYERS, STEPS = 3, 10
PROTOCOL = Protocol(
    conditions=Classes(tuple(range(10))),
    steps=STEPS,
    num_samples=12,
    batch_size=4,
    features="zoo:digits-features",
    metrics=("kid", "rel_l2"),
    resamples=10,
    rounds=2,
    latency_batch=4,
)
FBC, TAYLOR, MAG = "native:fbc:threshold=1e9", "native:taylorseer:cache_interval=3", "native:mag:threshold=1e9"


def pipeline(**config: Any) -> Any:
    pipe = tiny.sit_pipeline(**config)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipe


def sample(pipe: Any, ids: Any = (0, 1, 2), steps: int = STEPS) -> torch.Tensor:
    return call(pipe, PROTOCOL, list(ids), steps)


@contextlib.contextmanager
def counted(network: Any, path: str = "transformer_blocks") -> Iterator[list[list[int]]]:
    """Calls of the attention and of the feed-forward module of every block: what a skipped block does not call."""
    counts = [[0, 0] for _ in getattr(network, path)]

    def count(index: int, part: int) -> Any:
        def hook(*_: Any) -> None:
            counts[index][part] += 1

        return hook

    handles = [
        block.get_submodule(name).register_forward_hook(count(index, part))
        for index, block in enumerate(getattr(network, path))
        for part, name in enumerate(("attn.to_q", "ff"))
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# names


def test_a_name_alone_and_with_options() -> None:
    plain = parse_baseline("native:taylorseer")
    assert (plain.name, plain.method, plain.family, plain.options) == (
        "native:taylorseer",
        "native:taylorseer",
        "native",
        {},
    )
    full = parse_baseline("native:taylorseer:cache_interval=3,taylor_factors_dtype=float32,use_lite_mode=true")
    assert full.options == {"cache_interval": 3, "taylor_factors_dtype": torch.float32, "use_lite_mode": True}
    assert parse_baseline("native:mag:mag_ratios=1.0/0.5/1.25").options == {"mag_ratios": [1.0, 0.5, 1.25]}
    cache_dit = parse_baseline("cache-dit:Fn_compute_blocks=1,taylorseer_order=2,steps_computation_mask=1/0/1")
    assert cache_dit.family == cache_dit.method == "cache-dit"
    assert cache_dit.options == {"Fn_compute_blocks": 1, "taylorseer_order": 2, "steps_computation_mask": [1, 0, 1]}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fbc", ["unknown baseline 'fbc'", "native:fbc", "cache-dit"]),
        ("native:fcb", ["did you mean 'native:fbc'?"]),
        ("native:fbcx:threshold=1", ["unknown baseline"]),
        ("", ["unknown baseline ''"]),
        ("native:fbc:treshold=0.1", ["unknown option 'treshold'", "options of native:fbc are threshold"]),
        ("native:mag:num_inference_steps=3", ["unknown option", "max_skip_steps, retention_ratio, mag_ratios"]),
        ("native:fbc:threshold", ["threshold must be a finite number, got True"]),
        ("native:fbc:threshold=", ["threshold must be a finite number, got ''"]),
        ("native:fbc:threshold=low", ["threshold must be a finite number, got 'low'"]),
        ("native:fbc:threshold=nan", ["threshold must be a finite number"]),
        ("native:fbc:threshold=1,threshold=2", ["given twice"]),
        ("native:taylorseer:use_lite_mode=1", ["use_lite_mode must be true or false, got 1"]),
        ("native:fbc:=0.1", ["options of 'native:fbc' look like", "options of native:fbc are threshold"]),
        ("native:mag:mag_ratios=1/x", ["mag_ratios must be numbers separated by /, got '1/x'"]),
        ("native:taylorseer:max_order=1.5", ["max_order must be an integer"]),
        ("cache-dit:fn=1", ["unknown option 'fn'", "Fn_compute_blocks", "taylorseer_order"]),
    ],
)
def test_bad_names(text: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Protocol(conditions=Classes((0,)), steps=2, baselines=(text,))
    for part in parts:
        assert part in str(error.value)


def test_the_options_are_those_of_diffusers() -> None:
    configs = {
        "native:fbc": diffusers.FirstBlockCacheConfig,
        "native:taylorseer": diffusers.TaylorSeerCacheConfig,
        "native:mag": diffusers.MagCacheConfig,
    }
    for method, config in configs.items():
        own = {"num_inference_steps", "calibrate"} if method == "native:mag" else set()
        assert set(OPTIONS[method]) == {field.name for field in dataclasses.fields(config)} - own


def test_rows_follow_the_fewer_steps() -> None:
    rows = plan_rows((), replace(PROTOCOL, baseline_steps=(5,), baselines=(FBC, "cache-dit")))
    assert [(r.name, r.family, r.steps) for r in rows] == [
        ("baseline", "baseline", STEPS),
        ("baseline@5", "baseline", 5),
        (FBC, "native", STEPS),
        ("cache-dit", "cache-dit", STEPS),
    ]
    with pytest.raises(ValueError, match="different names"):
        plan_rows((), replace(PROTOCOL, baselines=(FBC, FBC)))


# diffusers' caches


def test_first_block_cache_skips_all_but_the_first_block() -> None:
    pipe = pipeline()
    with counted(pipe.transformer) as calls, native(pipe, parse_baseline(FBC)):
        sample(pipe)
    assert calls == [[STEPS, STEPS]] + [[1, 1]] * (LAYERS - 1)


def test_taylorseer_skips_attention_and_nothing_else() -> None:
    pipe = pipeline()
    with counted(pipe.transformer) as calls, native(pipe, parse_baseline(TAYLOR)):
        sample(pipe)
    computed = [step for step in range(STEPS) if step < 3 or (step - 4) % 3 == 0]
    assert calls == [[len(computed), STEPS]] * LAYERS


def test_mag_cache_skips_whole_networks() -> None:
    pipe = pipeline()
    baseline = parse_baseline("native:mag:threshold=1e9,max_skip_steps=2,retention_ratio=0.3")
    settings = calibrated(pipe, baseline, lambda ids: sample(pipe, ids))
    assert settings["num_inference_steps"] == STEPS == len(settings["mag_ratios"])
    assert settings["mag_ratios"][0] == 1.0
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in settings["mag_ratios"])
    with counted(pipe.transformer) as calls, native(pipe, baseline, **settings):
        sample(pipe)
    assert calls == [[3 + 2, 3 + 2]] * LAYERS  # 3 kept steps, then .. C .. C .


def test_mag_cache_counts_the_evaluations_of_the_scheduler() -> None:
    """Heun's method takes two network calls a step; a count of steps would start MagCache anew in the middle."""
    pipe = tiny.sit_pipeline()
    settings = calibrated(pipe, parse_baseline("native:mag"), lambda ids: sample(pipe, ids, 4))
    assert settings["num_inference_steps"] == 8 == len(settings["mag_ratios"])
    given = parse_baseline("native:mag:mag_ratios=1.0/0.9")
    assert calibrated(pipe, given, lambda ids: sample(pipe, ids, 4)) == {"num_inference_steps": 8}


def test_it_is_what_a_user_of_diffusers_gets() -> None:
    pipe = pipeline()
    with native(pipe, parse_baseline("native:fbc:threshold=0.05")):
        found = sample(pipe)
    assert not torch.equal(found, sample(pipe))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.05))
    with pipe.transformer.cache_context("inference"):
        assert torch.equal(found, sample(pipe))


@pytest.mark.parametrize("text", [FBC, TAYLOR, MAG])
def test_every_call_starts_afresh_and_leaves_nothing_behind(text: str) -> None:
    pipe = pipeline()
    baseline = parse_baseline(text)
    settings = {"num_inference_steps": STEPS, "mag_ratios": [1.0]} if text == MAG else {}

    def latents(**options: Any) -> torch.Tensor:
        generators = tiny.generators(0, 1, 2)
        return pipe([1, 2, 3], STEPS, generator=generators, output_type="latent", **options).images

    def cached(**options: Any) -> torch.Tensor:
        with native(pipe, baseline, **settings):
            return latents(**options)

    before, state = latents(), tiny.snapshot(pipe)
    first = cached()
    with pytest.raises(ZeroDivisionError):
        cached(callback_on_step_end=lambda pipe, index, *_: 1 // (4 - index) and {})
    assert torch.equal(cached(), first)
    assert not torch.equal(first, before)
    assert tiny.snapshot(pipe) == state
    assert torch.equal(latents(), before)


def test_a_threshold_of_zero_changes_no_bit() -> None:
    pipe = pipeline()
    untouched = sample(pipe)
    with native(pipe, parse_baseline("native:fbc:threshold=0")):
        assert torch.equal(sample(pipe), untouched)


def test_split_guidance_without_contexts_keeps_the_branches_apart() -> None:
    """FluxImg2ImgPipeline calls its network twice a step and opens no context."""
    pipe = families.flux_img2img()
    case = next(case for case in families.CASES.values() if case.make is families.flux_img2img)
    with counted(pipe.transformer) as calls, native(pipe, parse_baseline(FBC)):
        case(pipe)
    assert calls[0] == [2 * families.STEPS, 2 * families.STEPS]
    assert calls[1] == [2, 2]  # the first call of each branch


def test_contexts_of_the_pipeline_are_left_alone() -> None:
    pipe = tiny.flux_pipeline()
    arguments = tiny.flux_arguments(steps=6, true_scale=2.0)
    with native(pipe, parse_baseline("native:fbc:threshold=0.2")):
        found = pipe(**arguments).images
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    again = pipe(**tiny.flux_arguments(steps=6, true_scale=2.0)).images
    assert torch.equal(found, again)


def refusal(pipe: Any, text: str) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        check_native(pipe, parse_baseline(text), lambda steps: sample(pipe, steps=steps), STEPS)
    return str(error.value)


@pytest.mark.parametrize("text", [FBC, TAYLOR, MAG, "native:taylorseer:cache_identifiers=.*ff"])
def test_a_trial_passes_where_it_works(text: str) -> None:
    pipe = pipeline()
    sample(pipe, steps=4)
    state = tiny.snapshot(pipe)
    check_native(pipe, parse_baseline(text), lambda steps: sample(pipe, steps=steps), STEPS)
    assert tiny.snapshot(pipe) == state


def test_networks_without_caches_are_refused() -> None:
    message = refusal(tiny.sd3_pipeline(), FBC)
    assert FBC in message and "SD3Transformer2DModel" in message and "no enable_cache" in message


def test_the_reason_is_that_of_diffusers() -> None:
    message = refusal(pipeline(num_layers=1), FBC)
    assert message.startswith(f"baseline {FBC} does not work with SiTTransformer2DModel: diffusers ")
    assert "IndexError: pop from empty list" in message
    assert "ZeroDivisionError" in refusal(pipeline(), "native:taylorseer:cache_interval=0")
    assert "found nothing" in refusal(pipeline(), "native:taylorseer:cache_identifiers=nothing")


def test_a_failed_trial_leaves_nothing_behind() -> None:
    pipe = pipeline(num_layers=1)
    sample(pipe)
    state = tiny.snapshot(pipe)
    refusal(pipe, FBC)
    assert tiny.snapshot(pipe) == state


def test_a_cache_that_is_on_already_is_refused() -> None:
    pipe = pipeline()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="disable_cache"):
        check_native(pipe, parse_baseline(TAYLOR), lambda steps: sample(pipe, steps=steps), STEPS)


# a whole evaluation


def run(out: Path, *names: str, pipe: Any = None, **changes: Any) -> Results:
    options = {"notify": changes.pop("notify")} if "notify" in changes else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_figures", lambda *_: None)
        return evaluate(pipe or pipeline(), [], replace(PROTOCOL, baselines=names, **changes), out, **options)


def samples(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, FBC, TAYLOR, MAG)


@pytest.mark.slow
def test_rows_of_the_result(whole: tuple[Path, Results]) -> None:
    results = whole[1]
    base = row(results, "baseline")
    for name in (FBC, TAYLOR, MAG):
        entry = row(results, name)
        assert entry["family"] == "native"
        assert entry["speedup"]["macs"] > 1
        assert entry["nfe"] == base["nfe"] == STEPS  # the network is called; its blocks are not
        assert entry["metrics"]["rel_l2"]["value"] > 0
        assert len(entry["latency_ms_per_image"]["per_round"]) == 2
        assert entry["baseline"]["name"] == parse_baseline(name).method
        assert entry["baseline"]["package"] == f"diffusers {diffusers.__version__}"
        assert "remark" not in entry and "own_process" not in entry
    assert len(row(results, MAG)["baseline"]["mag_ratios"]) == STEPS
    assert "baseline" not in base
    assert results["protocol"]["baselines"] == [FBC, TAYLOR, MAG]


@pytest.mark.slow
def test_multiply_adds_are_those_of_the_blocks_that_ran(whole: tuple[Path, Results]) -> None:
    results = whole[1]
    share = (STEPS + LAYERS - 1) / (STEPS * LAYERS)  # of the blocks
    assert share < 1 / row(results, FBC)["speedup"]["macs"] < 1.1 * share  # and the ends of the network


@pytest.mark.slow
def test_killed_in_a_batch_it_ends_with_the_same_files(tmp_path: Path, whole: tuple[Path, Results]) -> None:
    run(tmp_path, FBC, TAYLOR, MAG)
    assert samples(tmp_path) == samples(whole[0])
    for path in tmp_path.rglob("00000[1267].png"):
        path.unlink()
    run(tmp_path, FBC, TAYLOR, MAG)
    assert samples(tmp_path) == samples(whole[0])


@pytest.mark.slow
def test_what_decides_for_a_batch_needs_the_same_batches(tmp_path: Path) -> None:
    run(tmp_path, FBC, num_samples=4)
    with pytest.raises(ValueError, match="batch_size: there 4, now 2"):
        run(tmp_path, FBC, num_samples=4, batch_size=2)
    results = run(tmp_path / "other", FBC, TAYLOR, num_samples=4, latency_batch=2)
    assert "batches of 4" in row(results, FBC)["remark"] and "batches of 2" in row(results, FBC)["remark"]
    assert "remark" not in row(results, TAYLOR)


def test_processes_share_whole_batches() -> None:
    rows = plan_rows((), replace(PROTOCOL, baselines=(FBC,)))
    parts = []
    for rank in range(2):
        part = runner._Evaluation(pipe=None, protocol=PROTOCOL, rows=rows, out=Path("."), notify=print)
        part.world = World(rank, 2)
        parts.append([runner._share(part, r, part.ids) for r in rows])
    assert parts[0][1] == [[0, 1, 2, 3], [8, 9, 10, 11]] and parts[1][1] == [[4, 5, 6, 7]]
    assert parts[0][0] == [[0, 2, 4, 6], [8, 10]]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cache-dit", MissingExtraError, r"pip install 'flowaccel\[cache-dit\]'"),
        (TAYLOR, UnsupportedModelError, "SD3Transformer2DModel"),
    ],
)
def test_nothing_is_made_before_everything_is_known_to_work(
    name: str, error: type[FlowaccelError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(library: str) -> str:
        if library == "cache-dit":
            raise PackageNotFoundError(library)
        return "1"

    monkeypatch.setattr(baselines, "version", missing)
    pipe = pipeline() if name == "cache-dit" else tiny.sd3_pipeline()
    if name != "cache-dit":
        monkeypatch.setattr(runner, "call", lambda *_: None)
    with pytest.raises(error, match=message):
        run(tmp_path, name, pipe=pipe, metrics=("kid",))
    assert not samples(tmp_path) and not list(tmp_path.rglob("manifest.json"))


# a process of its own


def test_a_pipeline_made_in_memory_cannot_be_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "version", lambda _: "1")
    with pytest.raises(ValueError, match="save_pretrained"):
        run(tmp_path, "cache-dit")


@pytest.mark.slow
@pytest.mark.usefixtures("process")
def test_a_process_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_process, "_MODULE", "flowaccel.no_such_module")
    pipe = pipeline()
    pipe.register_to_config(_name_or_path="somewhere")
    baseline = Baseline(name="cache-dit", method="cache-dit", options={})
    ended = r"row cache-dit ended with code 1 \(.*no_such_module.*process.log"
    with (
        pytest.raises(OSError, match=ended),
        OwnProcess(pipe, baseline, PROTOCOL, tmp_path, tmp_path / "row") as process,
    ):
        process.check({})


def test_times_are_carried_over_round_by_round() -> None:
    here = Timing(seconds=(10.0, 20.0, 30.0), first_call_s=9.0)
    there = Timing(seconds=(1.0, 3.0, 2.0), first_call_s=1.0)
    own = Timing(seconds=(0.5, 1.0, 2.0), first_call_s=4.0)
    found = carried_over(here, there, own)
    assert found.seconds == pytest.approx((5.0, 20 / 3, 30.0))
    assert found.first_call_s == 4.0
    assert here.ratio_to(found).value == pytest.approx(there.ratio_to(own).value)
    assert here.ratio_to(found).ci95 == pytest.approx(there.ratio_to(own).ci95)


@pytest.mark.slow
def test_manifest_names_the_package(whole: tuple[Path, Results]) -> None:
    manifests = [json.loads(path.read_text()) for path in whole[0].rglob("manifest.json")]
    named = {m["recipe"][0]["name"]: m for m in manifests if m["recipe"]}
    assert set(named) == {"native:fbc", "native:taylorseer", "native:mag"}
    assert named["native:fbc"]["recipe"][0]["options"] == {"threshold": "1e9"}
    assert named["native:fbc"]["batch_size"] == 4
    assert "batch_size" not in named["native:mag"]
