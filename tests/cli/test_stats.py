"""Statistics, prompts and exports from the command line, end to end."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from commands import fails, run
from flowaccel.evaluation import Moments, frechet_distance, load_features, load_reference
from flowaccel.evaluation.metrics.clip_score import text_match
from flowaccel.evaluation.samples.store import SampleStore

PROMPTS = ("a cat", "a dog", "bird")
ROWS = ("baseline", "baseline@1", "euler@2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks, photos and prompts, and the run of an evaluation that used them all."""
    folder = tmp_path_factory.mktemp("place")
    tiny.clip_folder(folder / "clip", seed=4)  # which sees prompts in the images: cosines above 0
    tiny.dinov2_folder(folder / "dinov2")
    tiny.photos(folder / "photos", count=8, sizes=((20, 14), (9, 30)))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stand_in(patch)
        run(*statistics("ref.safetensors", "--with-features"))
        run(*evaluation("run", "fid,kid,clip_score", "--clip", "clip:clip"))
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    stand_in(monkeypatch)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """The pipeline PIPE is a stock text-to-image one whose text encoders are stood in for."""
    pipe = tiny.sd3_pipeline()

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[torch.Tensor, ...]:
        given = tiny.sd3_arguments(len(prompt))
        return tuple(given[f"{name}prompt_embeds"] for name in ("", "negative_", "pooled_", "negative_pooled_"))

    original = type(pipe).__call__
    patch.setattr(pipe, "encode_prompt", encode_prompt)
    patch.setattr(type(pipe), "__call__", lambda self, *a, **kw: original(self, *a, height=16, width=16, **kw))
    patch.setattr(importlib.import_module("flowaccel.cli.evaluate"), "open_pipeline", lambda *_: pipe)


def statistics(out: str, *more: str, features: str = "dinov2:dinov2") -> list[str]:
    return ["stats", "photos", "--features", features, "--out", out, "--device", "cpu", *more]


def evaluation(out: str, metrics: str, *more: str, reference: str = "ref.safetensors") -> list[str]:
    small = "--num-samples 8 --batch-size 8 --rounds 2 --steps 3 --baseline-steps 1 --latency-batch 2 --recipe euler@2"
    networks = ["--features", "dinov2:dinov2", "--reference", reference, "--metrics", metrics]
    return ["evaluate", "PIPE", "--prompts", "prompts.txt", *small.split(), *networks, "--out", out, "--json", *more]


@pytest.mark.slow
def test_evaluation_with_networks_of_real_images() -> None:
    results = json.loads(Path("run/results.json").read_text())
    protocol = results["protocol"]
    dinov2, clip = load_features("dinov2:dinov2"), load_features("clip:clip")
    assert (protocol["feature_extractor"], protocol["fingerprint"]) == ("dinov2:dinov2", dinov2.fingerprint)
    assert (protocol["clip"], protocol["clip_fingerprint"]) == ("clip:clip", clip.fingerprint)
    assert [row["recipe"] for row in results["rows"]] == list(ROWS)
    reference = load_reference("photos", dinov2)
    for row in results["rows"]:
        images = SampleStore(Path("run/rows") / row["recipe"]).read(range(8))
        distance = frechet_distance(Moments.of(dinov2(images)), reference.moments)
        assert row["metrics"]["fid"]["value"] == pytest.approx(distance, rel=1e-6)
        assert row["metrics"]["fid"]["reference"] == "ref.safetensors"
        prompts = [PROMPTS[i % 3] for i in range(8)]
        score = 100 * text_match(clip, clip(images), prompts).cosine.clamp_min(0).mean()
        assert row["metrics"]["clip_score"]["value"] == pytest.approx(float(score), rel=1e-6)
        assert row["metrics"]["clip_score"]["display"] == "CLIP score, clip:clip, n=8"
    assert len({row["metrics"]["clip_score"]["value"] for row in results["rows"]}) == 3


