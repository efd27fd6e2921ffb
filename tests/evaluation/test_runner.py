"""A whole evaluation of a tiny pipeline: what it writes, what it counts, and that it survives interruptions."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from flowaccel import Recipe, accelerate, is_accelerated
from flowaccel.evaluation import Classes, Prompts, Protocol, Results, evaluate, load_features, runner
from flowaccel.evaluation.results import check_results, load_results, row
from flowaccel.evaluation.runner import call, plan_rows
from flowaccel.recipe import preset

CLASSES = Classes(tuple(range(10)))
PROTOCOL = Protocol(
    conditions=CLASSES,
    steps=4,
    baseline_steps=(2,),
    num_samples=20,
    batch_size=8,
    features="test_runner:Small",
    resamples=20,
    rounds=2,
    latency_batch=2,
)
FLOWTURBO = "flowturbo-H1P2R2"


class Small(torch.nn.Module):
    """Eight features, so that twenty samples are enough: mean and spread of each quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        quarters = images.float().unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)
        return torch.cat([quarters.mean(-1), quarters.std(-1)], dim=1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features @ torch.randn(8, 10, generator=torch.Generator().manual_seed(0))


class Interruption(BaseException):
    pass


def singly(pipe: Any, protocol: Protocol, ids: Any, steps: int) -> torch.Tensor:
    """`call` one image at a time: what comes back cannot depend on the batch, on no machine."""
    return torch.cat([call(pipe, protocol, [sample_id], steps) for sample_id in ids])


def pipeline() -> Any:
    return tiny.sit_pipeline(num_layers=1)


def recipes(pipe: Any) -> list[Recipe]:
    return [preset("euler@3"), tiny.flowturbo(tiny.random_refiner(pipe.transformer))]


def run(out: Path, protocol: Protocol = PROTOCOL, make: Callable[..., Any] = singly, **options: Any) -> Results:
    pipe = options.pop("pipe", None) or pipeline()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "call", make)
        if not options.pop("figures", False):
            patch.setattr(runner, "write_figures", lambda *_: None)
        return evaluate(pipe, options.pop("recipes", None) or recipes(pipe), protocol, out, **options)


def files(out: Path) -> dict[str, bytes]:
    """Every sample and manifest."""
    rows = out / "rows"
    return {str(path.relative_to(rows)): path.read_bytes() for path in sorted(rows.rglob("*")) if path.is_file()}


