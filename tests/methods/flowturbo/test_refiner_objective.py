"""What the objectives draw, feed and forbid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from flowaccel.data import ImageSet
from flowaccel.methods.flowturbo import train as refiner_module
from flowaccel.methods.flowturbo.accelerator import new_refiner
from flowaccel.methods.flowturbo.train import DELTA_MAX, RefinerObjective, RefinerTerms
from flowaccel.models import DigitsClassifier
from flowaccel.training.features import ClassifierObjective, to_uint8
from flowaccel.training.flow import FlowObjective, shift_augment
from flowaccel.training.loop import LoopConfig, train

NULL = 10


def image_set(count: int = 40) -> ImageSet:
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
    return ImageSet(images=images, labels=torch.arange(count) % 10)


TEACHER = tiny.sit_network().requires_grad_(False)
REFINER = tiny.random_refiner(TEACHER)
DATA = image_set()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objective(**options: Any) -> RefinerObjective:
    return RefinerObjective(teacher=TEACHER, data=DATA, null_label=NULL, **options)


@dataclass
class Seen:
    """What one evaluation handed to `refiner_terms`, and what came back."""

    state: Tensor
    t: Tensor
    delta: Tensor
    labels: Tensor
    dropped: Tensor
    options: dict[str, Any]
    terms: RefinerTerms


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function (objective) -> `Seen`."""
    original = refiner_module.refiner_terms
    found: list[Seen] = []

    def watched(_: nn.Module, __: nn.Module, *draws: Tensor, **options: Any) -> RefinerTerms:
        terms = original(_, __, *draws, **options)
        found.append(Seen(*draws, options=options, terms=terms))
        return terms

    monkeypatch.setattr(refiner_module, "refiner_terms", watched)

    def evaluate(target: RefinerObjective, seed: int = 1, refiner: nn.Module = REFINER) -> Seen:
        loss = target(refiner, seeded(seed))
        assert loss.shape == ()
        torch.testing.assert_close(loss, found[-1].terms.loss.mean())
        return found[-1]

    return evaluate


def test_defaults_are_the_published_recipe(watch: Any) -> None:
    plain = objective()
    assert (plain.batch_size, plain.delta_min, plain.delta_max, plain.label_drop) == (18, 0.0, DELTA_MAX, 0.1)
    assert (plain.guidance_scale, plain.drop_both, plain.clamp, plain.per_sample_delta) == (1.0, False, False, False)
    assert plain.trajectory_steps == 0
    seen = [watch(plain, seed) for seed in range(40)]
    assert all(entry.state.shape == (18, 1, 8, 8) for entry in seen)
    assert all(entry.delta.shape == (1,) for entry in seen)
    deltas = torch.cat([entry.delta for entry in seen])
    assert 0 <= deltas.min() < 0.02
    assert 0.1 < deltas.max() < DELTA_MAX
    times = torch.cat([entry.t for entry in seen])
    assert 0 <= times.min() < 0.01
    assert 0.99 < times.max() < 1
    share = torch.cat([entry.dropped for entry in seen]).float().mean()
    assert 0.06 < share < 0.14
    assert (torch.cat([entry.terms.next_time for entry in seen]) > 1).any()


def test_states_are_noised_data_with_their_labels(watch: Any) -> None:
    seen = watch(objective(batch_size=6))
    flat = DATA.images.flatten(1)
    for state, t, label in zip(seen.state.flatten(1), seen.t, seen.labels, strict=True):
        noise = (state - t * flat) / (1 - t)  # for the right image this has the moments of noise
        spread = (noise.std(dim=1) - 1).abs()[DATA.labels == label]
        assert spread.min() < 0.35