def test_comparing_rows_of_prompts() -> None:
    found = json.loads(run("compare", "run", "--a", "euler@2", "--b", "baseline", "--json").stdout)["metrics"]
    entry = json.loads(Path("run/results.json").read_text())["rows"][2]
    for name in ("fid", "kid", "clip_score"):
        versus = entry["metrics"][name]["versus"]["baseline"]
        assert found[name]["difference"] == pytest.approx(versus["difference"])
        assert found[name]["ci95"] == pytest.approx(versus["ci95"])


@pytest.mark.slow
def test_a_clip_as_feature_network_serves_the_score_too() -> None:
    run(*statistics("clip.safetensors", features="clip:clip"))
    command = evaluation("both", "fid,clip_score", reference="clip.safetensors")
    command[command.index("dinov2:dinov2")] = "clip:clip"
    results = json.loads(run(*command).stdout)
    assert results["protocol"]["clip"] == "clip:clip"
    scores = [
        [row["metrics"]["clip_score"]["value"] for row in found["rows"]]
        for found in (results, json.loads(Path("run/results.json").read_text()))
    ]
    assert scores[0] == pytest.approx(scores[1])


@pytest.mark.slow
def test_folders_and_imported_statistics_are_references_too() -> None:
    moments = load_reference("photos", load_features("dinov2:dinov2")).moments
    np.savez("ref.npz", mu=moments.mean, sigma=moments.covariance)
    expected = [row["metrics"]["fid"]["value"] for row in json.loads(Path("run/results.json").read_text())["rows"]]
    for reference in ("photos", "ref.npz"):
        results = json.loads(run(*evaluation("run", "fid", reference=reference)).stdout)
        assert [row["metrics"]["fid"]["value"] for row in results["rows"]] == pytest.approx(expected)


def test_stats_says_what_it_wrote() -> None:
    message = run(*statistics("again.safetensors")).stderr
    assert "wrote again.safetensors: 8 images, 4 features of dinov2:dinov2" in " ".join(message.split())
    assert Path("again.safetensors").stat().st_size < Path("ref.safetensors").stat().st_size


def test_export_npz() -> None:
    assert (
        "wrote 8 images to samples.npz" in run("export-npz", "run", "--row", "euler@2", "--out", "samples.npz").stderr
    )
    with np.load("samples.npz") as file:
        expected = SampleStore(Path("run/rows/euler@2")).read(range(8)).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(file["arr_0"], expected.numpy())
    assert "no row called 'euler@3': did you mean 'euler@2'?" in fails(
        "export-npz", "run", "--row", "euler@3", "--out", "x.npz"
    )


def test_wrong_use_is_found_before_any_sample() -> None:
    run(*statistics("bare.safetensors"))
    run(*statistics("other.safetensors", features="clip:clip"))
    wrong = {
        "clip_score needs a CLIP network with its text half": evaluation("new", "clip_score"),
        "'kid' needs the features of the reference samples, and bare.safetensors has only moments": evaluation(
            "new", "kid", reference="bare.safetensors"
        ),
        "other.safetensors were made with clip:clip, fingerprint": evaluation(
            "new", "fid", reference="other.safetensors"
        ),
        "there is no reference file none.npz": evaluation("new", "fid", reference="none.npz"),
        "cannot load clip:nowhere": evaluation("new", "clip_score", "--clip", "clip:nowhere"),
    }
    for message, command in wrong.items():
        assert message in fails(*command)
        assert not Path("new").exists()


def test_clip_score_is_for_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flowaccel.cli.evaluate")
    monkeypatch.setattr(module, "open_pipeline", lambda *_: tiny.sit_pipeline(num_layers=1))
    command = evaluation(str(tmp_path / "new"), "clip_score", "--clip", "clip:clip")
    del command[2:4]
    assert "metric 'clip_score' needs prompts to sample for; leave it out for a pipeline with classes" in fails(
        *command
    )


def test_wrong_use_of_stats() -> None:
    given = statistics("x.safetensors")
    given[1] = "ref.safetensors"
    assert "ref.safetensors is a statistics file already; stats takes a folder of images or zoo:SET" in fails(*given)
    assert "written to a .safetensors file, got x.npz" in fails(*statistics("x.npz"))
    assert "cannot load dinov2:nowhere" in fails(*statistics("x.safetensors", features="dinov2:nowhere"))
