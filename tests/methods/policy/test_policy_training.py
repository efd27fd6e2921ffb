"""Training a policy on a tiny pipeline: what it sees, what it learns, and how it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import tiny
from flowaccel import CheckpointError
from flowaccel.evaluation import Classes
from flowaccel.methods.policy.network import CACHE, COUNT, STEP, AccelerationPolicy
from flowaccel.methods.policy.policy_decisions import ScriptSource
from flowaccel.methods.policy.train import rollout as policy_rollout
from flowaccel.methods.policy.train.discriminator import DiscriminatorConfig, DiscriminatorTraining, new_discriminator
from flowaccel.methods.policy.train.loop import (
    REFERENCES,
    PolicyObjective,
    PolicySettings,
    PolicyTask,
    condition_width,
    fidelity,
    references,
)
from flowaccel.methods.policy.train.rewards import Reward
from flowaccel.methods.policy.train.rollout import Rollout, measured_costs, roll_out, sampled
from flowaccel.training.loop import LoopConfig, train

POOL = 10
COUNTS = (2, 3, 5, 8)
FIXED = 40
TASK = PolicyTask(conditions=Classes((0, 1)), size=POOL, steps=5, seed=1)


def pipeline() -> Any:
    pipe = tiny.sit_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def heads(pipe: Any, **config: Any) -> AccelerationPolicy:
    torch.manual_seed(0)
    width = condition_width(pipe, TASK)
    channels = pipe.transformer.config.in_channels
    return AccelerationPolicy(channels, width, width=8, max_steps=5, costs={"reuse": 0.1}, **config)


def brightness(images: Tensor, conditions: Any) -> Tensor:
    return images.mean(dim=(1, 2, 3))


REWARD = Reward(name="brightness", score=brightness, bounds=(0.0, 1.0))


def objective(pipe: Any, folder: Path, judged: bool = True, total: int = 4, **settings: Any) -> PolicyObjective:
    untouched = references(pipe, TASK, folder)
    judge = None
    if judged:
        network = new_discriminator("conv", tuple(untouched.shape[1:]))
        judge = DiscriminatorTraining(network, untouched, DiscriminatorConfig(learning_rate=1e-2, batch_size=8))
    chosen = PolicySettings(**{"groups": 2, "group_size": 3, **settings})
    return PolicyObjective(pipe, TASK, REWARD, chosen, untouched, total, judge)


def trained(folder: Path, steps: int = 4, stop: int | None = None, **options: Any) -> AccelerationPolicy:
    """Weights after so many updates, or what a run that is killed leaves."""
    pipe = pipeline()
    policy = heads(pipe)
    config = LoopConfig(steps=steps, learning_rate=1e-2, save_every=2)
    for state in train(policy, objective(pipe, folder, **options), config, folder / "training"):
        if state.step == stop:
            break
    return policy


def test_a_killed_training_goes_on_exactly(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop=3)  # saved at 2
    assert [path.name for path in (tmp_path / "parts" / "training").glob("objective-*")] == ["objective-2"]
    found = trained(tmp_path / "parts")
    for expected, parameter in zip(whole.parameters(), found.parameters(), strict=True):
        assert torch.equal(expected, parameter)
    start = heads(pipeline())
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), whole.parameters(), strict=True))


def test_a_training_with_another_judge_is_not_taken_up(tmp_path: Path) -> None:
    trained(tmp_path, stop=3, judged=False)
    with pytest.raises(CheckpointError, match="holds no discriminator"):
        trained(tmp_path)


@pytest.mark.parametrize("config", [{}, {"levels": (COUNT,), "counts": COUNTS}], ids=["step", "count"])
def test_what_an_update_sees(tmp_path: Path, config: dict[str, Any]) -> None:
    pipe = pipeline()
    policy, found = heads(pipe, **config), objective(pipe, tmp_path)
    loss = found.at(0)(policy, torch.Generator().manual_seed(0))
    last = found.last
    assert last is not None
    assert loss.isfinite() and last.stats.clip_fraction == 0 and last.stats.ratio == 1
    assert 1 <= last.computed <= last.steps <= 5
    assert last.computed <= last.cost <= last.computed + 0.1 * (last.steps - last.computed) + 1e-5
    assert 0 <= last.quality <= 1 and last.realism is not None and 0 <= last.realism <= 1


@pytest.mark.gpu
def test_an_update_on_a_gpu(tmp_path: Path) -> None:
    pipe = pipeline().to("cuda")
    policy, found = heads(pipe).to("cuda"), objective(pipe, tmp_path)
    found.at(0)(policy, torch.Generator().manual_seed(0)).backward()
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in policy.parameters())


def test_rollouts_of_one_sample_differ_by_decisions_alone() -> None:
    pipe = pipeline()
    policy = heads(pipe)
    ids = [3, 3, 3]
    same = roll_out(pipe, policy, lambda: TASK.generate(pipe, ids), sampled(policy, [(7,), (7,), (8,)]))
    assert torch.allclose(same.images[0], same.images[1], atol=1e-5)
    assert not torch.allclose(same.images[0], same.images[2], atol=1e-5)
    again = roll_out(pipe, policy, lambda: TASK.generate(pipe, ids), sampled(policy, [(7,), (7,), (8,)]))
    assert torch.equal(same.images, again.images)


def test_only_what_was_free_is_in_the_choices() -> None:
    """No cache decision at the first step and after the longest reuse; no jump at the last step."""
    pipe = pipeline()
    policy = heads(pipe, max_reuse=1)
    source = sampled(policy, [(1,), (2,)], limits=(0.97, 0.99))
    found = roll_out(pipe, policy, lambda: TASK.generate(pipe, [0, 1]), source)
    assert found.executed.steps.tolist() == [5, 5]
    assert len(found.choices[STEP]) == 2 * 4
    forced = 2 + int(sum(found.executed.reused[found.executed.image == image][:-1].sum() for image in (0, 1)))
    assert len(found.choices[CACHE]) == 2 * 5 - forced


def test_a_count_is_chosen_once_by_what_the_step_head_sees_first() -> None:
    pipe = pipeline()
    ids, seeds = [0, 1, 2], [(1,), (2,), (4,)]

    def played(policy: AccelerationPolicy, task: PolicyTask = TASK) -> Rollout:
        return roll_out(pipe, policy, lambda: task.generate(pipe, ids), sampled(policy, seeds, limits=(0.97, 0.99)))

    policy = heads(pipe, levels=(COUNT, CACHE), counts=COUNTS)
    found, first = played(policy), played(heads(pipe, levels=(STEP,))).choices[STEP].take(torch.arange(3))
    chosen = found.choices[COUNT]
    assert chosen.image.tolist() == ids
    assert torch.equal(chosen.features, first.features) and torch.equal(chosen.condition, first.condition)
    counts = [COUNTS[choice] for choice in chosen.action.tolist()]
    assert len(set(counts)) > 1
    assert found.executed.steps.tolist() == [min(count, 5) for count in counts]
    assert COUNT not in played(policy, replace(TASK, steps=1)).choices  # it goes to the end in any case


def test_executed_tells_reuse_from_idleness() -> None:
    pipe = pipeline()
    policy = heads(pipe)
    source = ScriptSource([[0.5, 0.0], [0.9, 0.5, 0.2, 0.0]], {CACHE: [[0, 0], [0, 1, 0, 1]]})
    found = roll_out(pipe, policy, lambda: TASK.generate(pipe, [0, 1]), source).executed
    assert found.steps.tolist() == [2, 4]
    assert found.computed.tolist() == [2, 2]


@pytest.mark.slow
def test_reuse_is_measured_to_cost_less() -> None:
    pipe = tiny.sit_pipeline(num_layers=12, num_attention_heads=4, attention_head_dim=32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    found = measured_costs(pipe, heads(pipe), lambda steps: TASK.generate(pipe, range(4), steps), rounds=3)
    assert 0 <= found["reuse"] < 0.9


@pytest.mark.parametrize(
    "config",
    [{"levels": (STEP, CACHE)}, {"levels": (CACHE,)}, {"levels": (COUNT, CACHE), "counts": COUNTS}],
    ids=["step", "alone", "count"],
)
def test_costs_are_of_what_was_done(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With rails that force some steps to compute, as many steps as the heads allow, and text encoders."""

    def seconds(calls: Any, **options: Any) -> dict[str, Any]:
        done = {name: call().executed for name, call in calls.items()}
        computed = {name: int(found.computed[0]) for name, found in done.items()}
        return {
            name: SimpleNamespace(median=FIXED + 3 * computed[name] + int(found.steps[0] - computed[name]))
            for name, found in done.items()
        }

    monkeypatch.setattr(policy_rollout, "measure_latency", seconds)
    pipe = pipeline()
    found = measured_costs(pipe, heads(pipe, max_reuse=1, **config), lambda steps: TASK.generate(pipe, range(2), steps))
    assert found["dense_seconds"] == pytest.approx(3) and found["reuse"] == pytest.approx(1 / 3)


