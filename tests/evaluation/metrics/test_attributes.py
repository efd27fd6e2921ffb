"""What prompts state and images show, and the networks of the zoo that tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from flowaccel import zoo
from flowaccel.data import PROMPT_SETS, REFERENCE_SETS, shape_captions, shapes
from flowaccel.data.shapes import holds_held_out
from flowaccel.errors import CheckpointError
from flowaccel.evaluation import Prompts, Protocol, Results, compare_rows, evaluate, load_features, load_reference
from flowaccel.evaluation.features.extractors import quantise
from flowaccel.evaluation.metrics.attribute_accuracy import load_attributes
from flowaccel.evaluation.reporting.plots import pareto, pareto_png
from flowaccel.evaluation.reporting.tables import METRIC_GLOSSARY, markdown_table
from flowaccel.evaluation.results import check_results, row
from flowaccel.models import DigitsClassifier, ShapesClassifier
from flowaccel.pipelines import load_pipeline
from flowaccel.zoo.loading import load_classifier

ME = "test_attributes"
CAPTIONS = ("a small striped red circle at the top left", "three solid blue squares", "two hollow green crosses")
PROTOCOL = Protocol(
    conditions=Prompts(CAPTIONS),
    steps=3,
    baseline_steps=(2,),
    num_samples=7,
    features="zoo:shapes-features",
    reference="zoo:shapes",
    clip="zoo:shapes-clip",
    attributes="zoo:shapes",
    metrics=("kid", "clip_score", "attribute_accuracy"),
    rounds=2,
    latency_batch=1,
    resamples=10,
)


class TwoAttributes(torch.nn.Module):
    """Sees two attributes of pictures that have nine."""

    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))[:, :1].expand(-1, 4)

    def attributes(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :2].long()


class NoWidth(TwoAttributes):
    num_features = None


@pytest.fixture(scope="module", autouse=True)
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tiny.shapes_zoo(tmp_path_factory.mktemp("zoo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "_ROOT", root)
        patch.setitem(REFERENCE_SETS, "shapes", lambda: shapes("reference", 20))
        yield root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("run")
    return out, evaluate(load_pipeline(zoo.folder("t2i-shapes")), [], PROTOCOL, out)


# the metric


@pytest.mark.slow
def test_value_is_what_the_network_sees_in_the_stored_samples(finished: tuple[Path, Results]) -> None:
    from flowaccel.evaluation.samples.store import SampleStore

    network = load_features("zoo:shapes-features")
    prompts = PROTOCOL.conditions.texts(range(7))
    assert prompts is not None and network.attributes is not None
    stated = load_attributes("zoo:shapes", network).read(prompts)
    check_results(finished[1])
    for name in ("baseline", "baseline@2"):
        images = SampleStore(finished[0] / "rows" / name).read(range(7))
        right = network.attributes(network(images)).eq(stated)
        entry: Any = row(finished[1], name)["metrics"]["attribute_accuracy"]
        assert entry["value"] == pytest.approx(float((right | (stated < 0)).all(1).double().mean()))
        assert entry["attributes"]["colour"] == pytest.approx(float(right[:, 4].double().mean()))
        assert "second colour" not in entry["attributes"]  # none of these captions is of a pair
        assert entry["features"] == "zoo:shapes-features"


@pytest.mark.slow
def test_the_result_file_names_the_sets(finished: tuple[Path, Results]) -> None:
    protocol: Any = finished[1]["protocol"]
    assert (protocol["attributes"], protocol["reference"]) == ("zoo:shapes", "zoo:shapes")
    assert protocol["clip"] == "zoo:shapes-clip"
    assert protocol["clip_fingerprint"] == load_features("zoo:shapes-clip").fingerprint
    broken = json.loads(json.dumps(finished[1]))
    broken["rows"][0]["metrics"]["attribute_accuracy"]["attributes"]["colour"] = "most"
    with pytest.raises(ValueError, match=r"attribute_accuracy\.attributes\.colour must be float, got 'most'"):
        check_results(broken)


def test_compare_equals_the_result_file(finished: tuple[Path, Results]) -> None:
    found = compare_rows(finished[0], "baseline@2", "baseline")["metrics"]
    for name in ("clip_score", "attribute_accuracy"):
        versus = row(finished[1], "baseline@2")["metrics"][name]["versus"]["baseline"]
        assert {key: found[name][key] for key in versus} == versus


@pytest.mark.slow
def test_prompts_that_the_clip_reads_in_part_are_counted_in_a_warning(tmp_path: Path) -> None:
    clip = f"clip:{tiny.clip_folder(tmp_path / 'clip')}"  # a token a letter
    few = replace(PROTOCOL, clip=clip, metrics=("clip_score",), num_samples=3, steps=1, baseline_steps=())
    with pytest.warns(UserWarning, match="3 of 3 prompts are longer than the 12 tokens that clip:"):
        evaluate(load_pipeline(zoo.folder("t2i-shapes")), [], few, tmp_path / "out")


@pytest.mark.parametrize("metric", ["clip_score", "attribute_accuracy"])
def test_it_is_an_axis_of_the_plot_and_a_column_of_the_tables(
    metric: str, finished: tuple[Path, Results], tmp_path: Path
) -> None:
    assert pareto(finished[1]["rows"], metric)
    pareto_png(finished[1], tmp_path / "plot.png", metric)
    entry = row(finished[1], "baseline")["metrics"][metric]
    assert f"{entry['display']} (higher is better)" in markdown_table(finished[1])
    report = (finished[0] / "report.html").read_text()
    assert entry["display"] in report and METRIC_GLOSSARY[metric] in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": None}, r"needs a set of attributes .*--attributes \(attributes=\): zoo:shapes"),
        ({"attributes": "zoo:shape"}, "unknown set of attributes 'zoo:shape': did you mean 'zoo:shapes'"),
        ({"conditions": Prompts((*CAPTIONS, "a red cat"))}, r"cannot be measured .*'a red cat' .*know 'cat'"),
        ({"features": f"{ME}:TwoAttributes"}, r"zoo:shapes has 9 \(arrangement, .*, test_attributes:TwoAttri.* sees 2"),
        ({"features": f"{ME}:NoWidth"}, "must say its width as num_features, got None"),
        ({"features": "zoo:shapes-clip"}, r"needs a feature network with a method `attributes.*zoo:shapes-clip has"),
    ],
)
def test_wrong_use_is_found_before_any_sample(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    pipe = load_pipeline(zoo.folder("t2i-shapes"))
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, [], replace(PROTOCOL, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attributes_are_those_of_prompts(tmp_path: Path) -> None:
    from flowaccel.evaluation import Classes

    protocol = replace(PROTOCOL, conditions=Classes((1,)), metrics=("attribute_accuracy",))
    with pytest.raises(ValueError, match="'attribute_accuracy' needs prompts to sample for"):
        evaluate(tiny.sit_pipeline(), [], protocol, tmp_path / "out")


# the networks


def test_feature_networks_are_of_the_class_that_they_say(tiny_zoo: Path) -> None:
    network = load_features("zoo:shapes-features")
    assert isinstance(network.module, ShapesClassifier) and network.classify is None and network.attributes is not None
    pictures = shapes("reference", 3)
    assert network.attributes(network(quantise(pictures))).shape == (3, 9)
    DigitsClassifier().save_pretrained(tiny_zoo / "digits-features")
    digits = load_features("zoo:digits-features")
    assert isinstance(digits.module, DigitsClassifier) and digits.attributes is None and digits.classify is not None
    config = tiny_zoo / "digits-features" / "config.json"
    config.write_text(config.read_text().replace("DigitsClassifier", "AutoencoderKL"))
    with pytest.raises(CheckpointError, match="names a AutoencoderKL; allowed are DigitsClassifier, ShapesClassifier"):
        load_features("zoo:digits-features")


def test_the_clip_of_the_zoo_is_that_of_its_folder(tiny_zoo: Path) -> None:
    mine, same = load_features("zoo:shapes-clip"), load_features(f"clip:{tiny_zoo / 'shapes-clip'}")
    assert (mine.name, mine.fingerprint) == ("zoo:shapes-clip", same.fingerprint)
    assert mine.encode_text is not None and mine.encode_text(CAPTIONS).shape == (3, 4)
    with pytest.raises(ValueError, match="zoo:shapes-clip is a clip, not a feature network; there are zoo:digits-f"):
        load_classifier("zoo:shapes-clip")


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_ROOT", tmp_path)
    for name in zoo.ENTRIES:
        with pytest.raises(FileNotFoundError, match=f"weights of zoo:{name} are missing .*zoo build {name} --out DIR"):
            zoo.folder(name)


# the sets


def test_prompt_sets() -> None:
    seen, held_out = (PROMPT_SETS[name]() for name in ("shapes", "shapes-held-out"))
    assert len(seen) == len(held_out) == 500
    assert not any(map(holds_held_out, seen)) and all(map(holds_held_out, held_out))
    assert seen == shape_captions("prompts", 500)


def test_reference_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_features("zoo:shapes-features")
    reference = load_reference("zoo:shapes", network)
    assert reference.features is not None
    assert torch.equal(reference.features, network(quantise(shapes("reference", 20))))
    assert all(map(holds_held_out, REFERENCE_SETS["shapes-held-out"]().captions))
