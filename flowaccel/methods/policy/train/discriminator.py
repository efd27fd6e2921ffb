"""Discriminators between accelerated and other images, the second half of RAPID3's reward (arXiv 2509.22323).

They are trained along with the policy. The paper tunes a CLIP through adapters; sizes and settings are a
reconstruction. For embedded data, whose images no CLIP has seen, there are a small convolutional network and a head on
the zoo's features.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional

from flowaccel import zoo
from flowaccel.evaluation.features.extractors import load_features
from flowaccel.evaluation.features.preprocessing import Preprocessing, resize
from flowaccel.models import FeatureClassifier
from flowaccel.training.features import unit_to_uint8
from flowaccel.training.loop import as_saved, resume_state, save_state, step_seed

_HELD_OUT = 5
"""Every so many-th case is never trained on."""
_JUDGED = 256
"""Number of the latest held-out images that the accuracy is taken on."""
_SMALLEST_CROP = 0.8
_BATCH = 64


class Discriminator(nn.Module, ABC):
    """Abstract base of discriminators, from images to logits of "not accelerated".

    They read images rounded to bytes, and have no batch statistics or dropout.
    """

    image_shape: tuple[int, int, int]
    """(C, H, W) that it sees."""
    resizes: bool
    """Whether images of other sizes are resized to that."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B,) of images (B, *image_shape), floating, in [0, 1]."""

    def prepared(self, images: Tensor) -> Tensor:
        """Round images to bytes, and resize them if this discriminator does; both kinds of images take this same path.

        Args:
            images: (B, C, H, W) floating, in [0, 1].

        Returns:
            (B, *image_shape) uint8 on the CPU.

        Raises:
            ValueError: images of another shape that it does not resize.
        """
        rounded = unit_to_uint8(images.detach().float()).cpu()
        if tuple(rounded.shape[1:]) == self.image_shape:
            return rounded
        if not self.resizes or rounded.ndim != 4:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape (B, {wanted}) for this discriminator, got {tuple(images.shape)}")
        resized = torch.stack([resize(image, self.image_shape[1]) for image in rounded])
        return resized.round().to(torch.uint8)


