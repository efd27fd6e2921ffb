"""Feature networks and reference sets of the evaluator."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flowaccel import zoo
from flowaccel.data import DATASETS, ImageSet

from .metrics import ReferenceSet
from .moments import Moments

_BATCH = 500
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network that turns images into features, with what identifies it."""

    name: str
    module: nn.Module
    fingerprint: str
    """sha256 over the class name and every tensor of the network, 16 hex digits."""
    classify: Callable[[Tensor], Tensor] | None
    """Features (N, d) -> class ids (N,), where the network is a classifier."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float (N, d)."""
        device = next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))
        return torch.cat([self.module(batch.to(device)).float().cpu() for batch in images.split(_BATCH)])


def load_features(name: str) -> FeatureNetwork:
    """A feature network by name: `zoo:NAME`, or `module:attribute` for one of your own.

    Your own is a callable without arguments (a class or function) that returns an `nn.Module` mapping uint8 images (N,
    C, H, W) to features (N, d); where it has a method `logits(features)`, class accuracy can be measured too.

    Raises:
        ValueError: unknown name, or not such a callable.
    """
    if name.startswith(zoo.PREFIX):
        module: nn.Module = zoo.load_classifier(name)
    else:
        module = _import_network(name)
    logits = getattr(module.eval(), "logits", None)
    return FeatureNetwork(
        name=name,
        module=module,
        fingerprint=fingerprint(module),
        classify=None if logits is None else torch.no_grad()(lambda features: logits(features).argmax(1)),
    )


def _import_network(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"features must be zoo:NAME or MODULE:ATTRIBUTE, got {name!r}")
    try:
        network = getattr(importlib.import_module(module_name), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"features {name!r} cannot be made: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"features {name!r} must return an nn.Module, got {type(network).__name__}")
    return network


def fingerprint(module: nn.Module) -> str:
    """What identifies a network: a hash of its class and weights, 16 hex digits."""
    total = hashlib.sha256(type(module).__name__.encode())
    for key, value in sorted(module.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def load_reference(name: str, network: FeatureNetwork, image_size: tuple[int, ...] | None = None) -> ReferenceSet:
    """Reference features: `zoo:SET` (the `reference` split of embedded data) or a folder of images.

    Args:
        name: which reference.
        network: the feature network.
        image_size: (C, H, W) of the samples that will be compared with it.

    Raises:
        ValueError: unknown set, empty folder, or images of another size than the samples.
    """
    images = _reference_images(name)
    if image_size is not None and tuple(images.shape[1:]) != tuple(image_size):
        raise ValueError(
            f"the reference {name!r} has images of shape {tuple(images.shape[1:])} (channels, height, width), the "
            f"samples {tuple(image_size)}; both must agree: resizing would be part of the metric"
        )
    features = network(images)
    return ReferenceSet(name=name, features=features, moments=Moments.of(features))


def check_reference(name: str) -> None:
    """Raise ValueError unless `load_reference` knows where to look for `name`."""
    if not name.startswith(zoo.PREFIX):
        _image_files(name)
    elif name.removeprefix(zoo.PREFIX) not in DATASETS:
        known = ", ".join(zoo.PREFIX + key for key in DATASETS)
        raise ValueError(f"unknown reference {name!r}; embedded ones are {known}")


def _image_files(folder: str) -> list[Path]:
    files = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"reference must be zoo:SET or a folder with images; {folder!r} has none")
    return files


def _reference_images(name: str) -> Tensor:
    check_reference(name)
    if name.startswith(zoo.PREFIX):
        return quantise(DATASETS[name.removeprefix(zoo.PREFIX)]("reference"))
    arrays = [_read(path) for path in _image_files(name)]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"the images in {name} have different shapes: {sorted(shapes)[:4]}")
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked.unsqueeze(1) if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2)


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError) as error:  # SyntaxError is what PIL raises on a broken chunk
        raise ValueError(f"reference image {path} is damaged ({error})") from error


def quantise(images: ImageSet) -> Tensor:
    """A data set's images as uint8 (N, C, H, W), rounded as samples are."""
    return ((images.images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
