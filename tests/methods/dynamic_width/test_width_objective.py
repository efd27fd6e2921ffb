"""Training dynamic width and tokens: what is drawn, what the loss is made of, the controller, and that it works."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from flowaccel import CheckpointError
from flowaccel.data import ImageSet
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.train import (
    RECOMMENDED,
    STRATA,
    MacsCosts,
    WidthObjective,
    call_arguments,
    layer_ratios,
    plan_training,
)
from flowaccel.training.loop import LoopConfig, train
from flowaccel.training.text_to_image import PromptedFlow

NULL = 10
HEADS = 4
BASE = tiny.sit_network(num_layers=2, num_attention_heads=HEADS, attention_head_dim=4).requires_grad_(False)
GATES = ("transformer_blocks.0.attn", "transformer_blocks.0.ff", "transformer_blocks.1.attn", "transformer_blocks.1.ff")
UNEQUAL = MacsCosts((2, 30, 7, 11))


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(9)
    return ImageSet(images=torch.rand(40, 1, 8, 8, generator=generator) * 2 - 1, labels=torch.arange(40) % 10)


DATA = images()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(base: nn.Module = BASE, bias: float = 0.0, spread: float = 1.0, **settings: Any) -> Any:
    """A dynamic network, in training, whose routers say something else at every time."""
    torch.manual_seed(0)
    made = make_dynamic(copy.deepcopy(base), {"normalise": True, "tau": 2.0, "tokens": False, **settings}).train()
    generator = seeded(5)
    for gated in made.dynamic.gated_layers:
        router = gated.gate.router
        router.weight.data = spread * torch.randn(router.weight.shape, generator=generator)
        router.bias.data.fill_(bias)
    for site in made.dynamic.sites:
        last = site.router[2]
        last.weight.data = spread * torch.randn(last.weight.shape, generator=generator)
        last.bias.data.fill_(bias)
    return made.requires_grad_(True)


def objective(**options: Any) -> WidthObjective:
    return WidthObjective(data=DATA, null_label=NULL, costs=UNEQUAL, **{"batch_size": 16, **options})


@dataclass
class Call:
    """What a network was called with and returned."""

    state: Tensor
    t: Tensor
    labels: Tensor
    output: Tensor


def watched(module: nn.Module) -> list[Call]:
    calls: list[Call] = []
    module.register_forward_hook(lambda _, args, output: calls.append(Call(*args[:3], output[0])))
    return calls


def mse(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean()


def by_hand(masks: list[list[list[float]]], shares: dict[str, list[float]], costs: tuple[int, ...]) -> float:
    """The mean ratio of a batch, of gates[gate][row][unit] and the share of tokens of every block and row."""
    rows = len(masks[0])
    total = 0.0
    for row in range(rows):
        for place, (gate, cost) in enumerate(zip(masks, costs, strict=True)):
            part = sum(gate[row]) / len(gate[row])
            if place % 2:  # a feed-forward
                part *= shares.get(f"transformer_blocks.{place // 2}.tokens", [1.0] * rows)[row]
            total += cost * part
    return total / rows / sum(costs)


# what is aimed at and drawn


def test_target_falls_after_a_delay() -> None:
    published = objective()
    assert [published.target(step) for step in (0, 99)] == [1.0, 1.0]
    assert published.target(100) == pytest.approx(0.95)  # 1 - (1 - 0.5) * 100 / 1000
    assert published.target(500) == pytest.approx(0.75)
    assert [published.target(step) for step in (1000, 150_000)] == [0.5, 0.5]
    at_once = objective(ratio=0.2, ramp_start=0, ramp=4)
    assert [at_once.target(step) for step in range(6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert objective(ratio=0.3, ramp_start=0, ramp=0).target(0) == 0.3
    assert [objective(ratio=0.3, ramp_start=5, ramp=2).target(step) for step in (4, 5)] == [1.0, 0.3]


def test_stratified_times_take_every_quarter_alike() -> None:
    times = torch.cat([objective(batch_size=12).draw(seeded(seed), "cpu")[1] for seed in range(30)])
    quarters = times.reshape(30, 12).mul(STRATA).long()
    assert torch.equal(quarters, (torch.arange(12) % STRATA).expand(30, 12))
    within = times * STRATA % 1
    assert within.min() < 0.02 and within.max() > 0.98 and 0.45 < within.mean() < 0.55
    uneven = objective(batch_size=12, density="uniform").draw(seeded(), "cpu")[1]
    assert not torch.equal(uneven.mul(STRATA).long(), torch.arange(12) % STRATA)
    assert uneven.min() >= 0 and uneven.max() < 1


def test_deployment_times_are_those_of_the_sampler() -> None:
    given = (0.0, 0.125, 0.75)
    times = objective(density="deployment", times=given, batch_size=3000).draw(seeded(), "cpu")[1]
    values, counts = times.unique(return_counts=True)
    assert values.tolist() == list(given)
    assert (counts / 3000 - 1 / 3).abs().max() < 0.04


def test_states_are_noised_data() -> None:
    state, t, labels, velocity = objective(batch_size=64).draw(seeded(), "cpu")
    image = state + (1 - t.reshape(-1, 1, 1, 1)) * velocity
    noise = state - t.reshape(-1, 1, 1, 1) * velocity
    distance = (image.unsqueeze(1) - DATA.images).flatten(2).abs().amax(2)
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-4
    assert torch.equal(DATA.labels[nearest.indices], labels)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert labels.max() < NULL

    def dark(images: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(images)

    state, t, _, velocity = objective(augment=dark).draw(seeded(), "cpu")
    assert (state + (1 - t.reshape(-1, 1, 1, 1)) * velocity).abs().max() < 1e-5


# the loss


@pytest.mark.parametrize("tokens", [False, True])
def test_what_the_loss_is_made_of(tokens: bool) -> None:
    """Against the masks, the outputs and the published formula, with gates of unequal cost."""
    model, teacher = network(tokens=tokens), tiny.sit_network(seed=4, num_layers=1)
    calls, taught = watched(model), watched(teacher)
    target = objective().draw(seeded(), "cpu")[3]
    aim = 1 - 0.6 * 300 / 1000
    for weight in (0.0, 2.0, 5.0):
        found = objective(ratio=0.4, macs_weight=weight, teacher=teacher, distill_weight=0.7).at(300)(model, seeded())
        masks = [mask.tolist() for mask in model.dynamic.masks]
        shares = {
            site.path: [sum(row) / len(row) for row in site.gates.reshape(16, -1).tolist()]
            for site in model.dynamic.sites
        }
        assert tuple(gated.path for gated in model.dynamic.gated_layers) == GATES
        assert 0 < sum(map(sum, masks[1])) < 16 * HEADS
        assert all(0 < sum(rows) / 16 < 1 for rows in shares.values()) and bool(shares) == tokens
        macs = weight * (by_hand(masks, shares, UNEQUAL.gates) - aim) ** 2
        expected = mse(calls[-1].output, target) + macs + 0.7 * mse(calls[-1].output, taught[-1].output)
        torch.testing.assert_close(found, expected)
    assert torch.equal(taught[-1].labels, calls[-1].labels)
    assert all(value.grad is None for value in teacher.parameters())


def test_the_whole_network_beside_the_dynamic_one() -> None:
    """It sees the same states at the same times, drops labels on its own, and ends after `complete_steps`."""
    model = network()
    calls = watched(model)
    both = objective(complete_steps=3, label_drop=0.5, batch_size=64)
    loss = both.at(2)(model, seeded())
    dynamic, whole = calls
    assert torch.equal(whole.state, dynamic.state) and torch.equal(whole.t, dynamic.t)
    dropped = [call.labels == NULL for call in calls]
    assert all(20 < value.sum() < 44 for value in dropped)
    assert 16 < (dropped[0] ^ dropped[1]).sum() < 48
    kept = ~dropped[0] & ~dropped[1]
    assert torch.equal(whole.labels[kept], dynamic.labels[kept])
    torch.testing.assert_close(whole.output, BASE(whole.state, whole.t, whole.labels).sample)
    assert not torch.allclose(dynamic.output, BASE(whole.state, whole.t, dynamic.labels).sample, atol=1e-3)
    without = replace(both, complete_steps=0).at(2)(model, seeded())
    target = both.draw(seeded(), "cpu")[3]
    torch.testing.assert_close(loss, without + mse(whole.output, target))
    calls.clear()
    torch.testing.assert_close(both.at(3)(model, seeded()), replace(both, complete_steps=0).at(3)(model, seeded()))
    assert len(calls) == 2


@pytest.mark.parametrize("tokens", [False, True])
def test_routers_rest_at_the_end(tokens: bool) -> None:
    """From `freeze_step` gates are those of evaluation, nothing is asked of their cost, and routers learn nothing."""
    model = network(tokens=tokens)
    resting = objective(freeze_step=7, ramp=0, ramp_start=0)
    calls = watched(model)

    def gradients(step: int) -> dict[str, bool]:
        model.zero_grad()
        resting.at(step)(model, seeded()).backward()
        return {
            name: value.grad is not None and bool(value.grad.abs().max() > 0)
            for name, value in model.named_parameters()
            if "dynamic.blocks" in name
        }

    before = gradients(6)
    noisy = [mask.clone() for mask in model.dynamic.masks]
    assert any(before.values()) and len(before) == 2 * len(GATES) + 2 * 4 * tokens
    assert not any(gradients(7).values())
    expected = model.dynamic.evaluated(model.dynamic.embedding)
    assert all(torch.equal(one, two.float()) for one, two in zip(model.dynamic.masks, expected, strict=True))
    assert not all(torch.equal(one, two.float()) for one, two in zip(noisy, expected, strict=True))
    assert all(site.gates.dtype == torch.bool for site in model.dynamic.sites)
    calls.clear()
    target = resting.draw(seeded(), "cpu")[3]
    torch.testing.assert_close(resting.at(7)(model, seeded()), mse(calls[0].output, target))
    weight = model.transformer_blocks[0].attn.to_out[0].weight
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_same_generator_same_loss() -> None:
    model = network(tokens=True)
    before = torch.random.get_rng_state()
    first, again, other = (objective().at(0)(model, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


# the controller


def corrected(model: Any, aimed: WidthObjective, count: int, rate: float, step: int = 0) -> list[float]:
    """The correction after so many plain gradient steps on it alone."""
    aimed.prepare(model)
    optimizer = torch.optim.SGD([model.dynamic.correction], lr=rate)
    found = []
    for seed in range(count):
        optimizer.zero_grad()
        aimed.at(step)(model, seeded(seed)).backward()
        optimizer.step()
        found.append(model.dynamic.correction.item())
    return found


@pytest.mark.parametrize(("bias", "measured"), [(50.0, 1.0), (-50.0, 1 / HEADS)])
def test_the_correction_integrates_what_evaluation_is_off(bias: float, measured: float) -> None:
    aimed = objective(ratio=0.6, ramp=0, ramp_start=0, controller=True)
    found = corrected(network(bias=bias, spread=0.0), aimed, 4, rate=0.1)
    assert found == pytest.approx([-0.1 * (measured - 0.6) * count for count in (1, 2, 3, 4)], rel=1e-5)


def test_the_correction_is_bounded_and_returns_at_once() -> None:
    aimed = objective(ratio=0.6, ramp=0, ramp_start=0, controller=True)
    model = network(bias=50.0, spread=0.0)
    pushed = corrected(model, aimed, 60, rate=0.05)
    assert pushed[5] > pushed[-1] == pytest.approx(-0.2 - 0.05 * 0.4)  # the bound and one step
    for gated in model.dynamic.gated_layers:
        gated.gate.router.bias.data.fill_(-50.0)
    assert corrected(model, aimed, 1, rate=0.05)[0] == pytest.approx(-0.2 + 0.05 * (0.6 - 1 / HEADS))


def test_the_correction_moves_the_target() -> None:
    model = network(bias=50.0, spread=0.0)
    aimed = objective(ratio=0.6, ramp=10, ramp_start=0, controller=True)
    aimed.prepare(model)
    plain = replace(aimed, controller=False).at(20)(model, seeded())
    for correction in (0.1, -0.15):
        model.dynamic.correction.data.fill_(correction)
        moved = aimed.at(20)(model, seeded())
        shift = 2 * ((1 - 0.6 - correction) ** 2 - (1 - 0.6) ** 2)
        torch.testing.assert_close(moved, plain + shift + correction * (1 - 0.6))


def test_nothing_is_integrated_while_the_target_falls() -> None:
    model = network(bias=50.0)
    aimed = objective(ratio=0.6, ramp=10, ramp_start=0, controller=True)
    assert corrected(model, aimed, 3, rate=1.0, step=9) == [0.0] * 3
    assert corrected(model, aimed, 1, rate=1.0, step=10)[0] < 0


def test_without_a_controller_there_is_no_correction() -> None:
    model = network()
    objective().prepare(model)
    assert not model.dynamic.correction.requires_grad
    plain = objective().at(0)(model, seeded())
    model.dynamic.correction.data.fill_(0.15)
    assert torch.equal(objective().at(0)(model, seeded()), plain)


# styles


def test_the_published_style_is_the_defaults() -> None:
    plan = plan_training("published", routers={}, objective={}, rest=None, steps=1000)
    made = WidthObjective(data=DATA, null_label=NULL, costs=UNEQUAL, **plan.objective)
    assert DynamicSettings(**plan.routers) == DynamicSettings()
    plain = WidthObjective(data=DATA, null_label=NULL, costs=UNEQUAL, distill_weight=0.0)
    assert made == plain
    assert (plain.macs_weight, plain.ramp_start, plain.ramp, plain.label_drop) == (2.0, 100, 1000, 0.1)
    assert (plain.density, plain.controller, plain.freeze_step, plain.teacher) == ("stratified", False, None, None)
    settings = DynamicSettings()
    assert (settings.bias, settings.token_bias, settings.tau, settings.normalise) == (15.0, 35.0, 5.0, False)


def test_the_recommended_style() -> None:
    plan = plan_training("recommended", routers={}, objective={}, rest=None, steps=1000)
    assert plan.routers == RECOMMENDED["routers"]
    assert plan.objective == {**RECOMMENDED["objective"], "freeze_step": 900}
    DynamicSettings(**plan.routers)
    objective(**plan.objective)


@pytest.mark.parametrize("style", ["recommended", "published"])
def test_what_is_chosen_otherwise_wins(style: str) -> None:
    chosen = {"controller": False, "distill_weight": 0.25, "density": "uniform"}
    plan = plan_training(style, routers={"tau": 3.0}, objective=chosen, rest=0.25, steps=400)
    assert plan.routers["tau"] == 3.0
    assert plan.objective.items() >= {**chosen, "freeze_step": 300}.items()
    assert plan_training(style, routers={}, objective={}, rest=0.0, steps=400).objective["freeze_step"] is None
    assert RECOMMENDED["routers"]["tau"] != 3.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"style": "ours"}, "style must be one of recommended, published, got 'ours'"),
        ({"rest": 1.0}, r"rest must lie in \[0, 1\), got 1.0"),
        ({"rest": -0.1}, r"rest must lie in \[0, 1\), got -0.1"),
    ],
)
def test_wrong_plans(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_training(**{"style": "published", "routers": {}, "objective": {}, "rest": None, "steps": 10, **given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": 1.1}, r"ratio must lie in \(0, 1\], got 1.1"),
        ({"ratio": float("nan")}, "ratio must lie .* got nan"),
        ({"label_drop": 2.0}, r"label_drop must lie in \[0, 1\], got 2.0"),
        ({"macs_weight": -1.0}, "macs_weight must be a finite number of at least 0, got -1.0"),
        ({"distill_weight": float("nan")}, "distill_weight must be .* got nan"),
        ({"complete_steps": -1}, "complete_steps must be .* got -1"),
        ({"density": "normal"}, "density must be 'stratified', 'uniform' or 'deployment', got 'normal'"),
        ({"density": "deployment"}, "needs the times .* got density='deployment' and 0 times"),
        ({"times": (0.5,)}, "no other density takes any; got density='stratified' and 1 times"),
    ],
)
def test_wrong_objectives(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)


# what is measured


def test_costs_are_counted_per_row() -> None:
    """Projections and attention: 4 N D^2 + 2 N^2 D for the heads, 8 N D^2 for the channels (specification, 3.1)."""
    model = network()
    tokens, width = 16, 16
    heads, channels = 4 * tokens * width**2 + 2 * tokens**2 * width, 8 * tokens * width**2
    state, t, labels = (value.repeat_interleave(3, 0) for value in WidthObjective.example(DATA, NULL, "cpu"))
    objective().at(0)(model, seeded())  # leaves its masks, which must not matter
    for rows in (1, 3):
        arguments = call_arguments(model, state[:rows], t[:rows], labels[:rows])
        assert MacsCosts.of(model, arguments, rows) == MacsCosts((heads, channels, heads, channels), (0,) * 4)


@pytest.mark.parametrize("tokens", [False, True])
def test_ratios_of_the_layers(tokens: bool) -> None:
    model = network(tokens=tokens, bias=0.5)
    aimed = objective(batch_size=32)
    state, t, labels, _ = aimed.draw(seeded(), "cpu")
    kept: dict[str, Tensor] = {}
    model.eval()
    with torch.no_grad():
        expected = model(state, t, labels).sample
    found = layer_ratios(aimed, model, seeded())
    assert not model.training and not model.dynamic.hard
    assert all(site.module.keep is None for site in model.dynamic.sites)
    assert all(value.grad is None for value in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(state, t, labels).sample, expected)

    def record(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            kept[path] = (output > 0).float().reshape(32, -1)

        return hook

    for site in model.dynamic.sites:
        site.router.register_forward_hook(record(site.path))
    embedded: list[Tensor] = []
    model.get_submodule(model.dynamic.rule.time_embed).register_forward_hook(lambda *seen: embedded.append(seen[2]))
    with torch.no_grad():
        model(state, t, labels)
    masks = [mask.float().tolist() for mask in model.dynamic.evaluated(embedded[0])]
    shares = {path: value.mean(1).tolist() for path, value in kept.items()}
    assert found.ratio == pytest.approx(by_hand(masks, shares, UNEQUAL.gates), abs=1e-5)
    assert 0.3 < found.ratio < 0.95
    means = {path: float(torch.tensor(mask).mean()) for path, mask in zip(GATES, masks, strict=True)}
    assert found.gates == pytest.approx(means)
    assert found.tokens == pytest.approx({path: float(value.mean()) for path, value in kept.items()})
    assert bool(found.tokens) == tokens
    model.train()
    layer_ratios(aimed, model, seeded())
    assert model.training


def test_ratios_of_the_layers_after_a_failure() -> None:
    model = network()
    model.eval()
    with pytest.raises(ValueError, match="hidden_states"):
        layer_ratios(replace(objective(), data=ImageSet(images=torch.zeros(2, 1, 4, 4), labels=torch.zeros(2).long())),
                     model, seeded())  # fmt: skip
    assert not model.training and not model.dynamic.hard and model.dynamic.masks == []


def test_what_the_network_is_called_with() -> None:
    model, example = network(), WidthObjective.example(DATA, NULL, "cpu")
    hooks = len(model._forward_pre_hooks)
    found = call_arguments(model, *example)
    values = list(found.values())
    assert all(one is two for one, two in zip(values[:3], example, strict=True))
    assert found["return_dict"] is False
    assert len(model._forward_pre_hooks) == hooks and model.dynamic.masks == []


def test_what_a_surrounded_network_is_called_with() -> None:
    pipe = tiny.sd3_pipeline()
    config = pipe.transformer.config
    tokens, pooled = torch.randn(3, 5, config.joint_attention_dim), torch.randn(3, config.pooled_projection_dim)
    inner = make_dynamic(pipe.transformer)
    hooks = len(inner._forward_pre_hooks)
    state = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    found = call_arguments(PromptedFlow(inner, tokens, pooled), state, torch.tensor([0.25, 1.0]), torch.tensor([2, 0]))
    assert torch.equal(found["hidden_states"], state)
    assert torch.equal(found["encoder_hidden_states"], tokens[[2, 0]])
    assert torch.equal(found["pooled_projections"], pooled[[2, 0]])
    assert found["timestep"].tolist() == [750.0, 0.0]
    assert len(inner._forward_pre_hooks) == hooks


# training


WIDE = tiny.sit_network(num_layers=2, num_attention_heads=8, attention_head_dim=4).requires_grad_(False)
LOOP = LoopConfig(
    steps=150, learning_rate=5e-3, ema_decay=0.9, rate_scales={"correction": 0.2, "dynamic": 3.0}, save_every=1000
)


def fresh(tokens: bool = False) -> Any:
    torch.manual_seed(0)
    settings = {"normalise": True, "bias": 2.0, "token_bias": 2.0, "tau": 2.0, "tokens": tokens}
    return make_dynamic(copy.deepcopy(WIDE), settings).requires_grad_(True)


def aimed_at(ratio: float, model: Any, **options: Any) -> WidthObjective:
    example = WidthObjective.example(DATA, NULL, "cpu")
    settings = {"batch_size": 16, "ramp_start": 0, "ramp": 60, "freeze_step": 135, "controller": True, **options}
    costs = MacsCosts.of(model, call_arguments(model, *example), 1)
    made = WidthObjective(data=DATA, null_label=NULL, costs=costs, ratio=ratio, **settings)
    made.prepare(model)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "controller"), [(0.5, True), (0.7, False)])
def test_the_ratio_becomes_what_was_asked_for(ratio: float, controller: bool, tmp_path: Path) -> None:
    """Of the gates of evaluation, with the averaged weights, on times and data that were not drawn before."""
    model = fresh()
    aimed = aimed_at(ratio, model, controller=controller)
    assert layer_ratios(aimed, model, seeded()).ratio == 1.0
    for _ in train(model, aimed, LOOP, tmp_path):
        pass
    found = [layer_ratios(aimed, model, seeded(10_000 + seed)).ratio for seed in range(4)]
    assert sum(found) / 4 == pytest.approx(ratio, abs=0.1)
    assert bool(model.dynamic.correction.detach() != 0) == controller


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [9, 17, 23])
def test_killed_and_resumed_equals_uninterrupted(killed_after: int, tmp_path: Path) -> None:
    """Also the correction; killed while the target falls, while the correction moves, and while the routers rest."""
    short = replace(LOOP, steps=24, save_every=2)
    options = {"ramp": 12, "freeze_step": 20, "complete_steps": 5, "teacher": WIDE}

    def ended(folder: str, kill: int | None = None) -> dict[str, Tensor]:
        model = fresh(tokens=True)
        steps = train(model, aimed_at(0.5, model, **options), short, tmp_path / folder)
        for _ in steps if kill is None else itertools.islice(steps, kill):
            pass
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = ended("whole")
    ended("killed", killed_after)
    resumed = ended("killed")
    assert whole["dynamic.correction"] != 0
    assert [name for name, value in whole.items() if not torch.equal(resumed[name], value)] == []
    assert (tmp_path / "killed" / "state.safetensors").read_bytes() == (
        tmp_path / "whole" / "state.safetensors"
    ).read_bytes()


def test_another_objective_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    def start(ratio: float, **options: Any) -> None:
        model = fresh()
        for _ in train(model, aimed_at(ratio, model, **options), replace(LOOP, steps=2), tmp_path):
            pass

    start(0.5)
    for ratio, options, named in (
        (0.6, {}, r"'objective\.ratio': \(0\.5, 0\.6\)"),
        (0.5, {"freeze_step": None}, r"'objective\.freeze_step': \(135, None\)"),
        (0.5, {"density": "deployment", "times": (0.25, 0.5)}, r"'objective\.times': \(\[\], \[0\.25, 0\.5\]\)"),
    ):
        with pytest.raises(CheckpointError, match=named):
            start(ratio, **options)
    start(0.5)


def test_routers_that_rest_from_the_start(tmp_path: Path) -> None:
    """They never get a gradient, and the state holds them all the same."""
    model = fresh()
    before = {name: value.clone() for name, value in model.named_parameters() if "dynamic" in name}
    for _ in range(2):
        for _ in train(model, aimed_at(0.5, model, freeze_step=0), replace(LOOP, steps=2), tmp_path):
            pass
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
