"""CLIP score, the agreement of images with their prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from flowaccel.evaluation.features.extractors import load_features
from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.metrics.metric import Case, Estimate, Metric, TextMatch, mean_over_prompts
from flowaccel.evaluation.samples.prompt_lengths import token_counts

_BATCH = 100


def load_clip(name: str | None, network: FeatureNetwork) -> FeatureNetwork:
    """Load the network of `clip_score`: the one called `name`, by default the feature network.

    Raises:
        ValueError: it has no text half.
        WeightsNotFoundError, CheckpointError: as `load_features`.
    """
    clip = network if name in (None, network.name) else load_features(name, network.device)
    if clip.encode_text is None:
        raise ValueError(
            f"clip_score needs a CLIP network with its text half and tokenizer, and {clip.name} has none; name one "
            "with --clip (clip=), such as clip or clip:PATH, or leave clip_score out"
        )
    return clip


def warn_of_cut_prompts(clip: FeatureNetwork, prompts: Sequence[str]) -> None:
    """Issue a `UserWarning` where prompts are longer than the network reads."""
    assert clip.encode_text is not None  # load_clip sees to it
    distinct = list(dict.fromkeys(prompts))
    count = sum(tokens > clip.encode_text.longest for tokens in token_counts(clip.encode_text.tokenizer, distinct))
    if count:
        warnings.warn(
            f"{count} of {len(distinct)} prompts are longer than the {clip.encode_text.longest} tokens that "
            f"{clip.name} reads: clip_score judges their beginning only",
            UserWarning,
            stacklevel=2,
        )


def text_match(clip: FeatureNetwork, image_features: Tensor, prompts: Sequence[str]) -> TextMatch:
    """Return the cosine of each image with its prompt.

    Args:
        clip: the network, as `load_clip` gives it.
        image_features: (N, d), what `clip` sees in the images.
        prompts: N texts; what exceeds the length of the network is cut off.
    """
    assert clip.encode_text is not None  # load_clip sees to it
    distinct = list(dict.fromkeys(prompts))
    encoded = torch.cat([clip.encode_text(distinct[i : i + _BATCH]) for i in range(0, len(distinct), _BATCH)])
    row = {prompt: i for i, prompt in enumerate(distinct)}
    of_each = encoded[torch.tensor([row[prompt] for prompt in prompts])]
    cosine = torch.nn.functional.cosine_similarity(image_features.double(), of_each.double(), dim=1)
    return TextMatch(network=clip.name, prompts=tuple(prompts), cosine=cosine)


def _clip_score(case: Case) -> Estimate:
    """Compute 100 max(cos, 0) (arXiv 2104.08718 with w = 100)."""
    match = case.row.text_match
    assert match is not None  # declared in `needs`
    return mean_over_prompts(100 * match.cosine.to(torch.float64).clamp_min(0), match.prompts, case)


METRICS = {
    "clip_score": Metric(
        title="CLIP score, {features}",
        higher_is_better=True,
        estimate=_clip_score,
        needs=("clip",),
        network="clip",
        against=None,
    ),
}