def numbers(results: Results) -> list[Any]:
    """What does not depend on the clock."""
    timed = {"latency_ms_per_image", "stages", "first_call_s", "throttled", "speedup", "pareto"}
    return [{key: value for key, value in entry.items() if key not in timed} for entry in results["rows"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, figures=True)


def test_files_are_there(whole: tuple[Path, Results]) -> None:
    out, results = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "pareto.png",
        "report.html",
        "results.json",
        "rows",
        "samples.png",
    ]
    for name in ("pareto.png", "samples.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 30
    report = (out / "report.html").read_text()
    assert FLOWTURBO in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert load_results(out) == json.loads(json.dumps(results))
    assert len(list((out / "rows" / "baseline@2" / "samples").iterdir())) == PROTOCOL.num_samples


def test_result_is_valid_and_ordered(whole: tuple[Path, Results]) -> None:
    results = whole[1]
    check_results(results)
    assert [entry["recipe"] for entry in results["rows"]] == ["baseline", "baseline@2", "euler@3", FLOWTURBO]
    assert [entry["num_inference_steps"] for entry in results["rows"]] == [4, 2, 3, 5]
    assert [entry["family"] for entry in results["rows"]] == ["baseline", "baseline", "euler", "flowturbo"]
    protocol: Any = results["protocol"]
    assert protocol["dataset"] == "10 classes"
    assert protocol["feature_extractor"] == "test_runner:Small"
    assert protocol["fingerprint"] == load_features("test_runner:Small").fingerprint
    assert (protocol["num_samples"], protocol["seed"], protocol["batch_size"]) == (20, 0, 8)
    assert "guidance_scale" not in protocol
    assert any(entry["pareto"] for entry in results["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nfe", "network_rows", "refiner_rows"),
    [("baseline", 8, 16, 0), ("baseline@2", 4, 8, 0), ("euler@3", 3, 6, 0), (FLOWTURBO, 4, 8, 8)],
)
def test_evaluations_are_counted_exactly(
    name: str, nfe: int, network_rows: int, refiner_rows: int, whole: tuple[Path, Results]
) -> None:
    entry = row(whole[1], name)
    assert (entry["nfe"], entry["network_rows"], entry["refiner_rows"]) == (nfe, network_rows, refiner_rows)


@pytest.mark.slow
def test_without_guidance_an_evaluation_is_one_row(tmp_path: Path) -> None:
    results = run(tmp_path, replace(PROTOCOL, guidance_scale=1.0, metrics=("kid",), baseline_steps=()))
    assert [(e["nfe"], e["network_rows"], e["refiner_rows"]) for e in results["rows"]] == [
        (8, 8, 0),
        (3, 3, 0),
        (4, 4, 4),
    ]
    assert results["protocol"]["guidance_scale"] == 1.0


def row_macs(network: Any) -> int:
    """Multiply-adds of one row of a SiT network."""
    config = network.config
    width = config.num_attention_heads * config.attention_head_dim
    patch = config.patch_size**2
    tokens = (config.sample_size // config.patch_size) ** 2
    block = tokens * (4 + 2 * config.mlp_ratio) * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * patch * config.in_channels * width + tokens * width * patch * network.computed_channels
    return int(config.num_layers * block + ends + (256 + width) * width + 2 * width**2)


def test_multiply_adds_are_those_of_the_formula(whole: tuple[Path, Results]) -> None:
    network = pipeline().transformer
    per_network_row, per_refiner_row = row_macs(network), row_macs(tiny.random_refiner(network))
    base = row(whole[1], "baseline")
    for entry in whole[1]["rows"]:
        expected = entry["network_rows"] * per_network_row + entry["refiner_rows"] * per_refiner_row
        assert entry["macs_per_image"] == pytest.approx(expected, rel=0.01)
        ratio = base["network_rows"] * per_network_row / expected
        assert entry["speedup"]["macs"] == pytest.approx(ratio, rel=0.01)
    assert row(whole[1], "baseline@2")["speedup"]["macs"] == 2.0


def test_timing_entries(whole: tuple[Path, Results]) -> None:
    for entry in whole[1]["rows"]:
        latency = entry["latency_ms_per_image"]
        assert latency["rounds"] == len(latency["per_round"]) == PROTOCOL.rounds
        assert 0 < latency["p10"] <= latency["median"] <= latency["p90"]
        assert set(entry["stages"]) == {"network", "total"}
        assert 0 < entry["stages"]["network"] <= entry["stages"]["total"]
        assert entry["first_call_s"] > 0
    assert row(whole[1], "baseline")["speedup"]["wall_clock"]["value"] == 1.0


def test_metrics_and_paired_differences(whole: tuple[Path, Results]) -> None:
    results = whole[1]
    assert set(row(results, "baseline")["metrics"]) == {"fid", "kid", "class_accuracy"}
    for name in ("baseline@2", "euler@3", FLOWTURBO):
        metrics = row(results, name)["metrics"]
        assert set(metrics) == {"fid", "kid", "class_accuracy", "rel_l2"}
        others = {"baseline", "baseline@2"} - {name}
        for metric in ("fid", "kid", "class_accuracy"):
            assert set(metrics[metric]["versus"]) == others
            for other in others:
                expected = metrics[metric]["value"] - row(results, other)["metrics"][metric]["value"]
                assert metrics[metric]["versus"][other]["difference"] == pytest.approx(expected)
        assert all(metric["n"] == 20 for metric in metrics.values())
        assert metrics["rel_l2"]["value"] > 0
    assert row(results, "baseline")["metrics"]["fid"]["display"] == "Frechet distance, test_runner:Small, n=20"


@pytest.mark.slow
def test_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = pipeline()
    call(pipe, PROTOCOL, [0], 2)
    state = tiny.snapshot(pipe)
    run(tmp_path, replace(PROTOCOL, metrics=("kid",)), pipe=pipe)
    assert not is_accelerated(pipe)
    assert tiny.snapshot(pipe) == state


def interrupted_call(after: int) -> Callable[..., Any]:
    """`runner.call` that is interrupted in its call number `after`, counted from 0."""
    calls: list[int] = []

    def interrupted(pipe: Any, protocol: Protocol, ids: Any, steps: int) -> Any:
        if len(calls) == after:
            raise Interruption
        calls.append(len(ids))
        return singly(pipe, protocol, ids, steps)

    return interrupted


@pytest.mark.slow
@pytest.mark.parametrize(("after", "batch_size"), [(1, 8), (4, 3), (11, 20)])
def test_interrupted_and_resumed_equals_uninterrupted(
    after: int, batch_size: int, tmp_path: Path, whole: tuple[Path, Results]
) -> None:
    pipe = pipeline()
    with pytest.raises(Interruption):
        run(tmp_path, make=interrupted_call(after), pipe=pipe)
    assert not is_accelerated(pipe)
    assert not (tmp_path / "results.json").exists()
    made = len([name for name in files(tmp_path) if name.endswith(".png")])
    assert made == {1: 8, 4: 20 + 8, 11: 60 + 16}[after]
    results = run(tmp_path, replace(PROTOCOL, batch_size=batch_size), pipe=pipe)
    assert files(tmp_path) == files(whole[0])
    assert numbers(results) == numbers(whole[1])


@pytest.mark.slow
def test_interrupted_while_timing(tmp_path: Path, whole: tuple[Path, Results]) -> None:
    with pytest.raises(Interruption):
        run(tmp_path, make=interrupted_call(12 + 10))
    before = files(tmp_path)
    assert before == files(whole[0])
    results = run(tmp_path, replace(PROTOCOL, rounds=3, latency_batch=3))
    assert files(tmp_path) == before
    for mine, theirs in zip(results["rows"], whole[1]["rows"], strict=True):
        assert mine["metrics"] == theirs["metrics"]
        assert (mine["nfe"], mine["latency_ms_per_image"]["rounds"]) == (theirs["nfe"], 3)


def test_a_finished_run_makes_no_sample_again(whole: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.parent.name == "samples"}
    progress: list[tuple[str, int, int]] = []
    again = run(out, notify=lambda *step: progress.append(step))
    assert numbers(again) == numbers(results)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [step for step in progress if step[0] == "samples"] == [("samples", 80, 80)]


@pytest.mark.slow
def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run(tmp_path, replace(PROTOCOL, baseline_steps=(), metrics=("kid",)), notify=lambda *step: seen.append(step))
    by_stage = {stage: [step[1:] for step in seen if step[0] == stage] for stage, *_ in seen}
    assert by_stage["samples"][0] == (0, 60)
    assert by_stage["samples"][-1] == (60, 60)
    assert [done for done, _ in by_stage["samples"]] == sorted(done for done, _ in by_stage["samples"])
    assert by_stage["metrics"] == [(0, 1), (1, 1)]
    assert by_stage["timing"] == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_more_rows_and_samples_extend_a_run(tmp_path: Path, whole: tuple[Path, Results]) -> None:
    fewer = replace(PROTOCOL, num_samples=17, baseline_steps=())
    run(tmp_path, fewer, recipes=[preset("euler@3")])
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples/*.png")}
    results = run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert files(tmp_path) == files(whole[0])
    assert numbers(results) == numbers(whole[1])


@pytest.mark.slow
def test_full_disk_leaves_nothing_half_and_resumes(
    tmp_path: Path, whole: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes, written = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == 50:
            write_bytes(path, data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    assert list(tmp_path.rglob("*.tmp")) == []
    assert len(list(tmp_path.rglob("*.png"))) == 49 - 4  # one manifest for each row
    results = run(tmp_path)
    assert files(tmp_path) == files(whole[0])
    assert numbers(results) == numbers(whole[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: there 0, now 1"),
        ({"steps": 5}, "steps: there 4, now 5"),
        ({"guidance_scale": 3.0}, "guidance_scale: there None, now 3.0"),
        ({"conditions": Classes((1, 2))}, "conditions: there"),
    ],
)
def test_samples_made_differently_are_refused(change: dict[str, Any], named: str, whole: tuple[Path, Results]) -> None:
    before = files(whole[0])
    with pytest.raises(ValueError, match="holds samples made differently") as caught:
        run(whole[0], replace(PROTOCOL, **change))
    assert named in str(caught.value)
    assert files(whole[0]) == before


@pytest.mark.parametrize("what", ["weights", "scheduler", "refiner", "dtype", "decoder"])
def test_other_networks_are_refused(what: str, whole: tuple[Path, Results]) -> None:
    pipe, others = pipeline(), None
    if what == "weights":
        tiny.random_weights(pipe.transformer, 5, std=1e-3)
    elif what == "scheduler":
        pipe.scheduler = type(pipe.scheduler)("midpoint")
    elif what == "refiner":
        others = [preset("euler@3"), tiny.flowturbo(tiny.random_refiner(pipe.transformer, seed=12))]
    elif what == "dtype":
        pipe.transformer.bfloat16()
    else:
        pipe.vae = tiny.autoencoder(1)
    with pytest.raises(ValueError, match="holds samples made differently") as caught:
        run(whole[0], pipe=pipe, recipes=others)
    key = {"refiner": "weights", "decoder": "weights"}.get(what, what)
    assert f"{key}: there" in str(caught.value)


@pytest.mark.slow
def test_a_damaged_sample_is_named_and_made_again(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, baseline_steps=(), metrics=("kid",))
    results = run(tmp_path, protocol)
    sample = tmp_path / "rows" / "euler@3" / "samples" / "000007.png"
    before = sample.read_bytes()
    sample.write_bytes(before[:30])
    with pytest.raises(ValueError, match=r"euler@3.*000007\.png is missing or damaged .*delete it and run again"):
        run(tmp_path, protocol)
    sample.unlink()
    assert numbers(run(tmp_path, protocol)) == numbers(results)
    assert sample.read_bytes() == before


def test_samples_do_not_depend_on_the_batch() -> None:
    """Up to the rounding to 8 bits of an image that the network computes in another order."""
    pipe = pipeline()
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer)))
    together = call(pipe, PROTOCOL, [3, 4, 5], 5)
    alone = torch.cat([call(pipe, PROTOCOL, [i], 5) for i in (3, 4, 5)])
    assert together.dtype is torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1
    assert torch.equal(call(pipe, PROTOCOL, [3, 4, 5], 5), together)


@pytest.mark.slow
def test_fewer_samples_than_features_warn(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, baseline_steps=(), metrics=("fid",), features="zoo:digits-features")
    with pytest.warns(UserWarning, match="20 samples in 32 features is rank-deficient .*; take at least 64"):
        run(tmp_path, protocol, recipes=[preset("euler@3")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, replace(protocol, metrics=("kid",)), recipes=[preset("euler@3")])


@pytest.mark.slow
def test_all_metrics_together(tmp_path: Path) -> None:
    names = ("fid", "fid_inf", "kid", "class_accuracy", "precision", "recall", "psnr", "ssim", "rel_l2")
    protocol = replace(PROTOCOL, metrics=names, baseline_steps=(), resamples=5)
    results = run(tmp_path, protocol, recipes=[preset("euler@3"), preset("heun@4")])
    assert set(row(results, "euler@3")["metrics"]) == set(names)
    same = row(results, "heun@4")["metrics"]
    assert same["psnr"]["value"] is None
    assert same["psnr"]["identical_fraction"] == 1.0
    assert (same["ssim"]["value"], same["rel_l2"]["value"]) == (1.0, 0.0)
    assert same["fid"]["versus"]["baseline"]["difference"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metrics", "axis"),
    [
        (("class_accuracy",), "class_accuracy"),
        (("psnr",), "psnr"),
        (("class_accuracy", "rel_l2"), "rel_l2"),
        ((), None),
    ],
)
def test_any_choice_of_metrics_ends_with_a_report(metrics: tuple[str, ...], axis: str | None, tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, metrics=metrics, baseline_steps=(), resamples=5)
    results = run(tmp_path, protocol, recipes=[preset("euler@3")], figures=True)
    assert runner.quality_axis(results) == axis
    assert (tmp_path / "pareto.png").exists() == (axis is not None)
    assert any(entry["pareto"] for entry in results["rows"]) == (axis is not None)
    assert (tmp_path / "report.html").exists()
    assert load_results(tmp_path)["rows"][1]["recipe"] == "euler@3"


@pytest.mark.slow
def test_the_untouched_pipeline_alone(tmp_path: Path) -> None:
    """Errors against itself do not exist, so there is nothing to plot; the times are still worth having."""
    protocol = replace(PROTOCOL, metrics=("rel_l2",), baseline_steps=())
    results = run(tmp_path, protocol, recipes=[Recipe(name="same")], figures=True)
    assert [entry["recipe"] for entry in results["rows"]] == ["baseline", "same"]
    alone = evaluate(pipeline(), [], protocol, tmp_path / "alone")
    assert alone["rows"][0]["metrics"] == {}
    assert (tmp_path / "alone" / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"latency_batch": 0}, "latency_batch must be at least 1, got 0"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"rounds": 1}, "rounds must be at least 2 .*, got 1"),
        ({"metrics": ("fid", "kidd")}, "unknown metric 'kidd'; did you mean 'kid'"),
    ],
)
def test_wrong_protocol(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PROTOCOL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": "zoo:digit-features"},
            "unknown zoo entry 'zoo:digit-features': did you mean 'zoo:digits-features'",
        ),
        ({"features": "inceptoin"}, "features must be .*zoo:NAME or MODULE:ATTRIBUTE"),
        (
            {"reference": "zoo:digitz"},
            "unknown reference 'zoo:digitz': did you mean 'zoo:digits'.*there are ",
        ),
        ({"reference": "/nowhere"}, "a folder with images.*'/nowhere' has no images"),
        (
            {"features": "test_runner:Mean"},
            "metric 'class_accuracy' needs classes to sample for and a feature netw",
        ),
        ({"conditions": Prompts(("a",))}, "metric 'class_accuracy' needs classes to sample for"),
    ],
)
def test_wrong_names_are_found_before_any_sample(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", replace(PROTOCOL, **change))
    assert not (tmp_path / "out").exists()


def test_reference_of_another_size(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("L", (16, 16), i).save(images / f"{i}.png")
    with pytest.raises(ValueError, match=r"has images of shape \(1, 16, 16\) .*samples \(1, 8, 8\); both must agree"):
        run(
            tmp_path / "out",
            replace(PROTOCOL, reference=str(images), features="test_runner:Mean", metrics=("kid",)),
        )


@pytest.mark.slow
def test_features_and_reference_of_ones_own(tmp_path: Path, whole: tuple[Path, Results]) -> None:
    images = whole[0] / "rows" / "baseline" / "samples"
    protocol = replace(PROTOCOL, reference=str(images), metrics=("fid", "kid"), baseline_steps=())
    results = run(tmp_path, protocol, recipes=[preset("euler@3")])
    fid = row(results, "baseline")["metrics"]["fid"]
    assert fid["value"] == pytest.approx(0, abs=1e-6)
    assert fid["display"] == "Frechet distance, test_runner:Small, n=20"
    assert fid["reference"] == str(images)


def test_accelerated_pipeline_is_refused(tmp_path: Path) -> None:
    pipe = accelerate(pipeline(), "euler")
    with pytest.raises(ValueError, match=r"needs the untouched pipeline; call flowaccel\.restore\(pipe\) first"):
        run(tmp_path / "out", pipe=pipe)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_does_not_fit_leaves_the_pipeline_untouched(tmp_path: Path) -> None:
    pipe = pipeline()
    state = tiny.snapshot(pipe)
    misfit = tiny.flowturbo(tiny.random_refiner(tiny.sit_network(num_classes=7)))
    with pytest.raises(ValueError, match="num_classes is 7, must be 10"):
        run(tmp_path, replace(PROTOCOL, num_samples=2, metrics=("rel_l2",)), pipe=pipe, recipes=[misfit])
    assert not is_accelerated(pipe)
    assert tiny.snapshot(pipe)["scheduler"] == state["scheduler"]


def test_a_missing_refiner_is_found_before_any_sample(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no refiner"):
        run(tmp_path / "out", recipes=[preset("flowturbo-H1P2R2")])
    assert not (tmp_path / "out").exists()


def test_rows_need_names_of_their_own() -> None:
    with pytest.raises(
        ValueError, match="rows need different names, got more than once: euler@3; give the recipes names"
    ):
        plan_rows([preset("euler@3"), preset("euler@3")], PROTOCOL)
    with pytest.raises(ValueError, match="more than once: baseline"):
        plan_rows([Recipe(name="baseline")], PROTOCOL)


def test_rows_of_a_plan() -> None:
    rows = plan_rows([preset("heun"), preset("flowturbo-H2P4R2-single")], replace(PROTOCOL, baseline_steps=(4, 2, 1)))
    found = [(entry.name, entry.steps, entry.family) for entry in rows]
    assert found == [
        ("baseline", 4, "baseline"),
        ("baseline@2", 2, "baseline"),
        ("baseline@1", 1, "baseline"),
        ("heun", 4, "heun"),
        ("flowturbo-H2P4R2-single", 8, "flowturbo"),
    ]


def test_stock_text_to_image_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts and a decoder; the text encoders are stood in for."""
    pipe = tiny.sd3_pipeline()

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[torch.Tensor, ...]:
        given = tiny.sd3_arguments(len(prompt))
        return tuple(given[f"{name}prompt_embeds"] for name in ("", "negative_", "pooled_", "negative_pooled_"))

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    original = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, *args, **kwargs: original(self, *args, height=16, width=16, **kwargs)
    )
    protocol = Protocol(
        conditions=Prompts(("a cat", "a dog")),
        steps=3,
        num_samples=4,
        batch_size=3,
        rounds=2,
        latency_batch=2,
        resamples=5,
        metrics=("psnr", "rel_l2"),
        features="test_runner:Mean",
        reference=str(reference_images(tmp_path / "reference")),
    )
    recipe = tiny.flowturbo(tiny.random_refiner(pipe.transformer))
    results = evaluate(pipe, [recipe], protocol, tmp_path / "out")
    assert [(e["nfe"], e["network_rows"], e["refiner_rows"]) for e in results["rows"]] == [(3, 6, 0), (4, 8, 8)]
    assert set(results["rows"][0]["stages"]) == {"network", "decode", "total"}
    assert results["protocol"]["dataset"] == "prompts, 2 prompts"


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def reference_images(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 2 * i, 90)).save(folder / f"{i}.png")
    return folder
