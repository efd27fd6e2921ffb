"""Accuracy of the attributes that prompts state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowaccel import zoo
from flowaccel.data import ATTRIBUTE_SETS, AttributeSet
from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.metrics.metric import AttributeMatch, Case, Estimate, Metric, mean_over_prompts


def load_attributes(name: str | None, network: FeatureNetwork) -> AttributeSet:
    """Load the set of attributes called `name`, which `network` must recognise.

    Raises:
        ValueError: no name, an unknown set, or a network that sees no attributes or another number of them.
    """
    known = ", ".join(zoo.PREFIX + key for key in ATTRIBUTE_SETS)
    if name is None:
        raise ValueError(
            "attribute_accuracy needs a set of attributes that reads what the prompts state; name it with --attributes "
            f"(attributes=): {known}; or leave attribute_accuracy out"
        )
    found = zoo.find(ATTRIBUTE_SETS, name, "set of attributes")
    if network.attributes is None:
        raise ValueError(
            f"attribute_accuracy needs a feature network with a method `attributes(features)`, and {network.name} has "
            "none; choose another with --features (features=), or leave attribute_accuracy out"
        )
    width = getattr(network.module, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(f"a feature network with attributes must say its width as num_features, got {width!r}")
    seen = network.attributes(torch.zeros(1, width)).shape[1]
    if seen != len(found.names):
        raise ValueError(
            f"the set of attributes {name} has {len(found.names)} ({', '.join(found.names)}), {network.name} sees "
            f"{seen}; they must be made for each other"
        )
    return found


def attribute_match(
    attributes: AttributeSet, network: FeatureNetwork, features: Tensor, prompts: Sequence[str]
) -> AttributeMatch:
    """Return the attributes that N prompts state and those that the network predicts.

    Args:
        attributes: attribute set that reads the prompts, from `load_attributes`.
        network: network that predicts the attributes.
        features: (N, d), of the images.
        prompts: N texts.

    Raises:
        ValueError: a prompt cannot be read.
    """
    assert network.attributes is not None  # load_attributes sees to it
    return AttributeMatch(
        names=attributes.names,
        prompts=tuple(prompts),
        stated=attributes.read(prompts),
        seen=network.attributes(features),
    )


def _attribute_accuracy(case: Case) -> Estimate:
    """Compute the share of images that show all that their prompt states (as GenEval counts, arXiv 2310.11513)."""
    match = case.row.attributes
    assert match is not None  # declared in `needs`
    stated, right = match.stated >= 0, match.stated == match.seen
    by_attribute = {
        name: float(right[asked, column].double().mean())
        for column, (name, asked) in enumerate(zip(match.names, stated.T, strict=True))
        if asked.any()
    }
    estimate = mean_over_prompts((right | ~stated).all(dim=1), match.prompts, case)
    return replace(estimate, extra={"attributes": by_attribute})


METRICS = {
    "attribute_accuracy": Metric(
        title="Attribute accuracy (images that show all that their prompt states), {features}",
        higher_is_better=True,
        estimate=_attribute_accuracy,
        needs=("attributes",),
        against=None,
    ),
}