def test_same_generator_same_loss() -> None:
    first, again, other = (objective()(REFINER, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    before = torch.random.get_rng_state()
    objective(trajectory_steps=3, per_sample_delta=True)(REFINER, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_clamp(watch: Any) -> None:
    for seed in range(10):
        free, clamped = (watch(objective(delta_max=0.9, clamp=clamp), seed) for clamp in (False, True))
        torch.testing.assert_close(clamped.terms.next_time, free.terms.next_time.clamp(max=1), rtol=0, atol=1e-6)
        assert clamped.terms.next_time.max() <= 1
        early = free.terms.next_time <= 1
        torch.testing.assert_close(clamped.terms.loss[early], free.terms.loss[early])


@pytest.mark.parametrize("per_sample", [False, True])
def test_inside(per_sample: bool, watch: Any) -> None:
    for seed in range(10):
        free, inside = (
            watch(objective(delta_max=0.9, per_sample_delta=per_sample, inside=inside), seed)
            for inside in (False, True)
        )
        torch.testing.assert_close(inside.delta, free.delta)
        torch.testing.assert_close(inside.t, free.t * (1 - free.delta))
        assert inside.terms.next_time.max() < 1 + 1e-6


def test_per_sample_delta(watch: Any) -> None:
    seen = watch(objective(per_sample_delta=True, batch_size=30))
    assert seen.delta.shape == (30,)
    assert len(set(seen.delta.tolist())) == 30
    torch.testing.assert_close(seen.terms.next_time, seen.t + seen.delta)


@pytest.mark.parametrize("per_sample", [False, True])
def test_delta_range(per_sample: bool, watch: Any) -> None:
    target = objective(per_sample_delta=per_sample, delta_min=0.2, delta_max=0.25)
    deltas = torch.cat([watch(target, seed).delta for seed in range(30)])
    assert 0.2 <= deltas.min() < 0.205
    assert 0.245 < deltas.max() < 0.25


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 18)])
def test_label_drop(share: float, expected: int, watch: Any) -> None:
    seen = watch(objective(label_drop=share))
    assert int(seen.dropped.sum()) == expected
    labels = torch.full_like(seen.labels, NULL) if expected else seen.labels
    target = TEACHER(seen.terms.next_state, seen.terms.next_time, labels).sample
    torch.testing.assert_close(seen.terms.target, target)


def test_drop_both(watch: Any) -> None:
    kept, both = (watch(objective(label_drop=0.5, drop_both=drop_both)) for drop_both in (False, True))
    dropped = kept.dropped
    assert 0 < dropped.sum() < len(dropped)
    torch.testing.assert_close(both.terms.velocity[~dropped], kept.terms.velocity[~dropped])
    null = TEACHER(both.state, both.t, torch.full_like(both.labels, NULL)).sample
    torch.testing.assert_close(both.terms.velocity[dropped], null[dropped])
    assert not torch.isclose(both.terms.velocity[dropped], kept.terms.velocity[dropped]).all()


