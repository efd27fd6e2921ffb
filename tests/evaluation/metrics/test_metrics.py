"""Every metric beside its error, paired differences, and what is said when something is missing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.evaluation.metrics.bootstrap import resample_counts, resample_indices, stderr
from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance
from flowaccel.evaluation.metrics.kid import kernel_distance, kernel_distance_resampled
from flowaccel.evaluation.metrics.metric import AttributeMatch, ReferenceSet, RowSamples, TextMatch
from flowaccel.evaluation.metrics.table import METRICS, difference, measure, not_worse

N, WIDTH = 120, 6
PAIRED = ("psnr", "ssim", "rel_l2")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_row(name: str, noise: float = 0.0, seed: int = 0) -> RowSamples:
    """The same samples for every name, disturbed by `noise`."""
    labels = torch.arange(N) % 5
    images = 128 + 50 * normal(2, N, 1, 8, 8) + 50 * noise * normal(seed + 3, N, 1, 8, 8)
    wrong = normal(seed + 4, N).abs() < noise
    return RowSamples(
        name=name,
        features=normal(5, N, WIDTH) + noise * normal(seed + 6, N, WIDTH),
        labels=labels,
        predicted=torch.where(wrong, (labels + 1) % 5, labels),
        images=images.clamp(0, 255).to(torch.uint8),
        text_match=TextMatch(
            network="clip:tiny",
            prompts=tuple(f"prompt {i}" for i in range(N)),
            cosine=0.3 + 0.2 * normal(8, N) - noise * normal(seed + 9, N).abs(),
        ),
        attributes=make_attributes(noise, seed),
    )


def make_attributes(noise: float, seed: int) -> AttributeMatch:
    """Of two attributes the second is stated for every other image; both are seen wrongly now and then."""
    stated = torch.stack([torch.arange(N) % 3, torch.arange(N) % 4], dim=1)
    stated[::2, 1] = -1
    wrong = normal(seed + 10, N, 2).abs() < noise
    prompts = tuple(f"prompt {i}" for i in range(N))
    seen = torch.where(wrong, (stated + 1) % 3, stated)
    return AttributeMatch(names=("colour", "shape"), prompts=prompts, stated=stated, seen=seen)


def make_reference() -> ReferenceSet:
    features = normal(7, 90, WIDTH)
    return ReferenceSet(name="toy", features=features, moments=Moments.of(features))


ROWS = [make_row("baseline"), make_row("baseline@10", 0.3, seed=10), make_row("fast", 0.1, seed=20)]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict[str, Any]]]:
    return measure(ROWS, make_reference(), list(METRICS), features_name="net", resamples=40)


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert len(METRICS) >= 11
    assert [name for name in METRICS if f"`{name}`" not in page] == []


def test_every_row_has_every_metric_and_the_first_no_paired_one(found: dict[str, Any]) -> None:
    assert list(found["fast"]) == list(METRICS)
    assert list(found["baseline"]) == [name for name in METRICS if name not in PAIRED]


def test_result_is_strict_json_with_the_documented_keys(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    always = {"value", "n", "stderr", "ci95", "higher_is_better", "display", "versus"}
    extra = {"psnr": {"identical_fraction"}, "attribute_accuracy": {"attributes"}}
    for name, entry in found["fast"].items():
        named = {"features": METRICS[name].network, "reference": METRICS[name].against}
        keys = always | {key for key, given in named.items() if given is not None} | extra.get(name, set())
        assert set(entry) == keys, name


def test_interval_and_errors_belong_together(found: dict[str, Any]) -> None:
    for entry in found["baseline@10"].values():
        low, high = entry["ci95"]
        assert entry["stderr"] > 0
        assert (low + high) / 2 == pytest.approx(entry["value"])
        assert high - low == pytest.approx(2 * 1.96 * entry["stderr"])
        assert entry["n"] == N


def test_values_are_those_of_the_parts(found: dict[str, Any]) -> None:
    expected = frechet_distance(Moments.of(ROWS[1].features), make_reference().moments)
    assert found["baseline@10"]["fid"]["value"] == expected
    assert ROWS[1].labels is not None and ROWS[1].predicted is not None
    accuracy = float((ROWS[1].labels == ROWS[1].predicted).double().mean())
    assert found["baseline@10"]["class_accuracy"]["value"] == pytest.approx(accuracy)
    assert 0.6 < accuracy < 0.9


def test_error_of_the_kernel_distance_is_that_of_the_resamples(found: dict[str, Any]) -> None:
    reference = make_reference().features
    assert reference is not None
    counts = resample_counts(resample_indices(N, 40, seed=0))
    entry = found["fast"]["kid"]
    assert entry["value"] == pytest.approx(kernel_distance(ROWS[2].features, reference))
    assert entry["stderr"] == pytest.approx(stderr(kernel_distance_resampled(ROWS[2].features, reference, counts)))


@pytest.mark.parametrize(
    ("metric", "display"),
    [
        ("fid", "Frechet distance, net, n=120"),
        ("fid_inf", "Frechet distance extrapolated to infinite n, net, n=120"),
        ("precision", "Precision (k=3), net, n=120"),
        ("clip_score", "CLIP score, clip:tiny, n=120"),
        ("attribute_accuracy", "Attribute accuracy (images that show all that their prompt states), net, n=120"),
        ("psnr", "PSNR in dB against baseline, n=120"),
    ],
)
def test_display_is_honest(metric: str, display: str, found: dict[str, Any]) -> None:
    assert found["fast"][metric]["display"] == display


def test_paired_metrics_and_classes_name_what_they_rest_on(found: dict[str, Any]) -> None:
    assert found["fast"]["ssim"]["reference"] == "baseline"
    assert found["fast"]["kid"]["reference"] == "toy"
    assert found["fast"]["kid"]["features"] == "net"


def test_more_noise_is_worse_in_every_paired_metric(found: dict[str, Any]) -> None:
    for name in ("class_accuracy", "clip_score", "attribute_accuracy", *PAIRED):
        noisy, close = found["baseline@10"][name]["value"], found["fast"][name]["value"]
        assert (close > noisy) == METRICS[name].higher_is_better, name


def test_rows_are_compared_with_the_first_by_default_and_never_with_themselves(found: dict[str, Any]) -> None:
    assert found["baseline"]["fid"]["versus"] == {}
    assert list(found["fast"]["fid"]["versus"]) == ["baseline"]
    assert found["fast"]["psnr"]["versus"] == {}  # the first row has no error against itself


def test_rows_are_compared_with_those_named() -> None:
    named = measure(
        ROWS, make_reference(), ["kid", "psnr"], features_name="net", resamples=20, versus=["fast", "baseline@10"]
    )
    assert list(named["baseline"]["kid"]["versus"]) == ["fast", "baseline@10"]
    assert list(named["fast"]["psnr"]["versus"]) == ["baseline@10"]
    none = measure(ROWS, make_reference(), ["kid"], features_name="net", resamples=20, versus=[])
    assert none["fast"]["kid"]["versus"] == {}


@pytest.mark.parametrize("metric", ["fid", "kid", "class_accuracy", "rel_l2"])
def test_difference_equals_versus(metric: str) -> None:
    rows, reference = ROWS, make_reference()
    found = measure(rows, reference, [metric], features_name="net", seed=4, resamples=30, versus=["baseline@10"])
    single = difference(rows[2], rows[1], metric, reference, paired_against=rows[0], seed=4, resamples=30)
    versus = found["fast"][metric]["versus"]["baseline@10"]
    assert {key: single[key] for key in ("difference", "ci95")} == versus
    values = [found[name][metric]["value"] for name in ("fast", "baseline@10")]
    assert single["difference"] == pytest.approx(values[0] - values[1])


@pytest.mark.parametrize("metric", ["fid", "fid_inf", "kid"])
def test_pairing_tightens_the_difference(metric: str) -> None:
    a, b = make_row("baseline"), make_row("close", 0.01, seed=30)
    found = measure([a, b], make_reference(), [metric], features_name="net", resamples=60)
    alone = sum(found[name][metric]["stderr"] ** 2 for name in ("baseline", "close")) ** 0.5
    paired = difference(a, b, metric, make_reference(), resamples=60)["stderr"]
    assert 0 < paired < 0.2 * alone


def test_paired_interval_covers_the_true_difference_of_accuracies() -> None:
    covered, runs = 0, 200
    base = make_row("a")
    labels = torch.zeros(N, dtype=torch.int64)
    for run in range(runs):
        hit = torch.rand(N, generator=torch.Generator().manual_seed(run))
        a = replace(base, labels=labels, predicted=(hit > 0.8).long())
        b = replace(base, name="b", labels=labels, predicted=(hit > 0.9).long())
        low, high = difference(a, b, "class_accuracy", make_reference(), seed=run, resamples=50)["ci95"]
        covered += low <= -0.1 <= high
    assert 0.88 <= covered / runs <= 0.99


def test_same_seed_same_result_and_another_seed_another_error() -> None:
    def run(seed: int) -> dict[str, Any]:
        entries = measure(ROWS, make_reference(), ["fid", "recall"], features_name="net", seed=seed, resamples=20)
        return entries["fast"]

    first, second, other = run(1), run(1), run(2)
    assert first == second
    assert first["fid"]["value"] == other["fid"]["value"]
    assert first["fid"]["stderr"] != other["fid"]["stderr"]


def test_identical_images_have_no_psnr_and_no_comparison() -> None:
    rows = [ROWS[0], replace(ROWS[0], name="same"), ROWS[2]]
    found = measure(rows, make_reference(), PAIRED, features_name="net", resamples=20, versus=["same", "fast"])
    entry = found["same"]["psnr"]
    assert (entry["value"], entry["stderr"], entry["ci95"], entry["versus"]) == (None, None, None, {})
    assert entry["identical_fraction"] == 1.0
    assert found["same"]["ssim"]["value"] == pytest.approx(1.0)
    assert found["same"]["rel_l2"]["value"] == 0.0
    assert found["fast"]["psnr"]["versus"] == {}
    undefined = difference(rows[1], rows[2], "psnr", make_reference(), paired_against=rows[0], resamples=20)
    assert undefined == {"difference": None, "ci95": None, "stderr": None, "not_worse": False}


def test_psnr_of_a_single_differing_image_stays_finite() -> None:
    images = ROWS[0].images.clone()
    images[0, 0, 0, 0] ^= 1
    rows = [ROWS[0], replace(ROWS[0], name="one", images=images)]
    entry = measure(rows, make_reference(), ["psnr"], features_name="net", resamples=20)["one"]["psnr"]
    json.dumps(entry, allow_nan=False)
    assert entry["identical_fraction"] == pytest.approx(1 - 1 / N)
    assert entry["value"] == pytest.approx(66.19, abs=0.01)  # 10 log10(255^2 * 64)


@pytest.mark.parametrize(
    ("interval", "other", "higher_is_better", "expected"),
    [
        ([-1.0, 0.5], 10.0, False, True),
        ([-1.0, 0.51], 10.0, False, False),
        ([-9.0, -8.0], 10.0, False, True),
        ([-0.5, 9.0], 10.0, True, True),
        ([-0.51, 9.0], 10.0, True, False),
        ([-0.5, 0.5], -10.0, False, True),
        (None, 10.0, False, False),
        ([-1.0, 0.0], None, False, False),
    ],
)
def test_not_worse_looks_at_the_bad_end(
    interval: list[float] | None, other: float | None, higher_is_better: bool, expected: bool
) -> None:
    assert not_worse(interval, other, higher_is_better) is expected


def test_difference_says_who_is_not_worse() -> None:
    worse, better = make_row("worse", 1.0), make_row("better")
    forward = difference(worse, better, "class_accuracy", make_reference(), resamples=30)
    backward = difference(better, worse, "class_accuracy", make_reference(), resamples=30)
    assert (forward["not_worse"], backward["not_worse"]) == (False, True)


@pytest.mark.parametrize(("width", "expected"), [(512, 200), (513, 20)])
def test_a_costly_distance_takes_fewer_resamples(width: int, expected: int) -> None:
    assert METRICS["fid"].most_resamples(200, width) == expected
    assert METRICS["ssim"].most_resamples(5000, width) == 5000


@pytest.mark.parametrize("metric", ["fid", "fid_inf"])
def test_statistics_alone_are_enough_for_a_frechet_distance(metric: str) -> None:
    reference = replace(make_reference(), features=None)
    expected = measure(ROWS, make_reference(), [metric], features_name="net", resamples=5)
    assert measure(ROWS, reference, [metric], features_name="net", resamples=5) == expected


def test_too_few_samples_warn_once_and_only_for_frechet_distances() -> None:
    few = ReferenceSet(name="few", features=normal(0, 9, WIDTH), moments=Moments.of(normal(0, 9, WIDTH)))
    with pytest.warns(UserWarning, match="9 samples in 6 features") as caught:
        measure(ROWS, few, ["fid", "fid_inf"], features_name="net", resamples=5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(ROWS, few, ["kid", "class_accuracy"], features_name="net", resamples=5)


@pytest.mark.parametrize("metric", ["kid", "precision", "recall"])
def test_metrics_of_samples_say_that_statistics_are_not_enough(metric: str) -> None:
    with pytest.raises(ValueError, match=f"metric '{metric}' needs the features of the reference.*'toy' has only"):
        measure(ROWS, replace(make_reference(), features=None), [metric], features_name="net")


def clip_scores(cosine: Tensor, prompts: list[str], resamples: int = 400) -> dict[str, Any]:
    match = TextMatch(network="clip:tiny", prompts=tuple(prompts), cosine=cosine)
    rows = [replace(ROWS[0], text_match=match)]
    return measure(rows, make_reference(), ["clip_score"], features_name="net", resamples=resamples)["baseline"][
        "clip_score"
    ]


def test_clip_score_is_the_mean_of_what_is_above_zero() -> None:
    cosine = normal(11, N)
    entry = clip_scores(cosine, [f"prompt {i}" for i in range(N)])
    scores = 100 * cosine.clamp_min(0)
    assert entry["value"] == pytest.approx(float(scores.mean()))
    assert entry["stderr"] == pytest.approx(float(scores.std()) / N**0.5, rel=0.15)
    assert (entry["features"], entry["n"]) == ("clip:tiny", N)


def test_images_of_one_prompt_are_resampled_together() -> None:
    """Forty prompts, three equal images each: what is known are forty numbers, not a hundred and twenty."""
    of_prompt = 0.3 + 0.1 * normal(12, N // 3)
    together = clip_scores(of_prompt.repeat(3), [f"prompt {i % 40}" for i in range(N)])
    apart = clip_scores(of_prompt.repeat(3), [f"prompt {i}" for i in range(N)])
    assert together["value"] == pytest.approx(apart["value"])
    assert together["stderr"] == pytest.approx(3**0.5 * apart["stderr"], rel=0.15)
    assert together["stderr"] == pytest.approx(100 * float(of_prompt.std()) / 40**0.5, rel=0.15)


def test_images_of_a_single_prompt_are_resampled_themselves() -> None:
    cosine = 0.3 + 0.1 * normal(13, N)
    assert clip_scores(cosine, ["one"] * N) == clip_scores(cosine, [f"prompt {i}" for i in range(N)])


def test_prompts_of_unequal_numbers_of_images_weigh_by_image() -> None:
    cosine = torch.cat([torch.full((90,), 0.2), torch.full((30,), 0.6)])
    entry = clip_scores(cosine, ["often"] * 90 + ["seldom"] * 30)
    assert entry["value"] == pytest.approx(30.0)
    # two draws of two prompts: 20, 30 (twice as often) or 60
    assert entry["stderr"] == pytest.approx(((0.25 * 20**2 + 0.5 * 30**2 + 0.25 * 60**2) - 35**2) ** 0.5, rel=0.1)


def test_clip_score_says_which_row_lacks_prompts() -> None:
    rows = [ROWS[0], replace(ROWS[1], text_match=None)]
    with pytest.raises(ValueError, match=r"metric 'clip_score' needs the prompts of .* row 'baseline@10'"):
        measure(rows, make_reference(), ["clip_score"], features_name="net")
    with pytest.raises(ValueError, match=r"row 'baseline': prompts must have one entry for each of the 120 .*got 1"):
        replace(ROWS[0], text_match=TextMatch(network="clip:tiny", prompts=("one",), cosine=normal(0, N)))


def attribute_accuracy(stated: Tensor, seen: Tensor, prompts: Sequence[str], resamples: int = 400) -> dict[str, Any]:
    names = tuple("abc"[: stated.shape[1]])
    match = AttributeMatch(names=names, prompts=tuple(prompts), stated=stated, seen=seen)
    rows = [replace(ROWS[0], attributes=match)]
    found = measure(rows, make_reference(), ["attribute_accuracy"], features_name="net", resamples=resamples)
    return found["baseline"]["attribute_accuracy"]


def test_an_image_is_right_if_all_that_is_stated_is() -> None:
    """Of four kinds of images: all right; one of two wrong; the wrong one not stated; nothing but the wrong one."""
    stated = torch.tensor([[2, 1, -1], [2, 1, -1], [2, -1, -1], [-1, 1, -1]]).repeat(N // 4, 1)
    seen = torch.tensor([[2, 1, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]).repeat(N // 4, 1)
    entry = attribute_accuracy(stated, seen, [f"prompt {i}" for i in range(N)])
    assert entry["value"] == 0.5
    assert entry["attributes"] == {"a": 1.0, "b": pytest.approx(1 / 3)}  # nobody states c
    assert entry["stderr"] == pytest.approx(0.5 / N**0.5, rel=0.15)
    assert entry["higher_is_better"]


def test_right_images_of_one_prompt_are_resampled_together() -> None:
    stated = torch.zeros(N, 1, dtype=torch.int64)
    seen = (torch.arange(N) % 40 % 4 == 0).long().unsqueeze(1)  # a quarter of forty prompts is wrong, three times each
    together = attribute_accuracy(stated, seen, [f"prompt {i % 40}" for i in range(N)])
    assert together["value"] == pytest.approx(0.75)
    assert together["stderr"] == pytest.approx((0.75 * 0.25 / 40) ** 0.5, rel=0.15)


def test_attribute_accuracy_says_which_row_lacks_attributes() -> None:
    rows = [ROWS[0], replace(ROWS[1], attributes=None)]
    with pytest.raises(ValueError, match=r"metric 'attribute_accuracy' needs prompts whose .* row 'baseline@10' lacks"):
        measure(rows, make_reference(), ["attribute_accuracy"], features_name="net")
    with pytest.raises(ValueError, match=r"row 'baseline': attributes must have one entry for each of the 120 .*got 1"):
        one = torch.zeros(1, 2, dtype=torch.int64)
        replace(ROWS[0], attributes=AttributeMatch(names=("a", "b"), prompts=("x",), stated=one, seen=one))
    with pytest.raises(
        ValueError, match=r"seen must have one row for each of the 1 prompts .* 2 attributes, got \(1, 1"
    ):
        AttributeMatch(names=("a", "b"), prompts=("x",), stated=one, seen=one[:, :1])


@pytest.mark.parametrize("missing", ["labels", "predicted"])
def test_accuracy_says_which_row_lacks_classes(missing: str) -> None:
    rows = [ROWS[0], replace(ROWS[1], **{missing: None})]
    with pytest.raises(ValueError, match=r"metric 'class_accuracy' needs both labels and .* row 'baseline@10'"):
        measure(rows, make_reference(), ["class_accuracy"], features_name="net")


def test_a_paired_difference_asks_for_the_untouched_row() -> None:
    with pytest.raises(ValueError, match=r"'ssim' is an error against .* paired_against"):
        difference(ROWS[1], ROWS[2], "ssim", make_reference())


@pytest.mark.parametrize(
    ("rows", "metrics", "versus", "message"),
    [
        (ROWS, ["fdi"], None, "unknown metric 'fdi'; did you mean 'fid'.*fid, fid_inf, kid,"),
        (ROWS, ["zzz"], None, "unknown metric 'zzz'; known are: .*fid, fid_inf"),
        (ROWS, ["fid"], ["fats"], "unknown versus row 'fats'; did you mean 'fast'.* baseline, baseline@10, fast"),
        ([], ["fid"], None, "at least one row"),
        ([ROWS[0], ROWS[0]], ["fid"], None, r"a name of its own, got \['baseline', 'baseline'\]"),
    ],
)
def test_wrong_use_is_explained(rows: list[RowSamples], metrics: list[str], versus: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(rows, make_reference(), metrics, features_name="net", versus=versus)


def test_rows_must_hold_the_same_samples() -> None:
    short = RowSamples(
        name="short", features=ROWS[0].features[:9], labels=None, predicted=None, images=ROWS[0].images[:9]
    )
    with pytest.raises(ValueError, match="'baseline': 120, 'short': 9; finish"):
        measure([ROWS[0], short], make_reference(), ["kid"], features_name="net")


def test_parts_of_a_row_and_of_a_reference_must_fit() -> None:
    with pytest.raises(ValueError, match=r"row 'fast': images must have .* 120 feature vectors, got 3"):
        replace(ROWS[2], images=ROWS[2].images[:3])
    with pytest.raises(ValueError, match=r"reference 'toy': features must have shape \(M, 6\)"):
        replace(make_reference(), features=torch.zeros(5, 3))
