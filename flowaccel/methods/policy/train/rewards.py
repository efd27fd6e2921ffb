"""Rewards, which score the quality of images for training policies: built-in and user-defined ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from flowaccel import zoo
from flowaccel.evaluation.features.extractors import imported, load_features
from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.metrics.attribute_accuracy import attribute_match, load_attributes
from flowaccel.evaluation.metrics.clip_score import load_clip, text_match
from flowaccel.training.features import unit_to_uint8

Condition: TypeAlias = str | int
"""Condition of an image: a prompt, or a class."""

PICK_SCORE = "clip:yuvalkirstain/PickScore_v1"
_CLIP_WEIGHT = 2.5
_ANY = (-math.inf, math.inf)


class Score(Protocol):
    """Reward function. It may have `bounds`, the lowest and highest value; without, any number is allowed."""

    def __call__(self, images: Tensor, conditions: Sequence[Condition], /) -> Tensor:
        """Return scores (B,), higher is better, of images (B, C, H, W) in [0, 1] and their conditions."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Checked reward: `reward(images, conditions)` -> (B,) float32 on the CPU."""

    name: str
    score: Score
    bounds: tuple[float, float]
    """Lowest and highest value; infinite where there is none. See `policy_objective.positive`."""

    @torch.no_grad()
    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Return the scores of images.

        Args:
            images: (B, C, H, W) floating, in [0, 1].
            conditions: B prompts or classes.

        Raises:
            ValueError: images or conditions of another form; the score is not what it must be.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating (B, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"images must lie in [0, 1], got {float(images.min()):.4g} to {float(images.max()):.4g}; "
                "take what the pipeline returns with output_type='pt'"
            )
        if len(conditions) != len(images):
            raise ValueError(f"{len(images)} images need as many conditions, got {len(conditions)}")
        return self._checked(self.score(images, conditions), len(images))

    def _checked(self, found: object, images: int) -> Tensor:
        low, high = self.bounds
        wanted = f"return a tensor ({images},) of finite numbers in [{low:g}, {high:g}], one per image"
        if not isinstance(found, Tensor):
            raise ValueError(f"the reward {self.name} returned a {type(found).__name__}; {wanted}")
        if tuple(found.shape) != (images,):
            raise ValueError(f"the reward {self.name} returned shape {tuple(found.shape)}; {wanted}")
        values = found.detach().float().cpu()
        if not bool((values.isfinite() & (values >= low) & (values <= high)).all()):
            raise ValueError(f"the reward {self.name} returned {values.tolist()[:8]}, shape ({images},); {wanted}")
        return values


def feature_network_of(name: str) -> str:
    """Return the name of the feature network of a reward; of a user-defined reward, its own name."""
    kind, _, which = name.partition(":")
    return (which or PICK_SCORE) if kind in _BUILT_IN else name


def load_reward(name: str, device: str | torch.device = "cpu") -> Reward:
    """Load a reward by name.

    * `accuracy:FEATURES`, where `FEATURES` is a classifier that `load_features` knows, such as `zoo:digits-features`:
      the probability of the class that was asked for. Where it sees attributes, as `zoo:shapes-features` does: the
      share of what the prompt states that is right.
    * `clip_score:CLIP`, such as `clip_score:zoo:shapes-clip` or `clip_score:clip:PATH_OR_HUB_ID`: 2.5 max(cos, 0)
      of image and prompt (arXiv 2104.08718).
    * `pick_score` or `pick_score:clip:PATH`: PickScore (arXiv 2305.01569), the same of a CLIP that was trained on what
      people prefer, times its own scale; by default yuvalkirstain/PickScore_v1, which needs its weights.
    * `module:attribute`, one of your own: a callable as `Score` says, or a class that makes one without arguments.

    ImageReward, which the paper takes, is not among them: transformers has no class for it. Wrap its package as one of
    your own, without bounds.

    Raises:
        ValueError: an unknown name, or a network that does not serve.
        WeightsNotFoundError: no weights on this machine and none from the Hub.
        CheckpointError: damaged weights, or those of another network.
    """
    kind, _, which = name.partition(":")
    if kind not in _BUILT_IN:
        return _own(name)
    if not which and kind != "pick_score":
        raise ValueError(f"the reward {kind} needs a network, such as {kind}:{_EXAMPLES[kind]}, got {name!r}")
    score, high = _BUILT_IN[kind](load_features(feature_network_of(name), device))
    return Reward(name=name, score=score, bounds=(0.0, high))