def test_references_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    first = references(pipe, TASK, tmp_path, batch=4)
    assert first.shape[0] == POOL and first.min() >= 0 and first.max() <= 1
    assert torch.allclose(first[3:4], TASK.generate(pipe, [3]), atol=1e-5)
    monkeypatch.setattr(PolicyTask, "generate", None)
    assert torch.equal(references(pipe, TASK, tmp_path), first)
    for change in ({"size": 11}, {"seed": 2}, {"steps": 6}, {"conditions": Classes((1, 0))}):
        with pytest.raises(CheckpointError, match="of another task"):
            references(pipe, replace(TASK, **change), tmp_path)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    with pytest.raises(CheckpointError, match="of another task"):
        references(pipe, TASK, tmp_path)
    (tmp_path / REFERENCES).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged"):
        references(pipe, TASK, tmp_path)


def test_fidelity() -> None:
    images = torch.rand(3, 1, 4, 4) + 0.5
    assert torch.equal(fidelity(images, images), torch.ones(3))
    assert fidelity(1.1 * images, images)[0].item() == pytest.approx(2.718281828**-1, abs=1e-4)


def test_batches_of_rollouts_are_one(tmp_path: Path) -> None:
    pipe = pipeline()
    policy, found = heads(pipe), []
    for size in (6, 4):
        made = objective(pipe, tmp_path, judged=False, batch_size=size)
        made.at(0)(policy, torch.Generator().manual_seed(0))
        found.append(made._experience)
    whole, parts = found
    assert torch.allclose(whole.advantages, parts.advantages, atol=1e-3)
    for level in (STEP, CACHE):
        one, two = (experience.choices[level] for experience in found)
        order, other = one.image.argsort(stable=True), two.image.argsort(stable=True)
        assert torch.equal(one.image[order], two.image[other])
        assert torch.allclose(one.action[order].double(), two.action[other].double(), atol=1e-4)


