"""Pretrained feature networks of real images: Inception, CLIP and DINOv2, from a path, the cache or the Hub.

Inception is a TorchScript file, the only file here that is not safetensors: loading one executes no pickle, but it runs
the TorchScript in it, which can write files. So `inception` alone accepts nothing but the published file, by its hash;
any other needs its path.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.errors import CheckpointError, WeightsNotFoundError
from flowaccel.evaluation.features.identity import check_fingerprint, fingerprint
from flowaccel.evaluation.features.preprocessing import Preprocessing
from flowaccel.models.weights import check_finite, check_folder

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DEFAULT_HUB_ID = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-large"}
_HUB_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NO_WEIGHTS = "no config.json or no model*.safetensors"
_DINOV2_SIZE = 224  # as in arXiv 2306.04675; the networks take others too


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Text encoder of a CLIP."""

    model: Any
    """The whole CLIP."""
    tokenizer: Any

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a text; the rest is cut off."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (N, d) of N texts, float32 on the CPU: projected, not normalised."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.model.text_projection.weight.device)
        text_model = self.model.text_model
        pooled = text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return self.model.text_projection(pooled).float().cpu()


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Network of a fixed input size, with its preprocessing."""

    name: str
    module: nn.Module
    """Preprocessed images (N, 3, size, size) -> features (N, d)."""
    preprocessing: Preprocessing
    weights: str
    """Identity of the network: a hash, and whatever changes the features beside the weights."""
    encode_text: TextEncoder | None = None
    """Texts -> (N, d) in the space of the image features."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the feature network."""
        return _fingerprint(self.weights, self.preprocessing)


def _fingerprint(weights: str, preprocessing: Preprocessing) -> str:
    return hashlib.sha256(f"{weights} {preprocessing.describe()}".encode()).hexdigest()[:16]


def load_pretrained(name: str, expected: str | None = None) -> Pretrained:
    """Load `inception`, `clip` or `dinov2`, alone or followed by `:PATH` (for the latter two also `:HUB_ID`).

    Args:
        name: which.
        expected: the fingerprint that it must have; TorchScript is not loaded with another one.

    Raises:
        ValueError: it has another fingerprint.
        WeightsNotFoundError: not on this machine and not to be had from the Hub; the message says how to get them.
        CheckpointError: damaged, or a network of another kind.
    """
    kind, _, where = name.partition(":")
    if kind == "inception":
        return _inception(name, where, expected)
    where = where or DEFAULT_HUB_ID[kind]
    folder = _folder(kind, where)
    config = _config(folder)
    load = _clip if kind == "clip" else _dinov2
    found = load(f"{kind}:{where}", folder, config)
    check_fingerprint(found.name, found.fingerprint, expected)
    return found


class _Inception(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels).flatten(1)


