"""The shipped judges of the shapes: they tell right pictures from wrong ones, on combinations of both kinds."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from flowaccel.data import shapes
from flowaccel.evaluation import load_features
from flowaccel.evaluation.features.extractors import quantise
from flowaccel.evaluation.metrics.clip_score import load_clip, text_match
from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance

COUNT = 150
OTHER_COLOUR = {
    "red": "green",
    "green": "blue",
    "blue": "yellow",
    "yellow": "purple",
    "purple": "white",
    "white": "red",
}


def recoloured(caption: str) -> str:
    """The first colour named exchanged for another."""
    words = caption.split()
    first = next(i for i, word in enumerate(words) if word in OTHER_COLOUR)
    return " ".join([*words[:first], OTHER_COLOUR[words[first]], *words[first + 1 :]])


@pytest.mark.parametrize("combinations", ["seen", "held_out"])
def test_clip_score_falls_for_other_captions_and_for_one_wrong_word(combinations: Literal["seen", "held_out"]) -> None:
    drawn = shapes("reference", COUNT, combinations)
    clip = load_clip("zoo:shapes-clip", load_features("zoo:shapes-features"))
    seen = clip(quantise(drawn))
    right = text_match(clip, seen, drawn.captions).cosine
    shuffled = text_match(clip, seen, (*drawn.captions[1:], drawn.captions[0])).cosine
    wrong = text_match(clip, seen, [recoloured(caption) for caption in drawn.captions]).cosine
    assert right.mean() > shuffled.mean() + 0.5
    assert (right > wrong).float().mean() > 0.95


@pytest.mark.parametrize("combinations", ["seen", "held_out"])
def test_attributes_are_seen(combinations: Literal["seen", "held_out"]) -> None:
    drawn = shapes("reference", COUNT, combinations)
    network = load_features("zoo:shapes-features")
    assert network.attributes is not None
    seen = network.attributes(network(quantise(drawn)))
    right = (seen == drawn.attributes) | (drawn.attributes < 0)
    assert right.all(dim=1).float().mean() > 0.95
    others = (seen == drawn.attributes.roll(1, 0)) | (drawn.attributes.roll(1, 0) < 0)
    assert others.all(dim=1).float().mean() < 0.1


@pytest.mark.slow
def test_frechet_distance_sees_a_missing_shape_and_blur() -> None:
    network = load_features("zoo:shapes-features")
    reference = Moments.of(network(quantise(shapes("reference"))))
    other = shapes("clip", 2600, "seen")
    pictures = quantise(other)
    without = pictures[torch.tensor(["circle" not in caption for caption in other.captions])]
    count = len(without)  # a Frechet distance depends on it

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(Moments.of(network(images)), reference)

    blurred = torch.nn.functional.avg_pool2d(pictures[:count].float(), 3, 1, 1, count_include_pad=False)
    same = distance(pictures[:count])
    found = {"without circles": distance(without) / same, "blurred": distance(blurred.to(torch.uint8)) / same}
    assert min(found.values()) > 2, found
