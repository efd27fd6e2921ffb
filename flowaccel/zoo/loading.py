"""Loading of the zoo's networks."""

from __future__ import annotations

import json

from flowaccel import zoo
from flowaccel.errors import CheckpointError
from flowaccel.models import DigitsClassifier, FeatureClassifier, ShapesClassifier

_CLASSIFIERS = {network.__name__: network for network in (DigitsClassifier, ShapesClassifier)}


def load_classifier(name: str) -> FeatureClassifier:
    """Load a feature network of the zoo in float32, in evaluation mode, of the class that its configuration names.

    Raises:
        ValueError: no such entry, or one of another kind.
        WeightsNotFoundError: the weights are not installed.
        CheckpointError: the folder holds a network of another class.
    """
    found = zoo.folder_of_kind(name, "features")
    config = found / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    if kind not in _CLASSIFIERS:
        raise CheckpointError(f"{config} names a {kind}; allowed are {', '.join(_CLASSIFIERS)}")
    return _CLASSIFIERS[kind].from_pretrained(found, use_safetensors=True).float().eval()