def _own(name: str) -> Reward:
    known = ", ".join([*(f"{kind}:{example}" for kind, example in _EXAMPLES.items()), "pick_score"])
    found = imported(name, "reward", f"{known} or MODULE:ATTRIBUTE (image_reward must be such a one)", call=False)
    if inspect.isclass(found):
        found = imported(name, "reward", known, call=True)
    if not callable(found):
        raise ValueError(
            f"the reward {name!r} must be callable with (images, conditions), got a {type(found).__name__}"
        )
    bounds = getattr(found, "bounds", _ANY)
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"bounds of the reward {name!r} must be two numbers (lowest, highest), got {bounds!r}"
        ) from error
    if not low < high:
        raise ValueError(f"bounds of the reward {name!r} must rise, got ({low:g}, {high:g})")
    return Reward(name=name, score=found, bounds=(low, high))


def _accuracy(network: FeatureNetwork) -> tuple[Score, float]:
    if network.attributes is not None:
        return _attribute_share(network), 1.0
    logits = getattr(network.module, "logits", None)
    if logits is None:
        raise ValueError(
            f"accuracy needs a feature network with a method `logits(features)` or `attributes(features)`, and "
            f"{network.name} has none; take another, such as {_EXAMPLES['accuracy']}"
        )

    def probability(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        shares: Tensor = logits(network(unit_to_uint8(images))).softmax(dim=1)
        classes = shares.shape[1]
        if not all(isinstance(asked, int) and 0 <= asked < classes for asked in conditions):
            raise ValueError(f"conditions of {network.name} must be classes 0 .. {classes - 1}, got {conditions[:8]!r}")
        return shares[torch.arange(len(shares)), torch.tensor(conditions)]

    return probability, 1.0


def _attribute_share(network: FeatureNetwork) -> Score:
    attributes = load_attributes("shapes", network)

    def share(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        features = network(unit_to_uint8(images))
        match = attribute_match(attributes, network, features, _prompts(network.name, conditions))
        stated = match.stated >= 0
        return (stated & (match.stated == match.seen)).sum(dim=1) / stated.sum(dim=1)

    return share


def _clip_score(network: FeatureNetwork) -> tuple[Score, float]:
    return _alignment(network, _CLIP_WEIGHT), _CLIP_WEIGHT


def _pick_score(network: FeatureNetwork) -> tuple[Score, float]:
    encoder = load_clip(None, network).encode_text
    assert encoder is not None  # load_clip sees to it
    weight = float(encoder.model.logit_scale.detach().exp())
    return _alignment(network, weight), weight


def _alignment(network: FeatureNetwork, weight: float) -> Score:
    clip = load_clip(None, network)

    def alignment(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        match = text_match(clip, clip(unit_to_uint8(images)), _prompts(clip.name, conditions))
        return weight * match.cosine.clamp(0, 1)

    return alignment


def _prompts(name: str, conditions: Sequence[Condition]) -> list[str]:
    prompts = [asked for asked in conditions if isinstance(asked, str)]
    if len(prompts) != len(conditions):
        raise ValueError(f"conditions of {name} must be prompts, got {list(conditions)[:8]!r}")
    return prompts


_BUILT_IN = {"accuracy": _accuracy, "clip_score": _clip_score, "pick_score": _pick_score}
_EXAMPLES = {"accuracy": f"{zoo.PREFIX}digits-features", "clip_score": f"{zoo.PREFIX}shapes-clip"}
