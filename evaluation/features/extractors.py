"""Feature networks and reference sets of the evaluator."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flowaccel import zoo
from flowaccel.data import REFERENCE_SETS, CaptionedSet, ImageSet
from flowaccel.evaluation.features.identity import check_fingerprint
from flowaccel.evaluation.features.identity import fingerprint as fingerprint
from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.features.pretrained import load_pretrained
from flowaccel.evaluation.features.statistics import is_statistics, load_statistics
from flowaccel.evaluation.metrics.frechet import Moments
from flowaccel.evaluation.metrics.metric import ReferenceSet
from flowaccel.zoo.loading import load_classifier

_PRETRAINED = ("inception", "clip", "dinov2")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_IMAGE_KINDS = "PNG, JPEG, WebP or BMP"
_EIGHT_BIT = {"1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr"}


def module_of(name: str) -> str | None:
    """Return the Python module in a feature network's name, or None for the other forms of `load_features`."""
    kind = name.partition(":")[0]
    return None if kind in (*_PRETRAINED, zoo.PREFIX.removesuffix(":")) else kind


def runs_code(name: str) -> bool:
    """Whether loading the feature network `name` runs code that the name chooses: a Python module, or TorchScript."""
    return module_of(name) is not None or name.startswith("inception:")


def load_features(name: str, device: str | torch.device = "cpu", *, expected: str | None = None) -> FeatureNetwork:
    """Load a feature network by name.

    * `inception:PATH`: the TorchScript `inception-2015-12-05.pt` with the "clean" resize (arXiv 2104.11222);
      `inception` takes that file from torch's cache. TorchScript is code: give only files that you trust.
    * `clip:PATH_OR_HUB_ID` (arXiv 2103.00020), `dinov2:PATH_OR_HUB_ID` (arXiv 2304.07193): folders of transformers with
      safetensors; `clip` is openai/clip-vit-large-patch14, `dinov2` is facebook/dinov2-large.
    * `zoo:NAME`: a network of this repository; a CLIP among them is loaded as `clip:PATH` is.
    * `module:attribute`, one of your own: a callable without arguments (a class or function) that returns an
      `nn.Module` mapping uint8 images (N, C, H, W) to features (N, d); where it has a method `logits(features)`, class
      accuracy can be measured too, where it has `attributes(features)` -> (N, A) indices and an integer `num_features`,
      attribute accuracy.

    The first three resize images of any size and take grey ones as colour. Where the name may come from a file, ask
    `runs_code` first.

    Args:
        name: which.
        device: device on which features are computed.
        expected: the fingerprint that it must have, compared before the network computes anything, and before
            TorchScript is loaded.

    Raises:
        ValueError: unknown name, not such a callable, or another fingerprint.
        WeightsNotFoundError: no weights on this machine and none from the Hub; the message says how to get them.
        CheckpointError: damaged weights, or those of another network.
    """
    if name.partition(":")[0] in _PRETRAINED:
        return _pretrained(name, device, expected)
    if name.startswith(zoo.PREFIX):
        if zoo.entry(name).kind == "clip":
            return replace(_pretrained(f"clip:{zoo.folder(name)}", device, expected), name=name)
        module: nn.Module = load_classifier(name)
    else:
        module = _import_network(name)
    found = fingerprint(module)
    check_fingerprint(name, found, expected)
    logits, attributes = (getattr(module.eval(), method, None) for method in ("logits", "attributes"))
    return FeatureNetwork(
        name=name,
        module=module,
        fingerprint=found,
        classify=None if logits is None else torch.no_grad()(lambda features: logits(features).argmax(1)),
        attributes=None if attributes is None else torch.no_grad()(attributes),
        device=str(device),
    )


def _pretrained(name: str, device: str | torch.device, expected: str | None) -> FeatureNetwork:
    found = load_pretrained(name, expected)
    return FeatureNetwork(
        name=found.name,
        module=found.module.eval(),
        fingerprint=found.fingerprint,
        classify=None,
        preprocessing=found.preprocessing,
        encode_text=found.encode_text,
        device=str(device),
    )


def _import_network(name: str) -> nn.Module:
    made = imported(
        name, "features", "inception, clip or dinov2 (alone or with :PATH), zoo:NAME or MODULE:ATTRIBUTE", call=True
    )
    if not isinstance(made, nn.Module):
        raise ValueError(f"features {name!r} must return an nn.Module, got {type(made).__name__}")
    return made