class ConvDiscriminator(Discriminator):
    """Discriminator of three strided convolutions and global average pooling, for small images.

    Args:
        image_shape: (C, H, W), at least 8x8.
        width: width of the first layer.
    """

    resizes = False

    def __init__(self, image_shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        self.image_shape = image_shape
        layers: list[nn.Module] = []
        into = image_shape[0]
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [nn.Conv2d(into, out, 3, padding=1, stride=stride), nn.GroupNorm(1, out), nn.SiLU()]
            into = out
        self.trunk: nn.Sequential = nn.Sequential(*layers)
        self.head: nn.Linear = nn.Linear(into, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B,) of images (B, *image_shape) in [0, 1]."""
        logits: Tensor = self.head(self.trunk(2 * images - 1).mean(dim=(2, 3)))[:, 0]
        return logits


class FeatureDiscriminator(Discriminator):
    """Discriminator with a small head on the features of a frozen classifier.

    It sees what the classifier kept, which is less than `ConvDiscriminator` sees.

    Args:
        features: a classifier of the zoo.
        width: width of the hidden layer.
    """

    resizes = False

    def __init__(self, features: FeatureClassifier, width: int = 64) -> None:
        super().__init__()
        self.image_shape = features.image_shape
        self.features: FeatureClassifier = features.eval().requires_grad_(False)
        self.head: nn.Sequential = nn.Sequential(
            nn.Linear(features.num_features, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B,) of images (B, *image_shape) in [0, 1]."""
        logits: Tensor = self.head(self.features(unit_to_uint8(images)))[:, 0]
        return logits


class Bottleneck(nn.Module):
    """Bottleneck adapter (arXiv 1902.00751): x + up(GELU(down(x))).

    It is the identity at first, since `up` starts at zero.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.down: nn.Linear = nn.Linear(size, width)
        self.up: nn.Linear = nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the adapter to (..., size)."""
        adapted: Tensor = hidden + self.up(functional.gelu(self.down(hidden)))
        return adapted


class ClipDiscriminator(Discriminator):
    """Discriminator from a frozen CLIP image encoder with adapters after its last blocks, and a linear head.

    Args:
        tower: image encoder, the `module` of `load_features("clip:...")`.
        preprocessing: size and normalisation of its images.
        width: width of the adapters.
        blocks: number of the last blocks that have one; all where there are fewer.
    """

    resizes = True
    shift: Tensor
    scale: Tensor

    def __init__(self, tower: Any, preprocessing: Preprocessing, width: int = 64, blocks: int = 12) -> None:
        super().__init__()
        self.image_shape = (3, preprocessing.size, preprocessing.size)
        self.register_buffer("shift", torch.tensor(preprocessing.shift).reshape(3, 1, 1) / 255, persistent=False)
        self.register_buffer("scale", torch.tensor(preprocessing.scale).reshape(3, 1, 1) / 255, persistent=False)
        self.tower: Any = tower.eval().requires_grad_(False)
        adapted = list(tower.vision_model.encoder.layers)[-blocks:]
        size = tower.visual_projection.in_features
        self.adapters: nn.ModuleList = nn.ModuleList(Bottleneck(size, width) for _ in adapted)
        for layer, adapter in zip(adapted, self.adapters, strict=True):
            layer.register_forward_hook(lambda module, inputs, output, adapter=adapter: adapter(output))
        self.head: nn.Linear = nn.Linear(tower.visual_projection.out_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B,) of images (B, 3, size, size) in [0, 1]."""
        logits: Tensor = self.head(self.tower((images - self.shift) / self.scale))[:, 0]
        return logits


def new_discriminator(name: str, image_shape: tuple[int, int, int], seed: int = 0) -> Discriminator:
    """Create a discriminator by name.

    * `conv`: `ConvDiscriminator`; the choice for images as small as the embedded ones.
    * `zoo:NAME`: `FeatureDiscriminator` on a classifier of the zoo, or `ClipDiscriminator` on a CLIP of it.
    * `clip:PATH_OR_HUB_ID`: `ClipDiscriminator`.

    Args:
        name: which.
        image_shape: (C, H, W) of the pipeline's images; what resizes takes any.
        seed: seed of its weights.

    Raises:
        ValueError: an unknown name, or one for images of another shape.
        WeightsNotFoundError, CheckpointError: as `load_features`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _new(name, image_shape)
    if not made.resizes and made.image_shape != tuple(image_shape):
        raise ValueError(f"the discriminator {name!r} is for images {made.image_shape}, got {tuple(image_shape)}")
    return made


def _new(name: str, image_shape: tuple[int, int, int]) -> Discriminator:
    if name == "conv":
        return ConvDiscriminator(image_shape)
    if not name.startswith((zoo.PREFIX, "clip")):
        raise ValueError(f"discriminator must be conv, zoo:NAME or clip:PATH, got {name!r}")
    network = load_features(name)
    if isinstance(network.module, FeatureClassifier):
        return FeatureDiscriminator(network.module)
    assert network.preprocessing is not None  # of every CLIP
    return ClipDiscriminator(network.module, network.preprocessing)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop a random square of 80 to 100% of each image's area, resize it to full size, and mirror half: (B, C, H, W).

    For images large enough that resampling hides nothing; those of 8x8 are better left alone.
    """
    count = len(images)
    side = (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * torch.rand(count, generator=generator)).sqrt()
    centre = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - side).unsqueeze(1)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * mirror, side, centre
    grid = functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Replay(nn.Module):
    """Ring buffer of the latest accelerated images, kept in buffers so that a training's state holds them.

    Args:
        size: number of images that are kept.
        image_shape: (C, H, W).
    """

    images: Tensor
    cases: Tensor
    added: Tensor

    def __init__(self, size: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *image_shape, dtype=torch.uint8))
        self.register_buffer("cases", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("added", torch.zeros((), dtype=torch.int64))

    def add(self, images: Tensor, cases: Tensor) -> None:
        """Replace the oldest images by uint8 images (B, C, H, W) of cases (B,)."""
        size = len(self.cases)
        images, cases = images[-size:], cases[-size:]
        slots = (int(self.added) + torch.arange(len(cases))) % size
        self.images[slots], self.cases[slots] = images, cases
        self.added += len(cases)

    def rows(self, *, held_out: bool) -> Tensor:
        """Return the indices of the images of held-out cases, or of the others, latest first."""
        size, added = len(self.cases), int(self.added)
        latest = (added - 1 - torch.arange(min(size, added))) % size
        return latest[(self.cases[latest] % _HELD_OUT == 0) == held_out]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Configuration of a discriminator's training."""

    learning_rate: float = 1e-4
    """Learning rate of adapters; a `ConvDiscriminator` takes ten times as much."""
    weight_decay: float = 1e-2
    batch_size: int = 64
    """Even: half of them accelerated."""
    smoothing: float = 0.1
    """Share of the labels that is spread over both answers."""
    replay: int = 2000
    """Number of the latest accelerated images that are kept."""
    ema_decay: float = 0.99
    """Decay of the averaged weights, which alone give scores."""
    enough: float = 0.9
    """While the held-out accuracy is higher, no step is made: scores would be 0 or 1, the same all over a group."""
    augment: bool = False
    """Train on `crop_and_flip`; for images that are not tiny."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size must be even and at least 2, got {self.batch_size}")
        for name, low, high in (("smoothing", 0.0, 1.0), ("ema_decay", 0.0, 1.0), ("enough", 0.5, 1.01)):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}), got {getattr(self, name)}")
        if self.replay < _HELD_OUT:
            raise ValueError(f"replay must be at least {_HELD_OUT}, got {self.replay}")


class DiscriminatorTraining:
    """Discriminator that is trained along with a policy and scores its images.

    A *case* is a condition (best with the initial noise, too) and has one unaccelerated image, made once. Accelerated
    images name the case they are of, so both kinds are trained on the same conditions. Every fifth case is held out of
    the training and tells the accuracy. All randomness of a step comes from the seed and the step's number.

    Args:
        network: on the device where it runs.
        unaccelerated: (M, C, H, W) floating, in [0, 1], image m of case m; at least 10.
        config: see there.

    Raises:
        ValueError: too few images, or of a shape that the network does not take.
    """

    def __init__(self, network: Discriminator, unaccelerated: Tensor, config: DiscriminatorConfig) -> None:
        if len(unaccelerated) < 2 * _HELD_OUT:
            raise ValueError(
                f"unaccelerated must hold at least {2 * _HELD_OUT} images, got {len(unaccelerated)}: every "
                f"{_HELD_OUT}th case is held out"
            )
        self.network, self.config = network, config
        self.steps = 0
        self._positives = network.prepared(unaccelerated)
        self._replay = Replay(config.replay, network.image_shape)
        self._trained = nn.ModuleDict({"network": network, "replay": self._replay})
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [{"params": [p]} for p in self._parameters], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._ema = EMAModel(self._parameters, decay=config.ema_decay)

    def add(self, images: Tensor, cases: Tensor) -> None:
        """Add accelerated images to the replay buffer.

        Args:
            images: (B, C, H, W) floating, in [0, 1].
            cases: (B,) which case each is of.

        Raises:
            ValueError: another number of cases, unknown ones, or images that do not fit.
        """
        if cases.shape != (len(images),) or not bool(((cases >= 0) & (cases < len(self._positives))).all()):
            raise ValueError(
                f"cases must be {len(images)} numbers of unaccelerated images, 0 .. {len(self._positives) - 1}, got "
                f"{cases.tolist()[:8]} of shape {tuple(cases.shape)}"
            )
        self._replay.add(self.network.prepared(images), cases.cpu())

    def score(self, images: Tensor) -> Tensor:
        """Return d, the probability of "not accelerated": images (B, C, H, W) in [0, 1] -> (B,) in [0, 1] on the CPU.

        It is that of the averaged weights. It changes with `update` only, so score a group between two of these.
        """
        return self._logits(self.network.prepared(images)).sigmoid()

    def accuracy(self) -> float:
        """Return the accuracy of the averaged weights on held-out cases; NaN before there are any.

        It is taken on the latest held-out images and the unaccelerated ones of their cases.
        """
        rows = self._replay.rows(held_out=True)[:_JUDGED]
        if not len(rows):
            return math.nan
        accelerated = self._logits(self._replay.images[rows])
        others = self._logits(self._positives[self._replay.cases[rows]])
        return float(torch.cat([accelerated < 0, others > 0]).float().mean())

    def update(self, steps: int = 1) -> list[float]:
        """Make optimiser steps, or none if the accuracy is high enough before, and return the loss of each.

        Raises:
            ValueError: nothing to train on was added.
            FloatingPointError: the loss is not finite.
        """
        if self.accuracy() > self.config.enough:  # not when it is NaN
            return []
        return [self._step() for _ in range(steps)]

    def save(self, folder: Path) -> None:
        """Write the state into `folder`, atomically, as safetensors; with the accelerated images.

        Raises:
            OSError: it could not be written.
        """
        save_state(folder, self._trained, self._optimizer, self._ema, self.steps, self._settings())

    def resume(self, folder: Path) -> int:
        """Load the state in `folder` if there is one, to continue exactly, and return the number of steps made.

        Raises:
            CheckpointError: the state of another network, configuration or set of unaccelerated images, or a damaged
                one.
        """
        self.steps = resume_state(folder, self._trained, self._optimizer, self._ema, self._settings())
        return self.steps

    def _settings(self) -> dict[str, Any]:
        shown = hashlib.sha256(self._positives.numpy().tobytes()).hexdigest()[:16]
        return as_saved({**asdict(self.config), "network": type(self.network).__name__, "unaccelerated": shown})

    def _step(self) -> float:
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.steps))
        rows = self._replay.rows(held_out=False)
        if not len(rows):
            raise ValueError(
                "there are no accelerated images to train on; `add` some of cases that are not held out (those whose "
                f"number {_HELD_OUT} does not divide)"
            )
        half = self.config.batch_size // 2
        drawn = rows[torch.randint(len(rows), (half,), generator=generator)]
        images = torch.cat([self._replay.images[drawn], self._positives[self._replay.cases[drawn]]]).float() / 255
        if self.config.augment:
            images = crop_and_flip(images, generator)
        device = self._parameters[0].device
        answer = torch.cat([torch.zeros(half), torch.ones(half)]) * (1 - self.config.smoothing)
        answer += self.config.smoothing / 2
        loss = functional.binary_cross_entropy_with_logits(self.network(images.to(device)), answer.to(device))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the discriminator's loss is {loss.item()} at step {self.steps}")
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._ema.step(self._parameters)
        self.steps += 1
        return loss.item()

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        """Return the logits (B,) of the averaged weights for bytes (B, C, H, W), on the CPU."""
        device = self._parameters[0].device
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        try:
            found = [self.network(part.to(device).float() / 255).float().cpu() for part in images.split(_BATCH)]
        finally:
            self._ema.restore(self._parameters)
        return torch.cat(found)
