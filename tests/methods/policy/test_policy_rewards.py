"""Rewards of policies: what they compute, and what is said where they or their callers are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from flowaccel.data import digits, shapes
from flowaccel.evaluation import load_features
from flowaccel.methods.policy.train.rewards import Condition, Reward, load_reward
from flowaccel.zoo.loading import load_classifier

ME = __name__
PICTURES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a b", "c", "d e f"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip_folder(tmp_path_factory.mktemp("reward-clip"))


# rewards of one's own


def brightness(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) - 0.5


class Signed:
    bounds = (-0.5, 0.5)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return brightness(images, conditions)


class Crooked(Signed):
    bounds = (1.0, 1.0)


class Vague(Signed):
    bounds = (1.0, 2.0, 3.0)  # type: ignore[assignment]


class NeedsMore(Signed):
    def __init__(self, size: int) -> None: ...


NUMBER = 3

# built-in


def test_accuracy_of_classes_is_a_probability() -> None:
    data = digits("reference")
    reward = load_reward("accuracy:zoo:digits-features")
    images, labels = data.images[:200] / 2 + 0.5, data.labels[:200].tolist()
    right = reward(images, labels)
    assert right.mean() > 0.9 and reward(images, [(label + 1) % 10 for label in labels]).mean() < 0.05
    network = load_classifier("zoo:digits-features")
    features = network((images * 255).round().to(torch.uint8))
    expected = network.logits(features).softmax(dim=1)[range(200), labels]  # type: ignore[operator]
    torch.testing.assert_close(right, expected.detach(), rtol=1e-4, atol=1e-6)
    shares = torch.stack([reward(images[:5], [label] * 5) for label in range(10)])
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(5))


def test_accuracy_of_attributes_is_their_share() -> None:
    data = shapes("reference", 60)
    reward = load_reward("accuracy:zoo:shapes-features")
    images = data.images / 2 + 0.5
    right = reward(images, data.captions)
    network = load_classifier("zoo:shapes-features")
    seen = network.attributes(network((images * 255).round().to(torch.uint8)))  # type: ignore[operator]
    for image in range(len(data)):
        stated = [int(value) for value in data.attributes[image]]
        hits = [int(seen[image, i]) == value for i, value in enumerate(stated) if value >= 0]
        assert float(right[image]) == pytest.approx(sum(hits) / len(hits))
    assert right.mean() > 0.95
    assert reward(images, data.captions[1:] + data.captions[:1]).mean() < 0.7


def test_clip_score_tells_prompts_apart() -> None:
    data = shapes("reference", 60)
    reward = load_reward("clip_score:zoo:shapes-clip")
    images = data.images / 2 + 0.5
    own, other = reward(images, data.captions), reward(images, data.captions[1:] + data.captions[:1])
    assert own.mean() > other.mean() + 0.3
    assert reward.bounds == (0, 2.5)


def cosines(clip: Path) -> Tensor:
    network = load_features(f"clip:{clip}")
    assert network.encode_text is not None
    seen = network((PICTURES * 255).round().to(torch.uint8))
    return torch.nn.functional.cosine_similarity(seen.double(), network.encode_text(PROMPTS).double(), dim=1)


def test_clip_score_is_the_published_one(clip: Path) -> None:
    found = load_reward(f"clip_score:clip:{clip}")(PICTURES, PROMPTS)
    torch.testing.assert_close(found, 2.5 * cosines(clip).clamp_min(0).float())


def test_pick_score_has_the_scale_of_its_network(clip: Path) -> None:
    from transformers import CLIPModel

    scale = float(CLIPModel.from_pretrained(clip).logit_scale.detach().exp())
    reward = load_reward(f"pick_score:clip:{clip}")
    assert reward.bounds == (0, pytest.approx(scale)) and scale != 2.5
    found = reward(PICTURES, PROMPTS)
    torch.testing.assert_close(found, scale * cosines(clip).clamp_min(0).float())


# one's own


def test_a_function_has_no_bounds() -> None:
    reward = load_reward(f"{ME}:brightness")
    assert reward.bounds == (-math.inf, math.inf)
    torch.testing.assert_close(reward(PICTURES, PROMPTS), PICTURES.mean(dim=(1, 2, 3)) - 0.5)


def test_a_class_is_made_and_may_have_bounds() -> None:
    reward = load_reward(f"{ME}:Signed")
    assert reward.bounds == (-0.5, 0.5) and reward.name == f"{ME}:Signed"
    assert reward(PICTURES, [0, 1, 2]).shape == (3,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", r"reward must be accuracy:zoo:digits-features, clip_score.*pick_score or MODULE:ATTRIBUTE"),
        ("image_reward", "image_reward must be such a one"),
        ("accuracy", "accuracy needs a network, such as accuracy:zoo:digits-features"),
        ("clip_score", "clip_score needs a network"),
        ("accuracy:zoo:nothing", "unknown zoo entry"),
        ("clip_score:zoo:digits-features", "needs a CLIP network"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{ME}:nothing", "no attribute 'nothing'"),
        (f"{ME}:NeedsMore", "cannot be made: .*size"),
        (f"{ME}:NUMBER", "must be callable.*got a int"),
        (f"{ME}:Crooked", r"must rise, got \(1, 1\)"),
        (f"{ME}:Vague", "must be two numbers"),
    ],
)
def test_names_that_do_not_serve(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_network_without_classes_has_no_accuracy(clip: Path) -> None:
    with pytest.raises(ValueError, match=r"accuracy needs .*`logits\(features\)`"):
        load_reward(f"accuracy:clip:{clip}")


# what is checked


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(2), r"the reward mine returned shape \(2,\); return a tensor \(3,\)"),
        (torch.ones(3, 1), r"shape \(3, 1\)"),
        (
            torch.tensor([0.0, math.nan, 0.0]),
            r"nan.*shape \(3,\); return a tensor \(3,\) of finite numbers in \[0, 1\]",
        ),
        (torch.tensor([0.0, math.inf, 0.0]), "inf"),
        (torch.tensor([0.0, 1.5, 0.0]), "1.5"),
        (torch.tensor([-0.1, 0.5, 0.0]), "-0.1"),
        ([0.0, 0.5, 0.0], "returned a list; return a tensor"),
    ],
)
def test_scores_that_are_none(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reward(name="mine", score=lambda images, conditions: found, bounds=(0.0, 1.0))(PICTURES, PROMPTS)


def test_scores_have_no_gradient_and_are_on_the_cpu() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    reward = Reward(name="mine", score=lambda images, conditions: weight, bounds=(0.0, 1.0))
    found = reward(PICTURES, PROMPTS)
    assert not found.requires_grad and found.dtype == torch.float32 and found.device.type == "cpu"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PICTURES[0], r"\(B, C, H, W\)"),
        ((PICTURES * 255).to(torch.uint8), "uint8"),
        (PICTURES * 2 - 1, r"must lie in \[0, 1\], got -"),
        (torch.full_like(PICTURES, math.nan), "got nan"),
        (PICTURES[:2], "2 images need as many conditions, got 3"),
    ],
)
def test_images_that_are_none(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(f"{ME}:brightness")(images, PROMPTS)


def test_conditions_must_fit_the_network(clip: Path) -> None:
    grey = torch.rand(2, 1, 8, 8)
    classes = load_reward("accuracy:zoo:digits-features")
    for conditions in (["three", 3], [3, 10], [-1, 0]):
        with pytest.raises(ValueError, match=r"must be classes 0 \.\. 9"):
            classes(grey, conditions)
    with pytest.raises(ValueError, match=r"must be prompts, got \[1, 2, 3\]"):
        load_reward(f"clip_score:clip:{clip}")(PICTURES, [1, 2, 3])
    with pytest.raises(ValueError, match="none of the data set shapes"):
        load_reward("accuracy:zoo:shapes-features")(torch.rand(1, 3, 32, 32), ["a dog"])
