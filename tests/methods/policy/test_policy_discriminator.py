"""Discriminators: what is trained and what is not, on which images, averaged scores, and exact resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tiny
from flowaccel import CheckpointError
from flowaccel.evaluation import load_features
from flowaccel.methods.policy.train.discriminator import (
    Bottleneck,
    ClipDiscriminator,
    ConvDiscriminator,
    Discriminator,
    DiscriminatorConfig,
    DiscriminatorTraining,
    FeatureDiscriminator,
    Replay,
    crop_and_flip,
    new_discriminator,
)
from flowaccel.zoo.loading import load_classifier

CASES = 20
CONFIG = DiscriminatorConfig(learning_rate=1e-2, batch_size=16, replay=60, ema_decay=0.9)
STATE = "state.safetensors"


def sharp(count: int = CASES) -> Tensor:
    """Image m says which case it is of: its first pixel is m / 255."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(count) / 255
    return images


def blurred(cases: Tensor) -> Tensor:
    """Accelerated ones, told apart with ease, that say which case they are of."""
    images = functional.avg_pool2d(sharp()[cases], 3, stride=1, padding=1)
    images[:, 0, 0, 0] = cases / 255
    return images


def conv(seed: int = 0) -> Discriminator:
    return new_discriminator("conv", (1, 8, 8), seed)


def training(config: DiscriminatorConfig = CONFIG, cases: Tensor | None = None) -> DiscriminatorTraining:
    made = DiscriminatorTraining(conv(), sharp(), config)
    cases = torch.arange(CASES) if cases is None else cases
    made.add(blurred(cases), cases)
    return made


def weights(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.parameters()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@contextmanager
def seen_by(network: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = network.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].clone()))
    try:
        yield found
    finally:
        handle.remove()


# networks


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip_folder(tmp_path_factory.mktemp("discriminator-clip"))


def test_an_adapter_is_the_identity_at_first() -> None:
    adapter = Bottleneck(6, 3)
    hidden = torch.randn(2, 4, 6)
    assert torch.equal(adapter(hidden), hidden)
    nn.init.ones_(adapter.up.weight)
    assert not torch.equal(adapter(hidden), hidden)


def test_clip_sees_what_the_evaluator_sees_until_its_adapters_learn(clip: Path) -> None:
    network = new_discriminator(f"clip:{clip}", (3, 20, 14))
    assert isinstance(network, ClipDiscriminator) and network.image_shape == (3, 16, 16)
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = network.head(load_features(f"clip:{clip}")(images))[:, 0]
        torch.testing.assert_close(network(images.float() / 255), expected, rtol=1e-4, atol=1e-5)
        for adapter in network.adapters:
            nn.init.normal_(adapter.up.weight)  # type: ignore[union-attr]
        assert (network(images.float() / 255) - expected).abs().max() > 1e-3