def imported(name: str, argument: str, allowed: str, *, call: bool) -> Any:
    """Import the object that `MODULE:ATTRIBUTE` names.

    Args:
        name: name of that form.
        argument: argument that has this value, for messages.
        allowed: allowed values of that argument, for messages.
        call: return what it makes when it is called without arguments.

    Raises:
        ValueError: not of that form, no such thing, or it cannot be called so.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{argument} must be {allowed}, got {name!r}")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        return found() if call else found
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{argument} {name!r} cannot be made: {error}") from error


def load_reference(name: str, network: FeatureNetwork, image_size: tuple[int, ...] | None = None) -> ReferenceSet:
    """Load reference features or statistics by name.

    * `zoo:SET`: one of `flowaccel.data.REFERENCE_SETS`;
    * a folder of 8-bit PNG, JPEG, WebP or BMP images, in it or in its sub-folders; a warning counts what else there is;
    * `FILE.safetensors` that `save_statistics` wrote;
    * `FILE.npz` with `mu` and `sigma` (pytorch-fid, clean-fid, ADM, EDM): Fréchet distances only, and nothing tells
      which network they are of.

    Args:
        name: name of the reference.
        network: the feature network.
        image_size: (C, H, W) of the samples that will be compared with it. A network that resizes takes any; for others
            the images of the reference must have the same.

    Raises:
        ValueError: unknown set, empty folder, images of another size than the samples, a damaged file, or statistics of
            another network.
    """
    check_reference(name)
    if is_statistics(name):
        reference = load_statistics(name, features=network.name, fingerprint=network.fingerprint)
        _check_width(name, reference, network)
    else:
        shape, images = _reference_images(name, mixed=network.preprocessing is not None)
        _check_size(name, shape, network, image_size)
        features = network(images)
        reference = ReferenceSet(name=name, features=features, moments=Moments.of(features), image_shape=shape)
    _check_size(name, reference.image_shape, network, image_size)
    return reference


def check_reference(name: str) -> None:
    """Raise a ValueError unless `load_reference` knows where to look for `name`."""
    if is_statistics(name):
        if not Path(name).is_file():
            raise ValueError(f"there is no reference file {name}; `flowaccel stats` makes one from a folder of images")
    elif not name.startswith(zoo.PREFIX):
        _image_files(name)
    else:
        zoo.find(REFERENCE_SETS, name, "reference")


def _check_width(name: str, reference: ReferenceSet, network: FeatureNetwork) -> None:
    if network.preprocessing is not None:  # only then is any image good enough to learn the width from
        width = network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
        if width != len(reference.moments.mean):
            raise ValueError(
                f"the statistics {name} are of {len(reference.moments.mean)} features, {network.name} has {width}; "
                "they were made with another network"
            )


def _check_size(
    name: str, shape: tuple[int, ...] | None, network: FeatureNetwork, image_size: tuple[int, ...] | None
) -> None:
    if network.preprocessing is None and image_size is not None and shape not in (None, tuple(image_size)):
        raise ValueError(
            f"the reference {name!r} has images of shape {shape} (channels, height, width), the samples "
            f"{tuple(image_size)}; both must agree: resizing would be part of the metric, and {network.name} does not"
        )


def _image_files(folder: str) -> list[Path]:
    """Return the images in a folder and its sub-folders; `UserWarning` where there are sub-folders or other files."""
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    files = [path for path in found if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not files:
        raise ValueError(
            "reference must be zoo:SET, a folder with images, or a statistics file FILE.safetensors or FILE.npz; "
            f"{folder!r} has no images"
        )
    below = sum(path.parent != Path(folder) for path in files)
    others = Counter(path.suffix or path.name for path in found if path.suffix.lower() not in _IMAGE_SUFFIXES)
    remarks = [f"{below} of them in sub-folders"] if below else []
    if others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in others.most_common(5))
        remarks.append(f"{others.total()} other files left out, which are no {_IMAGE_KINDS}: {kinds}")
    if remarks:
        warnings.warn(f"reference {folder}: {len(files)} images, {', '.join(remarks)}", UserWarning, stacklevel=2)
    return files


def _reference_images(name: str, mixed: bool) -> tuple[tuple[int, ...] | None, Iterable[Tensor]]:
    """Return the images' common shape, or None where they are `mixed`, and the images."""
    if name.startswith(zoo.PREFIX):
        images = quantise(zoo.find(REFERENCE_SETS, name, "reference")())
        return tuple(images.shape[1:]), images
    files = _image_files(name)
    shapes = {_shape(path) for path in files}
    if len(shapes) > 1 and not mixed:
        raise ValueError(
            f"the images in {name} have different shapes: {sorted(shapes)[:4]}; only inception, clip and dinov2 resize"
        )
    return (shapes.pop() if len(shapes) == 1 else None), map(_read, files)


def _shape(path: Path) -> tuple[int, ...]:
    """Return (C, H, W) from the header alone."""
    with _opened(path) as image:
        return (1 if image.mode == "L" else 3, image.height, image.width)


def _read(path: Path) -> Tensor:
    """Read an image as uint8 (C, H, W). What is neither grey nor RGB is converted to RGB, without its transparency."""
    try:
        with _opened(path) as image:
            array = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError is what PIL raises on a broken chunk
        raise ValueError(f"reference image {path} is damaged ({error})") from error
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"reference image {path} is damaged ({error})") from error
    if image.mode not in {"L", "RGB"} | _EIGHT_BIT:
        image.close()
        raise ValueError(f"reference image {path} has mode {image.mode!r}; allowed are images of 8 bits per channel")
    if getattr(image, "is_animated", False):
        image.close()
        raise ValueError(f"reference image {path} is animated; allowed are still images, so save the frames that count")
    return image


def quantise(images: ImageSet | CaptionedSet) -> Tensor:
    """Return a data set's images as uint8 (N, C, H, W), rounded as samples are."""
    return ((images.images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