def test_later_epochs_are_clipped_and_make_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    policy, made = heads(pipe), objective(pipe, tmp_path, judged=False, epochs=2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    made.at(0)(policy, torch.Generator().manual_seed(0)).backward()
    first = made.last
    assert first is not None and first.stats.ratio == 1
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTask, "generate", None)
        made.at(1)(policy, torch.Generator().manual_seed(1))
    second = made.last
    assert second is not None and second.reward == first.reward
    assert second.stats.ratio != 1 and second.stats.clip_fraction > 0
    with pytest.raises(ValueError, match="save_every be a multiple of epochs, 2"):
        objective(pipe, tmp_path, judged=False, epochs=2).at(1)(policy, torch.Generator())


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trained by one process, got 2"):
        objective(pipeline(), tmp_path)


def test_a_pool_holds_the_samples_of_an_update(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="groups must be at most the 10 samples of the pool, got 11"):
        objective(pipeline(), tmp_path, groups=11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"discount": 1.0}, "discount must lie in"),
        ({"estimator": "ppo"}, "estimator must be one of grpo, rloo"),
        ({"clip": 0.0}, "clip must lie in"),
        ({"price": -1.0}, "price must be at least 0"),
        ({"realism": -1.0}, "realism is a weight"),
        ({"fidelity": float("nan")}, "fidelity is a weight"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicySettings(**settings)