def test_guidance(watch: Any) -> None:
    plain, guided = (watch(objective(guidance_scale=scale)) for scale in (1.0, 4.0))
    null = TEACHER(plain.state, plain.t, torch.full_like(plain.labels, NULL)).sample
    expected = null + 4 * (plain.terms.velocity - null)
    torch.testing.assert_close(guided.terms.velocity, expected, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(guided.terms.loss, plain.terms.loss).all()


def test_trajectory_states_are_on_the_grid(watch: Any) -> None:
    steps = 4
    seen = watch(objective(trajectory_steps=steps, guidance_scale=2.0, batch_size=12))
    draws = watch(objective(guidance_scale=2.0, batch_size=12))
    assert torch.equal(seen.t, (draws.t * steps).floor() / steps)
    assert len(set(seen.t.tolist())) > 2
    assert set(seen.t.tolist()) <= {0.0, 0.25, 0.5, 0.75}
    generator = seeded()
    torch.randint(len(DATA), (12,), generator=generator)
    state = torch.randn(12, 1, 8, 8, generator=generator)
    by_hand = {0.0: state}
    for k in range(steps - 1):
        time = torch.full((12,), k / steps)
        conditional = TEACHER(state, time, seen.labels).sample
        null = TEACHER(state, time, torch.full_like(seen.labels, NULL)).sample
        state = state + (null + 2 * (conditional - null)) / steps
        by_hand[(k + 1) / steps] = state
    for index, t in enumerate(seen.t.tolist()):
        torch.testing.assert_close(seen.state[index], by_hand[t][index], rtol=1e-4, atol=1e-5)
    assert not seen.state.requires_grad


def test_fresh_refiner_has_no_offset(watch: Any) -> None:
    seen = watch(objective(), refiner=new_refiner(TEACHER))
    assert torch.equal(seen.terms.offset, torch.zeros_like(seen.terms.offset))
    assert seen.terms.offset.shape == seen.terms.velocity.shape
    expected = (seen.terms.velocity - seen.terms.target).square().flatten(1).mean(1)
    torch.testing.assert_close(seen.terms.loss, expected)


def test_gradients_reach_the_refiner_alone() -> None:
    teacher, refiner = tiny.sit_network(), tiny.random_refiner(TEACHER)
    RefinerObjective(teacher=teacher, data=DATA, null_label=NULL, trajectory_steps=2)(refiner, seeded()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in refiner.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta_max": 0.0}, "0 <= delta_min < delta_max <= 1, got 0.0 and 0.0"),
        ({"delta_max": 1.5}, "0 <= delta_min < delta_max <= 1, got 0.0 and 1.5"),
        ({"delta_min": 0.2}, "0 <= delta_min < delta_max <= 1, got 0.2 and 0.12"),
        ({"delta_min": -0.1}, "0 <= delta_min < delta_max <= 1, got -0.1 and 0.12"),
        ({"delta_max": float("nan")}, "0 <= delta_min < delta_max <= 1, got 0.0 and nan"),
        ({"label_drop": -0.1}, r"label_drop must lie in \[0, 1\], got -0.1"),
        ({"label_drop": 1.1}, r"label_drop must lie in \[0, 1\], got 1.1"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, got 0.5"),
        ({"trajectory_steps": -1}, "trajectory_steps must not be negative, got -1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"per_sample_delta": True, "guidance_scale": 1.5, "clamp": True}])
def test_a_few_dozen_steps_make_a_better_refiner(options: dict[str, Any], tmp_path: Path) -> None:
    teacher = tiny.sit_network(num_layers=2).requires_grad_(False)
    tiny.random_weights(teacher.requires_grad_(True), 3, std=0.15)
    teacher.requires_grad_(False)
    loss = RefinerObjective(teacher=teacher, data=DATA, null_label=NULL, batch_size=32, delta_max=0.3, **options)
    torch.manual_seed(0)
    refiner = new_refiner(teacher)

    @torch.no_grad()
    def held_out() -> float:
        return sum(float(loss(refiner, seeded(seed))) for seed in range(1000, 1008)) / 8

    before = held_out()
    for _ in train(refiner, loss, LoopConfig(steps=60, learning_rate=3e-3, ema_decay=0.9), tmp_path):
        pass
    assert held_out() < 0.8 * before


def test_flow_objective_drops_labels_and_augments() -> None:
    seen: list[tuple[Tensor, ...]] = []
    network = tiny.sit_network()
    network.register_forward_pre_hook(lambda _, args: seen.append(args[:3]))
    augmented: list[int] = []

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        augmented.append(len(images))
        return images

    for drop in (0.0, 1.0):
        loss = FlowObjective(data=DATA, null_label=NULL, batch_size=16, label_drop=drop, augment=augment)
        value = loss(network, seeded())
        assert value.shape == ()
        value.backward()
    assert augmented == [16, 16]
    (state, t, labels), (dropped_state, _, dropped) = seen
    assert torch.equal(state, dropped_state)
    assert (t >= 0).all()
    assert (t < 1).all()
    assert labels.max() < NULL
    assert (dropped == NULL).all()


def test_shift_augment_moves_some_images_a_little() -> None:
    images = DATA.images.repeat(5, 1, 1, 1)
    moved = shift_augment(images, seeded(), probability=0.3, reach=0.5)
    assert moved.shape == images.shape
    changed = (moved != images).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.4
    assert moved.abs().max() <= 1
    assert torch.equal(shift_augment(images, seeded(), probability=0.0), images)
    assert torch.equal(shift_augment(images, seeded(), probability=0.3, reach=0.5), moved)


def test_shift_augment_shifts() -> None:
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 4, 4] = 1
    moved = shift_augment(images, seeded(), probability=1.0, reach=1.0)
    rows, columns = torch.arange(8.0).reshape(8, 1), torch.arange(8.0).reshape(1, 8)
    centres = torch.stack([(moved * axis).sum((1, 2, 3)) for axis in (rows, columns)])
    assert (centres - 4).abs().max() <= 1 + 1e-4
    assert (centres - 4).std() > 0.3


def test_classifier_objective_trains_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = DigitsClassifier(num_features=8, channels=4)
    loss = ClassifierObjective(data=image_set(20), batch_size=20)
    progress = list(train(classifier, loss, LoopConfig(steps=60, learning_rate=1e-2, ema_decay=0.5), tmp_path))
    assert sum(entry.loss for entry in progress[-5:]) < 0.9 * sum(entry.loss for entry in progress[:5])


def test_to_uint8_rounds_and_clamps() -> None:
    assert to_uint8(torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 1.3])).tolist() == [0, 0, 128, 255, 255, 255]
