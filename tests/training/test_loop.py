"""The training loop: exact resume, averaged weights, and refusals."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowaccel import CheckpointError
from flowaccel.training import loop
from flowaccel.training.loop import LoopConfig, Progress, load_average, train

CONFIG = LoopConfig(steps=12, learning_rate=1e-2, warmup=3, weight_decay=0.01, ema_decay=0.9, save_every=4)
STATE = "state.safetensors"


def network(width: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    made.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    return made


def regression(model: nn.Module, generator: torch.Generator) -> Tensor:
    """The loss of learning a fixed linear map."""
    inputs = torch.randn(16, 3, generator=generator)
    target = inputs @ torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])
    return (model(inputs) - target).square().mean()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The same with settings of its own."""

    scale: float = 1.0
    name: str = "linear"
    data: Any = None

    def __call__(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        return self.scale * regression(model, generator)


def run(config: LoopConfig, folder: Path, steps: int | None = None, **options: Any) -> tuple[nn.Module, list[Progress]]:
    """Train a fresh network, all the way or, as if it was killed, for a number of yields."""
    model = options.get("model") or network(seed=options.get("seed", 0))
    steady = train(model, options.get("loss", regression), config, folder)
    return model, list(steady if steps is None else itertools.islice(steady, steps))


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def same(one: nn.Module, other: nn.Module) -> bool:
    return equal(weights(one), weights(other))


@pytest.fixture
def whole(tmp_path: Path) -> tuple[nn.Module, list[Progress]]:
    return run(CONFIG, tmp_path / "whole")


@pytest.mark.parametrize("killed_after", [1, 4, 5, 11])
def test_killed_and_resumed_equals_uninterrupted(killed_after: int, tmp_path: Path, whole: Any) -> None:
    run(CONFIG, tmp_path / "killed", killed_after)
    # whatever the fresh network of the second start holds is overwritten, unless nothing was saved yet
    model, progress = run(CONFIG, tmp_path / "killed", seed=0 if killed_after < CONFIG.save_every else 5)
    saved = killed_after // CONFIG.save_every * CONFIG.save_every
    assert progress == whole[1][saved:]
    assert same(model, whole[0])
    assert (tmp_path / "killed" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()


def test_killed_many_times(tmp_path: Path, whole: Any) -> None:
    for killed_after in (5, 2, 6):
        run(CONFIG, tmp_path / "killed", killed_after)
    model, _ = run(CONFIG, tmp_path / "killed")
    assert same(model, whole[0])


@pytest.mark.parametrize("other", [replace(CONFIG, save_every=3), replace(CONFIG, keep=(4,))])
def test_saving_more_often_changes_nothing(other: LoopConfig, tmp_path: Path, whole: Any) -> None:
    run(CONFIG, tmp_path / "killed", 5)
    model, _ = run(other, tmp_path / "killed")
    assert same(model, whole[0])


def test_cosine_and_seed_resume_too(tmp_path: Path) -> None:
    config = replace(CONFIG, cosine=True, seed=3)
    expected, _ = run(config, tmp_path / "whole")
    run(config, tmp_path / "killed", 6)
    model, _ = run(config, tmp_path / "killed")
    assert same(model, expected)


def test_a_longer_run_goes_on(tmp_path: Path, whole: Any) -> None:
    run(replace(CONFIG, steps=6), tmp_path / "longer")
    model, progress = run(CONFIG, tmp_path / "longer")
    assert [entry.step for entry in progress] == list(range(7, 13))
    assert same(model, whole[0])


def test_a_finished_run_gives_its_weights_again(tmp_path: Path, whole: Any) -> None:
    model, progress = run(CONFIG, tmp_path / "whole", seed=8)
    assert progress == []
    assert same(model, whole[0])
    assert not model.training


def test_seeds_differ_from_step_to_step_and_run_to_run(tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    def watching(model: nn.Module, generator: torch.Generator) -> Tensor:
        drawn.append(torch.rand(3, generator=generator))
        return regression(model, generator)

    for seed in (0, 1):
        run(replace(CONFIG, seed=seed), tmp_path / str(seed), loss=watching)
    assert len({tuple(value.tolist()) for value in drawn}) == 24


def test_global_random_state_does_not_matter(tmp_path: Path, whole: Any) -> None:
    def disturbing(model: nn.Module, generator: torch.Generator) -> Tensor:
        torch.randn(7)
        return regression(model, generator)

    model, _ = run(CONFIG, tmp_path / "disturbed", loss=disturbing)
    assert same(model, whole[0])


def test_ends_with_the_average(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []
    model = network()
    for _ in train(model, regression, CONFIG, tmp_path):
        seen.append(weights(model))
    last = weights(model)
    average, decays = seen[0], [min(0.9, (1 + step) / (10 + step)) for step in range(1, CONFIG.steps)]
    for present, decay in zip(seen[1:], decays, strict=True):
        average = [decay * old + (1 - decay) * new for old, new in zip(average, present, strict=True)]
    for got, expected in zip(last, average, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not equal(last, seen[-1])
    other = network(seed=4)
    load_average(other, tmp_path / STATE)
    assert same(other, model)


def test_decay_zero_keeps_the_last_weights(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []
    model = network()
    for _ in train(model, regression, replace(CONFIG, ema_decay=0.0), tmp_path):
        seen.append(weights(model))
    assert equal(weights(model), seen[-1])


def test_it_learns_and_leaves_frozen_parameters(tmp_path: Path) -> None:
    config = LoopConfig(steps=150, learning_rate=3e-2, ema_decay=0.9)
    model, progress = run(config, tmp_path)
    assert progress[-1].loss < 0.2 * progress[0].loss
    assert torch.equal(model.frozen, torch.ones(2))
    assert not model.training


def test_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    config = replace(CONFIG, cosine=True)
    rates = [entry.learning_rate for entry in run(config, tmp_path)[1]]
    expected = [
        1e-2 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(CONFIG.steps)
    ]
    assert rates == pytest.approx(expected)
    assert LoopConfig(steps=5, learning_rate=0.1).rate_at(0) == 0.1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precision(precision: str, tmp_path: Path, fresh_accelerate: None) -> None:
    model, progress = run(replace(CONFIG, precision=precision), tmp_path)
    assert all(math.isfinite(entry.loss) for entry in progress)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process; a training of another one needs a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_rate_scales(tmp_path: Path) -> None:
    """With Adam a step is in proportion to its rate, whatever the gradients are: so are the first ones."""
    config = LoopConfig(steps=1, learning_rate=1e-3, ema_decay=0.0)
    before = network()
    plain, _ = run(config, tmp_path / "plain")
    scaled, _ = run(replace(config, rate_scales={"2.bias": 3.0, "2.": 0.0, "0.weight": 0.5}), tmp_path / "scaled")
    for name, factor in {"0.weight": 0.5, "0.bias": 1.0, "2.weight": 0.0, "2.bias": 3.0}.items():
        moved = plain.get_parameter(name) - before.get_parameter(name)
        assert moved.abs().min() > 0
        found = scaled.get_parameter(name) - before.get_parameter(name)
        torch.testing.assert_close(found, factor * moved, rtol=1e-3, atol=1e-7)
    assert torch.equal(scaled.get_parameter("2.weight"), before.get_parameter("2.weight")), "0 leaves it as it is"


def test_rate_scales_are_resumed_and_a_setting(tmp_path: Path) -> None:
    config = replace(CONFIG, rate_scales={"2.": 4.0, "0.bias": 0.0})
    expected, _ = run(config, tmp_path / "whole")
    run(config, tmp_path / "killed", 6)
    with pytest.raises(CheckpointError, match="'rate_scales'"):
        run(CONFIG, tmp_path / "killed")
    model, _ = run(config, tmp_path / "killed")
    assert same(model, expected)
    assert not same(model, run(CONFIG, tmp_path / "other")[0])


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Another target in every step; from `alone` on the first layer gets no gradient."""

    alone: int
    seen: list[int]
    times: tuple[float, ...] = (0.5,)

    def at(self, step: int) -> loop.Loss:
        def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
            self.seen.append(step)
            for parameter in model[0].parameters():  # type: ignore[index]
                parameter.requires_grad_(step < self.alone)
            try:
                return regression(model, generator) + step * sum(
                    parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad
                )
            finally:
                for parameter in model[0].parameters():  # type: ignore[index]
                    parameter.requires_grad_(True)

        return loss


@pytest.mark.parametrize("alone", [0, 5, 12])
@pytest.mark.parametrize("killed_after", [4, 9])
def test_an_objective_that_changes(alone: int, killed_after: int, tmp_path: Path) -> None:
    stages = Stages(alone=alone, seen=[])
    assert isinstance(stages, loop.Scheduled) and not isinstance(regression, loop.Scheduled)
    expected, _ = run(CONFIG, tmp_path / "whole", loss=stages)
    assert stages.seen == list(range(CONFIG.steps))
    run(CONFIG, tmp_path / "killed", killed_after, loss=stages)
    stages.seen.clear()
    model, _ = run(CONFIG, tmp_path / "killed", loss=stages)
    assert stages.seen == list(range(killed_after // CONFIG.save_every * CONFIG.save_every, CONFIG.steps))
    assert same(model, expected)
    assert not same(model, run(CONFIG, tmp_path / "plain")[0])
    if alone == 0:
        assert torch.equal(model.get_parameter("0.weight"), network().get_parameter("0.weight"))


def test_sequences_and_what_else_is_named_are_settings(tmp_path: Path) -> None:
    def start(times: tuple[float, ...], **also: Any) -> None:
        for _ in train(network(), Stages(alone=12, seen=[], times=times), CONFIG, tmp_path, also):
            pass

    start((0.1, 0.2), tau=2.0, groups=None)
    start((0.1, 0.2), tau=2.0, groups=None)
    with pytest.raises(CheckpointError, match=r"'objective.times': \(\[0.1, 0.2\], \[0.1, 0.3\]\)"):
        start((0.1, 0.3), tau=2.0, groups=None)
    with pytest.raises(CheckpointError, match=r"'groups': \(None, 4\)"):
        start((0.1, 0.2), tau=2.0, groups=4)


def test_state_is_safetensors_alone(tmp_path: Path) -> None:
    run(replace(CONFIG, keep=(4, 8)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-4.safetensors", "state-8.safetensors", STATE]
    for path in tmp_path.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
        assert all(torch.isfinite(value).all() for value in load_file(path).values())
    with safe_open(tmp_path / "state-4.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "'learning_rate': (0.01, 0.001)"),
        ({"seed": 9}, "'seed': (0, 9)"),
        ({"ema_decay": 0.5, "warmup": 0}, "'warmup': (3, 0), 'ema_decay': (0.9, 0.5)"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    run(CONFIG, tmp_path, 4)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(CheckpointError) as caught:
        run(replace(CONFIG, **changes), tmp_path)
    assert named in str(caught.value)
    assert "use another --out" in str(caught.value)
    assert (tmp_path / STATE).read_bytes() == before


def test_length_of_a_cosine_is_a_setting(tmp_path: Path) -> None:
    run(replace(CONFIG, cosine=True), tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"'steps': \(12, 20\)"):
        run(replace(CONFIG, cosine=True, steps=20), tmp_path)


def test_another_objective_is_refused(tmp_path: Path) -> None:
    run(CONFIG, tmp_path, 4, loss=Objective(scale=2.0))
    with pytest.raises(CheckpointError, match=r"'objective.scale': \(2.0, 1.0\)"):
        run(CONFIG, tmp_path, loss=Objective())
    with pytest.raises(CheckpointError, match=r"objective\.name"):
        run(CONFIG, tmp_path, loss=Objective(scale=2.0, name="other"))
    run(CONFIG, tmp_path, loss=Objective(scale=2.0, data=[torch.zeros(3)]))


@pytest.mark.parametrize("other", [network(width=7), nn.Sequential(nn.Linear(3, 2))], ids=["width", "depth"])
def test_another_network_is_refused_and_not_touched(other: nn.Module, tmp_path: Path) -> None:
    run(CONFIG, tmp_path, 4)
    before = weights(other)
    with pytest.raises(CheckpointError, match="another network"):
        run(CONFIG, tmp_path, model=other)
    assert equal(weights(other), before)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no metadata", "other metadata", "empty"])
def test_damaged_state_is_named(damage: str, tmp_path: Path) -> None:
    run(CONFIG, tmp_path, 4)
    path = tmp_path / STATE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage in ("foreign", "empty"):
        path.write_bytes(b"" if damage == "empty" else b"something else")
    else:
        metadata = {"state": "[1, 2]"} if damage == "other metadata" else None
        save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match=rf"{STATE} is damaged or no training state .* delete it to start again"):
        run(CONFIG, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value: float, tmp_path: Path) -> None:
    calls = []

    def exploding(model: nn.Module, generator: torch.Generator) -> Tensor:
        calls.append(1)
        return regression(model, generator) * (value if len(calls) == 6 else 1.0)

    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 5; lower the learning rate"):
        run(CONFIG, tmp_path, loss=exploding)
    with safe_open(tmp_path / STATE, "pt") as file:  # the last good state is still there
        assert json.loads(file.metadata()["state"])["step"] == 4


def test_full_disk_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[nn.Module, list[Progress]]
) -> None:
    run(CONFIG, tmp_path / "full", 4)

    def full(_: Any, path: Path, *__: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_file", full)
        with pytest.raises(OSError, match=r"cannot write .*state\.safetensors: No space left on device"):
            run(CONFIG, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == [STATE]
    model, _ = run(CONFIG, tmp_path / "full")
    assert same(model, whole[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 5, "ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"steps": 5, "precision": "fp8"}, "precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        ({"steps": 5, "save_every": 0}, "save_every must be at least 1, got 0"),
        ({"steps": 5, "rate_scales": {"a": -1.0}}, r"rate_scales\['a'\] must be a finite number of at least 0"),
        ({"steps": 5, "rate_scales": {"a": math.nan}}, r"rate_scales\['a'\] must be .* got nan"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**settings)
