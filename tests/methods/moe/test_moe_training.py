"""Training networks with experts: thresholds, schedules, losses, averages and exact resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import tiny
from flowaccel.data import ImageSet
from flowaccel.methods.moe.control import moe_layers, set_aux_loss_scale, set_moe_capacity, set_moe_selection
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel, upcycle_to_moe
from flowaccel.methods.moe.train import (
    EXPERTS,
    PREDICTOR,
    MoEObjective,
    calibrate_thresholds,
    copy_moe_buffers,
    drawn_batches,
    expert_rates,
    moe_losses,
    moe_step,
    prepare_training,
    realised_capacity,
    settle,
)
from flowaccel.training.flow import FlowObjective
from flowaccel.training.loop import LoopConfig, load_average, train

EXPERT_COUNT, TOKENS, BATCH = 4, 16, 32
LOOP = LoopConfig(
    steps=6, learning_rate=3e-3, clip_apart=(PREDICTOR,), weight_decay=0.01, ema_decay=0.8, save_every=2, seed=1
)
STATE = "state.safetensors"


def images(count: int = 60) -> ImageSet:
    pictures = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(9)) * 2 - 1
    return ImageSet(images=pictures, labels=torch.arange(count) % 10)


DATA = images()


def network(router: str = "diffmoe", seed: int = 0, **moe: Any) -> Any:
    """Four experts in one of two blocks, all weights to be trained."""
    torch.manual_seed(seed)
    config = dict(tiny.sit_network(num_layers=2).config)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    made = MoESiTTransformer2DModel(
        **config, moe_config={"router": router, "num_experts": EXPERT_COUNT, "inner_dim": 16, **moe}
    )
    tiny.random_weights(made, seed)
    prepare_training(made)
    return made


def flow(**options: Any) -> FlowObjective:
    return FlowObjective(data=DATA, null_label=10, **{"batch_size": BATCH, **options})


def layer(made: Any) -> Any:
    (found,) = moe_layers(made).values()
    return found


def buffers(made: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": value.clone() for path, one in moe_layers(made).items() for name, value in one.named_buffers()
    }


def equal(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN too."""
    assert ones.keys() == others.keys()
    return all(torch.equal(ones[name].nan_to_num(7.5), others[name].nan_to_num(7.5)) for name in ones)