def test_of_a_clip_only_adapters_and_head_learn(clip: Path) -> None:
    network = new_discriminator(f"clip:{clip}", (3, 20, 20))
    tower, before = weights(network.tower), weights(network.adapters) + weights(network.head)  # type: ignore[arg-type]
    images = torch.rand(CASES, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    made = DiscriminatorTraining(network, images, replace(CONFIG, augment=True))
    made.add(images * 0.5, torch.arange(CASES))
    made.update(3)
    assert equal(tower, weights(network.tower))  # type: ignore[arg-type]
    after = weights(network.adapters) + weights(network.head)  # type: ignore[arg-type]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert made.score(images).shape == (CASES,)


def test_only_the_last_blocks_have_adapters(clip: Path) -> None:
    found = load_features(f"clip:{clip}")
    tower: Any = found.module
    layers = tower.vision_model.encoder.layers
    layers.extend([copy.deepcopy(layers[0]) for _ in range(3)])
    assert found.preprocessing is not None
    network = ClipDiscriminator(tower, found.preprocessing, blocks=2)
    assert len(network.adapters) == 2
    assert [bool(layer._forward_hooks) for layer in layers] == [False, False, True, True]


def test_of_features_only_the_head_learns() -> None:
    network = new_discriminator("zoo:digits-features", (1, 8, 8))
    assert isinstance(network, FeatureDiscriminator)
    images = sharp()
    bytes_ = (images * 255).round().to(torch.uint8)
    expected = network.head(load_classifier("zoo:digits-features")(bytes_))[:, 0]
    torch.testing.assert_close(network(images), expected)
    assert {name.split(".")[0] for name, value in network.named_parameters() if value.requires_grad} == {"head"}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_conv_takes_small_images(shape: tuple[int, int, int]) -> None:
    network = new_discriminator("conv", shape)
    assert isinstance(network, ConvDiscriminator)
    images = torch.rand(5, *shape)
    together = network(images)
    assert together.shape == (5,)
    alone = torch.cat([network(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = weights(conv())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert equal(first, weights(conv())) and not equal(first, weights(conv(seed=1)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet", (1, 8, 8), "must be conv, zoo:NAME or clip:PATH, got 'resnet'"),
        ("zoo:digits-features", (3, 32, 32), r"is for images \(1, 8, 8\), got \(3, 32, 32\)"),
        ("zoo:nothing", (1, 8, 8), "unknown zoo entry"),
    ],
)
def test_unknown_discriminators(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_discriminator(name, shape)


def test_images_are_rounded_and_only_a_clip_resizes(clip: Path) -> None:
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(conv().prepared(images), (images * 255).round().to(torch.uint8))
    with pytest.raises(ValueError, match=r"must have shape \(B, 1, 8, 8\).*got \(2, 3, 9, 9\)"):
        conv().prepared(torch.rand(2, 3, 9, 9))
    network = new_discriminator(f"clip:{clip}", (1, 40, 30))
    resized = network.prepared(torch.full((2, 1, 40, 30), 0.4))
    assert resized.dtype == torch.uint8 and resized.shape == (2, 3, 16, 16) and (resized == 102).all()


# augmentation


def test_crops_show_four_fifths_or_more_and_half_are_mirrored() -> None:
    ramp = torch.linspace(0, 1, 64).expand(400, 1, 64, 64)
    found = crop_and_flip(ramp, torch.Generator().manual_seed(0))
    slope = (found[:, 0, 32, 40] - found[:, 0, 32, 24]) / (ramp[0, 0, 32, 40] - ramp[0, 0, 32, 24])
    area = slope.square()
    assert area.min() > 0.79 and area.max() < 1.01 and area.max() - area.min() > 0.15
    assert 150 < int((slope < 0).sum()) < 250
    rows = found[:, 0].std(dim=1)  # across the ramp nothing changes: no rotation
    assert rows.max() < 1e-5
    assert torch.equal(found, crop_and_flip(ramp, torch.Generator().manual_seed(0)))


# the replay


def test_a_ring_keeps_the_latest() -> None:
    ring = Replay(7, (1, 1, 1))
    assert len(ring.rows(held_out=True)) == len(ring.rows(held_out=False)) == 0

    def add(*cases: int) -> None:
        numbers = torch.tensor(cases)
        ring.add(numbers.to(torch.uint8).reshape(-1, 1, 1, 1), numbers)

    def kept(held_out: bool) -> list[int]:
        rows = ring.rows(held_out=held_out)
        assert torch.equal(ring.images[rows].flatten().long(), ring.cases[rows])
        return ring.cases[rows].tolist()

    add(1, 5, 2)
    assert (kept(False), kept(True)) == ([2, 1], [5])
    add(3, 4, 10, 6, 7)
    assert (kept(False), kept(True)) == ([7, 6, 4, 3, 2], [10, 5])
    add(*range(11, 31))
    assert (kept(False), kept(True)) == ([29, 28, 27, 26, 24], [30, 25])
    add(31)
    assert (kept(False), kept(True)) == ([31, 29, 28, 27, 26], [30, 25])


# training


def test_it_learns_what_it_never_saw_and_then_stops() -> None:
    made = training()
    images = blurred(torch.arange(CASES))
    for _ in range(60):
        if not made.update(5):
            break
    assert made.accuracy() > 0.9 and 0 < made.steps < 300
    before, steps = weights(made.network), made.steps
    assert made.update(5) == [] and made.steps == steps and equal(before, weights(made.network))
    held_out = torch.arange(0, CASES, 5)
    assert made.score(images[held_out]).mean() + 0.1 < made.score(sharp()[held_out]).mean()
    # images that it cannot tell apart make it learn again
    made.add(sharp().repeat(3, 1, 1, 1), torch.arange(CASES).repeat(3))
    assert made.accuracy() < 0.9 and len(made.update(2)) == 2


def test_accuracy_is_of_held_out_cases() -> None:
    made = training(cases=torch.tensor([1, 2, 3, 4]))
    assert math.isnan(made.accuracy())
    assert len(made.update(2)) == 2
    cases = torch.tensor([0, 5, 10])
    made.add(blurred(cases), cases)
    accelerated, others = made.score(blurred(cases)), made.score(sharp()[cases])
    right = torch.cat([accelerated < 0.5, others > 0.5]).float().mean()
    assert made.accuracy() == pytest.approx(float(right))


def test_both_halves_of_a_batch_are_of_the_same_cases_and_none_is_held_out() -> None:
    made = training(replace(CONFIG, enough=1.0))
    with seen_by(made.network) as seen:
        made.update(20)
    batches = [batch for batch in seen if len(batch) == CONFIG.batch_size]
    assert len(batches) == 20
    cases = torch.stack([(batch[:, 0, 0, 0] * 255).round().long() for batch in batches])
    accelerated, others = cases[:, :8], cases[:, 8:]
    assert torch.equal(accelerated, others)
    assert set(accelerated.flatten().tolist()) == {case for case in range(CASES) if case % 5}
    expected = (torch.cat([blurred(accelerated[0]), sharp()[others[0]]]) * 255).round() / 255
    torch.testing.assert_close(batches[0], expected)


def test_labels_are_smooth() -> None:
    made = training(replace(CONFIG, learning_rate=0.0))
    with torch.no_grad():
        made.network.head.weight.zero_()  # type: ignore[union-attr, operator]
        made.network.head.bias.fill_(1.5)  # type: ignore[union-attr, operator]
    share = 1 / (1 + math.exp(-1.5))
    of_accelerated = -(0.05 * math.log(share) + 0.95 * math.log(1 - share))
    of_others = -(0.95 * math.log(share) + 0.05 * math.log(1 - share))
    assert made.update(1) == [pytest.approx((of_accelerated + of_others) / 2, rel=1e-5)]


def test_scores_are_of_the_average_and_wait_for_an_update() -> None:
    made = training(replace(CONFIG, enough=1.0))
    images = blurred(torch.arange(4))
    average, decays = weights(made.network), [0.0, *((1 + step) / (10 + step) for step in range(1, 6))]
    for decay in decays:
        made.update(1)
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights(made.network), strict=True)]
    live = weights(made.network)
    first = made.score(images)
    assert ((first > 0) & (first < 1)).all()
    assert torch.equal(made.score(images), first) and equal(live, weights(made.network))
    twin = conv()
    with torch.no_grad():
        for parameter, value in zip(twin.parameters(), average, strict=True):
            parameter.copy_(value)
        rounded = (images * 255).round() / 255
        torch.testing.assert_close(first, twin(rounded).sigmoid(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(first, made.network(rounded).sigmoid())
    made.update(1)
    assert not torch.equal(made.score(images), first)


def test_global_random_state_does_not_matter() -> None:
    ones, others = training(), training()
    ones.update(3)
    torch.manual_seed(77)
    others.update(1)
    torch.rand(5)
    others.update(2)
    assert equal(weights(ones.network), weights(others.network))


def go_on(made: DiscriminatorTraining) -> list[float]:
    losses = made.update(3)
    made.add(blurred(torch.tensor([3, 7])), torch.tensor([3, 7]))
    return losses + made.update(4)


def test_a_resumed_one_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    config = replace(CONFIG, enough=1.0, augment=True)
    whole = training(config)
    go_on(whole)
    whole.save(tmp_path / "half")
    losses = go_on(whole)
    whole.save(tmp_path / "whole")
    resumed = DiscriminatorTraining(conv(seed=5), sharp(), config)
    assert resumed.resume(tmp_path / "half") == 7
    assert go_on(resumed) == losses
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "resumed" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()
    assert torch.equal(resumed.score(sharp()), whole.score(sharp()))
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [STATE]


def test_nothing_saved_is_a_start(tmp_path: Path) -> None:
    assert training().resume(tmp_path) == 0


def test_what_must_not_be_resumed(tmp_path: Path) -> None:
    made = training()
    made.update(1)
    made.save(tmp_path)
    for other in (
        DiscriminatorTraining(conv(), sharp(), replace(CONFIG, smoothing=0.2)),
        DiscriminatorTraining(conv(), 1 - sharp(), CONFIG),
        DiscriminatorTraining(new_discriminator("zoo:digits-features", (1, 8, 8)), sharp(), CONFIG),
    ):
        with pytest.raises(CheckpointError, match="other settings"):
            other.resume(tmp_path)
    with pytest.raises(CheckpointError, match="another network"):
        DiscriminatorTraining(ConvDiscriminator((1, 8, 8), width=4), sharp(), CONFIG).resume(tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        training().resume(tmp_path)


# refusals


def test_cases_must_be_known() -> None:
    made = training()
    for cases in (torch.tensor([0, CASES]), torch.tensor([-1, 0]), torch.tensor([1]), torch.tensor([[0], [1]])):
        with pytest.raises(ValueError, match=r"cases must be 2 numbers of unaccelerated images, 0 \.\. 19"):
            made.add(torch.rand(2, 1, 8, 8), cases)


def test_there_must_be_something_to_train_on() -> None:
    with pytest.raises(ValueError, match="at least 10 images, got 9"):
        DiscriminatorTraining(conv(), sharp(9), CONFIG)
    made = DiscriminatorTraining(conv(), sharp(), CONFIG)
    with pytest.raises(ValueError, match="no accelerated images to train on; `add` some"):
        made.update(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 7}, "batch_size must be even and at least 2, got 7"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay must lie in"),
        ({"enough": 0.4}, "enough must lie in"),
        ({"replay": 4}, "replay must be at least 5, got 4"),
    ],
)
def test_numbers_out_of_range_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**changed)