def _inception(name: str, where: str, expected: str | None) -> Pretrained:
    path = Path(where) if where else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise WeightsNotFoundError(
            f"there is no Inception network at {path}. Give its path as inception:PATH; the file is called "
            f"{INCEPTION_FILE}. On a machine with network: curl --create-dirs -o {path} {INCEPTION_URL}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not where and digest != INCEPTION_SHA256:
        raise CheckpointError(
            f"{path} is not the published {INCEPTION_FILE} (sha256 {digest}, expected {INCEPTION_SHA256}); download it "
            f"again from {INCEPTION_URL}, or name another file as inception:PATH if you trust it: TorchScript is code"
        )
    normalised = Preprocessing(size=299, shift=(128.0,) * 3, scale=(128.0,) * 3)
    check_fingerprint(name, _fingerprint(digest, normalised), expected)
    try:
        layers = torch.jit.load(str(path), map_location="cpu").eval().layers
    except (RuntimeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged, or no TorchScript Inception with `layers` such as {INCEPTION_FILE} "
            f"({_first_line(error)})"
        ) from error
    return Pretrained(name=name, module=_Inception(layers), preprocessing=normalised, weights=digest)


class _ClipImages(nn.Module):
    """Image encoder of a CLIP. It returns the projected embeddings, not normalised, as Frechet distances take them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)


def _clip(name: str, folder: Path, config: dict[str, Any]) -> Pretrained:
    from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

    classes = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection}
    model = _load(classes, name, folder, config)
    vision = getattr(model.config, "vision_config", model.config)
    preprocessing = _preprocessing(folder, vision.image_size, _CLIP_MEAN, _CLIP_STD)
    text = None
    if isinstance(model, CLIPModel) and _has_tokenizer(folder):
        text = TextEncoder(model=model, tokenizer=CLIPTokenizer.from_pretrained(folder, local_files_only=True))
    return Pretrained(
        name=name,
        module=_ClipImages(model),
        preprocessing=preprocessing,
        weights=f"{fingerprint(model)} {vision.num_attention_heads} {vision.hidden_act}",
        encode_text=text,
    )


class _Dinov2Images(nn.Module):
    """DINOv2, returning the class token after the last norm."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).pooler_output


def _dinov2(name: str, folder: Path, config: dict[str, Any]) -> Pretrained:
    from transformers import Dinov2Model

    model = _load({"dinov2": Dinov2Model}, name, folder, config)
    return Pretrained(
        name=name,
        module=_Dinov2Images(model),
        preprocessing=_preprocessing(folder, _DINOV2_SIZE, _IMAGENET_MEAN, _IMAGENET_STD),
        weights=f"{fingerprint(model)} {model.config.num_attention_heads} {model.config.hidden_act}",
    )


def _load(classes: dict[str, Any], name: str, folder: Path, config: dict[str, Any]) -> Any:
    """Load the model in float32, after checking its kind.

    transformers itself would load a folder of another kind, with random weights.
    """
    from safetensors import SafetensorError

    kind = config.get("model_type")
    if kind not in classes:
        raise CheckpointError(f"{name} holds a model of type {kind!r}; allowed are {', '.join(classes)}")
    check_folder(folder)
    try:
        model, found = classes[kind].from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be loaded from {folder}: {_first_line(error)}") from error
    if found["missing_keys"]:
        raise CheckpointError(f"the weights of {name} lack {len(found['missing_keys'])} tensors; download them again")
    check_finite(model, folder)
    return model.eval()


def _folder(kind: str, where: str) -> Path:
    """Return the local folder of a model: a path, or what the cache or the Hub has under this id."""
    if Path(where).is_dir():
        if not _has_weights(Path(where)):
            raise WeightsNotFoundError(_how_to_get(kind, where, f"it has {_NO_WEIGHTS}; pickled weights are not read"))
        return Path(where)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise WeightsNotFoundError(_how_to_get(kind, where, "there is no such folder"))
    from huggingface_hub import snapshot_download

    wanted = [*_HUB_FILES, *_TOKENIZER_FILES] if kind == "clip" else list(_HUB_FILES)
    try:
        cached = Path(snapshot_download(where, allow_patterns=wanted, local_files_only=True))
        if _has_weights(cached):
            return cached
    except (OSError, ValueError):
        pass  # not in the cache; the Hub call below reports errors in the name
    try:
        found = Path(snapshot_download(where, allow_patterns=wanted, etag_timeout=5))
    except (OSError, ValueError) as error:
        raise WeightsNotFoundError(_how_to_get(kind, where, _first_line(error))) from error
    if not _has_weights(found):
        raise WeightsNotFoundError(_how_to_get(kind, where, f"it has {_NO_WEIGHTS}"))
    return found


def _how_to_get(kind: str, where: str, reason: str) -> str:
    hub_id = where if re.fullmatch(r"[\w.-]+/[\w.-]+", where) else DEFAULT_HUB_ID[kind]
    return (
        f"cannot load {kind}:{where} ({reason}). Give the folder with its config.json and model.safetensors as "
        f"{kind}:PATH; on a machine with network: hf download {hub_id} --local-dir PATH"
    )


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer's files, without which transformers makes one that knows no word."""
    names = {path.name for path in folder.iterdir()}
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def _config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    try:
        loaded = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"{folder} is no model: it has no {file}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / file} is not JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{folder / file} must hold an object, got {type(loaded).__name__}")
    return loaded


def _preprocessing(folder: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    """Return the preprocessing, normalised as the folder says, or else as published."""
    file = "preprocessor_config.json"
    said = _config(folder, file) if (folder / file).is_file() else {}
    shift, scale = said.get("image_mean", mean), said.get("image_std", std)
    try:
        (r, g, b), (u, v, w) = ([255 * float(value) for value in values] for values in (shift, scale))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / file} must give three numbers as image_mean and as image_std") from error
    return Preprocessing(size=size, shift=(r, g, b), scale=(u, v, w))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