def states(made: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def one_step(made: Any, seed: int, objective: Any = None) -> None:
    """A training step without an optimiser."""
    made.train()
    (objective or flow())(made, torch.Generator().manual_seed(seed)).backward()
    moe_step(made)


def mean_capacity(made: Any, count: int = 20) -> float:
    found = realised_capacity(made, drawn_batches(flow(), count, 77))
    return sum(found.values()) / len(found)


# thresholds that follow


@pytest.mark.slow
@pytest.mark.parametrize("router", ["diffmoe", "expert_race", "expert_threshold"])
def test_capacity_with_the_followed_thresholds(router: str, tmp_path: Path) -> None:
    """Nothing is fitted afterwards. Weights that come to rest at the end are those that the thresholds followed."""
    made = network(router, threshold_momentum=0.9)
    loop = replace(LOOP, steps=120, learning_rate=1e-3, cosine=True, ema_decay=0.5, save_every=120)
    for _ in train(made, MoEObjective(objective=flow(batch_size=96)), loop, tmp_path):
        pass
    for selection in ("predictor_mask", "gate_threshold") if router == "diffmoe" else (None,):
        if selection is not None:
            set_moe_selection(made, selection)
        assert mean_capacity(made, 60) == pytest.approx(1, abs=0.05), selection


def test_thresholds_are_running_averages_of_what_steps_found() -> None:
    made = network(threshold_momentum=0.75)
    found: list[Tensor] = []
    original = layer(made).thresholds.observe

    def note(observed: dict[str, Tensor]) -> None:
        found.append(observed["predictor"].clone())
        original(observed)

    layer(made).thresholds.observe = note
    for step in range(3):
        one_step(made, step)
    first, second, third = found
    expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
    torch.testing.assert_close(layer(made).thresholds.predictor, expected)
    assert int(layer(made).thresholds.updates) == 3


@pytest.mark.parametrize("router", ["diffmoe", "deepseek"])
def test_only_steps_of_training_move_thresholds_and_biases(router: str) -> None:
    made, draw = network(router), flow()
    one_step(made, 0)
    before = buffers(made)
    made.train()
    draw(made, torch.Generator().manual_seed(1))
    assert equal(buffers(made), before), "a forward alone"
    moe_step(made)
    after = buffers(made)
    assert not equal(after, before)
    made.eval()
    draw(made, torch.Generator().manual_seed(2))
    with torch.no_grad():
        made.train()
        draw(made, torch.Generator().manual_seed(3))
    moe_step(made)
    assert equal(buffers(made), after), "evaluation, and calls without gradients"


@pytest.mark.parametrize("router", ["diffmoe", "deepseek"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, router: str) -> None:
    plain, checkpointed = network(router), network(router)
    checkpointed.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    calls: list[int] = []
    checkpointed.transformer_blocks[1].ff.register_forward_hook(lambda *_: calls.append(1))
    for step in range(2):
        for made in (plain, checkpointed):
            one_step(made, step)
    assert len(calls) == 4, "every block runs twice"
    assert equal(buffers(plain), buffers(checkpointed))
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)
    of_predictor = [value.grad for name, value in plain.named_parameters() if PREDICTOR in name]
    assert len(of_predictor) == (4 if router == "diffmoe" else 0) and all(grad.any() for grad in of_predictor)


# averaged weights


def test_averaged_thresholds_lag_and_copied_ones_do_not() -> None:
    """What an average of all buffers does, as torch's with use_buffers: it starts at 0, where experts take all."""
    made = network()
    average = AveragedModel(made, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    average.update_parameters(made)
    optimizer = torch.optim.AdamW([value for value in made.parameters() if value.requires_grad], lr=3e-3)
    for step in range(40):
        one_step(made, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(made)
    lagging = average.module
    layer(lagging).thresholds.updates.fill_(1)
    assert mean_capacity(lagging) > 1.5
    copy_moe_buffers(made, lagging)
    assert equal(buffers(lagging), buffers(made))
    assert mean_capacity(lagging) < 1.2
    one_step(made, 50)
    assert not equal(buffers(lagging), buffers(made)), "a copy, not the same tensors"


def test_the_loop_keeps_the_followed_thresholds(tmp_path: Path) -> None:
    """Weights are averaged at the end; buffers are those of the last step, also in a saved state."""
    made, seen = network(), []
    for _ in train(made, MoEObjective(objective=flow()), LOOP, tmp_path):
        seen.append((buffers(made), states(made)))
    assert equal(buffers(made), seen[-1][0])
    assert not equal(states(made), seen[-1][1])
    other = network(seed=5)
    load_average(other, tmp_path / STATE)
    assert equal(states(other), states(made))


# fitted thresholds


@pytest.mark.parametrize("router", ["diffmoe", "expert_race", "expert_threshold"])
def test_calibrated_capacities(router: str) -> None:
    made, batches = network(router), drawn_batches(flow(), 20, 3)
    held_out = drawn_batches(flow(), 20, 4)
    calibrate_thresholds(made, batches)
    assert not made.training
    for capacity in (None, 0.5, 2.0, 3.0):
        set_moe_capacity(made, capacity)
        (found,) = realised_capacity(made, held_out).values()
        assert found == pytest.approx(capacity or 1.0, rel=0.05), capacity
    set_moe_capacity(made, None)
    calibrate_thresholds(made, batches, 2.5)
    (found,) = realised_capacity(made, held_out).values()
    assert found == pytest.approx(2.5, rel=0.05)


def test_all_layers_are_calibrated_to_what_those_before_choose() -> None:
    made = network(layers="all")
    calibrate_thresholds(made, drawn_batches(flow(), 20, 3))
    found = realised_capacity(made, drawn_batches(flow(), 20, 4))
    assert list(found) == ["transformer_blocks.0.ff", "transformer_blocks.1.ff"]
    assert list(found.values()) == pytest.approx([1, 1], rel=0.05)


def test_calibration_asks_for_what_it_needs() -> None:
    made, batches = network(), drawn_batches(flow(), 1, 3)
    for fit in (calibrate_thresholds, realised_capacity):
        with pytest.raises(ValueError, match="batches must hold at least one, got none"):
            fit(made, [])
        with pytest.raises(ValueError, match="network must have experts, got a SiTTransformer2DModel without"):
            fit(tiny.sit_network(), batches)
    for capacity in (0, -1, 4.5, float("nan")):
        with pytest.raises(ValueError, match=f"capacity must be above 0 and at most 4, got {capacity}"):
            calibrate_thresholds(made, batches, capacity)
    with pytest.raises(ValueError, match="router='token_choice', which has no thresholds to fit"):
        calibrate_thresholds(network("token_choice"), batches)
    with pytest.raises(ValueError, match="never fitted"):
        realised_capacity(made, batches)
    assert made.training, "it is put back also when it fails"


def test_a_calibration_that_failed_leaves_nothing_behind() -> None:
    """Scores of other inputs would count in the next one."""
    expected, made = network(), network()
    batches, others = drawn_batches(flow(), 3, 3), drawn_batches(flow(), 3, 8)
    calibrate_thresholds(expected, batches, passes=1)
    with pytest.raises(ValueError, match="hidden_states must have shape"):
        calibrate_thresholds(made, [*others, (torch.zeros(1, 3), *others[0][1:])])
    calibrate_thresholds(made, batches, passes=1)
    assert equal(buffers(made), buffers(expected))


def test_realised_capacity_counts_pairs_and_changes_nothing() -> None:
    made = network("token_choice", capacity=3, layers="all")
    batches = drawn_batches(flow(batch_size=5), 2, 3)
    before = states(made)
    assert list(realised_capacity(made, batches).values()) == [3.0, 3.0]
    assert made.training and equal(states(made), before)
    calls: list[Any] = []

    def wrapped(*arguments: Tensor, **options: Any) -> Any:
        calls.append(arguments)
        return made(*arguments, **options)

    realised_capacity(made.eval(), batches, call=wrapped)
    assert not made.training
    assert [len(arguments[0]) for arguments in calls] == [5, 5]


@pytest.mark.parametrize("router", ["diffmoe", "expert_choice"])
def test_settle(router: str) -> None:
    """A network of copies starts with all experts, and ends with as many as its settings say."""
    made = upcycle_to_moe(tiny.sit_network(num_layers=2), {"router": router, "num_experts": 4, "capacity": 2.0})
    assert layer(made).capacity == 4
    settle(made, flow(), batches=20, seed=3)
    assert not made.training
    assert layer(made).capacity == 2
    assert mean_capacity(made) == pytest.approx(2, rel=0.05)


# schedules


@pytest.mark.parametrize(
    ("full_steps", "ramp", "expected"),
    [
        (0, 0, [1, 1, 1]),
        (2, 0, [4, 4, 1, 1]),
        (1, 2, [4, 3, 2, 1, 1, 1]),
        (0, 3, [3.25, 2.5, 1.75, 1, 1]),
    ],
)
def test_capacity_falls_from_all_experts(full_steps: int, ramp: int, expected: list[float], tmp_path: Path) -> None:
    goal = MoEObjective(objective=flow(), full_steps=full_steps, ramp=ramp)
    made = network()
    assert [goal.capacity_at(step, layer(made)) for step in range(len(expected))] == pytest.approx(expected)
    layer(made).capacity = 4.0  # as that of copies
    pairs = []
    for _ in train(made, goal, replace(LOOP, steps=len(expected)), tmp_path):
        pairs.append(layer(made).plan.pairs)
    assert pairs == [round(capacity * BATCH * TOKENS / EXPERT_COUNT) * EXPERT_COUNT for capacity in expected]


@pytest.mark.parametrize("schedule", [{"full_steps": -1}, {"ramp": -2}])
def test_schedules_that_are_refused(schedule: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="full_steps and ramp must not be negative, got"):
        MoEObjective(objective=flow(), **schedule)


def test_rates() -> None:
    """Everything but what is new learns slower; the first part of a name that fits counts."""
    rates = expert_rates(0.25)
    slow = {
        name: next(rate for part, rate in rates.items() if part in name) for name, _ in network().named_parameters()
    }
    fast = {name for name, rate in slow.items() if rate == 1}
    inside = "transformer_blocks.1.ff."
    assert fast == {name for name in slow if name.startswith(inside)}
    assert {rate for name, rate in slow.items() if name not in fast} == {0.25}
    shared = upcycle_to_moe(tiny.sit_network(num_layers=2), {"num_experts": 4}, "shared")
    names = [name for name, _ in shared.named_parameters() if "ff.shared" in name]
    assert names and all(next(rate for part, rate in rates.items() if part in name) == 0.25 for name in names)


# losses


def gradients(made: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in made.named_parameters() if value.grad is not None}


def test_routers_losses_reach_the_gradient_by_themselves() -> None:
    """Of the capacity predictor alone: with another weight its gradient has that factor, and nothing else changes."""
    found = {}
    for weight in (1.0, 3.0, 0.0):
        made = network(aux_loss_weight=weight)
        one_step(made, 0)
        found[weight] = gradients(made)
        (loss,) = moe_losses(made).values()
        assert not loss.requires_grad and (float(loss) > 0) == (weight > 0)
    for name, gradient in found[1.0].items():
        if PREDICTOR in name:
            torch.testing.assert_close(found[3.0][name], 3 * gradient)
            assert not found[0.0][name].any() and gradient.any()
        else:
            assert torch.equal(found[3.0][name], gradient) and torch.equal(found[0.0][name], gradient)
    assert moe_losses(network("expert_choice")) == {}


@pytest.mark.parametrize("router", ["diffmoe", "token_choice"])
def test_accumulated_gradients_are_means(router: str) -> None:
    """With the rest of the loss the routers' losses are divided by how many batches make a step."""
    made, alone = network(router), []
    for seed in (1, 2):
        single = network(router)
        flow()(single, torch.Generator().manual_seed(seed)).backward()
        alone.append(gradients(single))
    set_aux_loss_scale(made, 0.5)
    quantiles = []
    observe = layer(made).thresholds.observe
    layer(made).thresholds.observe = lambda found: (quantiles.append(dict(found)), observe(found))
    for seed in (1, 2):
        (flow()(made, torch.Generator().manual_seed(seed)) / 2).backward()
    moe_step(made)
    for name, gradient in gradients(made).items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, msg=name)
    if router == "diffmoe":
        mean = (quantiles[0]["predictor"] + quantiles[1]["predictor"]) / 2
        torch.testing.assert_close(layer(made).thresholds.predictor, mean)
        assert int(layer(made).thresholds.updates) == 1


@pytest.fixture
def clipped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """A function that trains for one step and says with which gradients."""

    def gradients_of(folder: Path, apart: tuple[str, ...]) -> dict[str, Tensor]:
        made = network(aux_loss_weight=1000.0)
        found: dict[str, Tensor] = {}
        original = torch.optim.AdamW.step

        def step(optimizer: Any, *arguments: Any, **options: Any) -> Any:
            found.update(gradients(made))
            return original(optimizer, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            config = replace(LOOP, steps=1, clip_apart=apart, max_grad_norm=0.01)
            list(train(made, MoEObjective(objective=flow()), config, folder))
        return found

    return gradients_of


def norm(values: list[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values]).norm())


def test_gradients_clipped_apart(clipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part with great gradients takes nothing from the others; those of every part have their own bound."""
    unscaled: list[int] = []
    monkeypatch.setattr(Accelerator, "unscale_gradients", lambda *_: unscaled.append(1))
    together, apart = clipped(tmp_path / "together", ()), clipped(tmp_path / "apart", (PREDICTOR,))
    assert len(unscaled) == 2, "a gradient scaler allows it once in every step"
    predictor = [name for name in together if PREDICTOR in name]
    rest = [name for name in together if PREDICTOR not in name]
    assert norm(list(together.values())) == pytest.approx(0.01, rel=1e-3)
    assert norm([together[name] for name in rest]) < 1e-3
    for part in (predictor, rest):
        assert norm([apart[name] for name in part]) == pytest.approx(0.01, rel=1e-3)
    assert any(EXPERTS in name for name in rest)


# resume


@pytest.mark.parametrize("killed_after", [1, 3, 4])
@pytest.mark.parametrize("router", ["diffmoe", "deepseek", "expert_threshold"])
def test_killed_and_resumed_equals_uninterrupted(router: str, killed_after: int, tmp_path: Path) -> None:
    goal = MoEObjective(objective=flow(batch_size=4), ramp=0 if router == "deepseek" else 4)
    options = {"threshold_warmup": 3, "capacity": 2}

    def start(folder: str, steps: int | None = None, seed: int = 0) -> Any:
        made = network(router, seed, **options)
        steady: Iterator[Any] = train(made, goal, LOOP, tmp_path / folder, {"layers": ("odd",)})
        list(steady if steps is None else itertools.islice(steady, steps))
        return made

    whole = start("whole")
    start("killed", killed_after)
    resumed = start("killed", seed=0 if killed_after < LOOP.save_every else 5)
    assert equal(states(resumed), states(whole))
    assert (tmp_path / "killed" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()
    moving = "selection_bias" if router == "deepseek" else "thresholds.gate"
    assert any(name.endswith(moving) and value.any() for name, value in buffers(whole).items())
