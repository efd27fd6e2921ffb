"""`flowaccel train mediators` from outside: files, exit codes, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiny
from commands import fails, run
from flowaccel import Mediators, Recipe, accelerate, report
from flowaccel.cli import app
from flowaccel.methods.mediators import train_command
from flowaccel.methods.mediators.networks import mediator_layers
from flowaccel.methods.mediators.settings import MediatorSettings
from flowaccel.pipelines import load_pipeline

FAST = ["--batch-size", "8", "--learning-rate", "3e-3", "--device", "cpu"]


def train(pipe: str, out: str, *more: str) -> list[str]:
    return ["train", "mediators", pipe, "--out", out, *FAST, *more]


def network(folder: str) -> Any:
    (part,) = Recipe.from_pretrained(folder).accelerators
    assert isinstance(part, Mediators)
    return part.resolve()


def weights(folder: str) -> bytes:
    return Path(folder, "mediators", "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline folder."""
    return str(tiny.save_sit_pipeline(tmp_path_factory.mktemp("saved") / "pipe", num_layers=2))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The objectives that are trained on from now on."""
    seen: list[Any] = []
    original = train_command.run_training

    def watched(model: Any, objective: Any, *more: Any) -> Any:
        seen.append(objective)
        return original(model, objective, *more)

    monkeypatch.setattr(train_command, "run_training", watched)
    return seen


def test_the_recipe_that_it_writes_is_used(saved: str) -> None:
    assert "wrote the recipe to out; loss" in run(*train(saved, "out", "--steps", "3")).stderr
    common = ["--classes", "1-3", "--steps", "3", "--device", "cpu"]
    run("generate", saved, *common, "--out", "whole")
    run("generate", saved, *common, "--recipe", "out", "--out", "mediated")
    images = [{path.name: path.read_bytes() for path in Path(name).glob("*.png")} for name in ("whole", "mediated")]
    assert images[0].keys() == images[1].keys() and len(images[0]) == 3 and images[0] != images[1]
    pipe = load_pipeline(saved)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, Recipe.from_pretrained("out"))
    pipe([1], num_inference_steps=3)
    assert {call.stats["mediators"].counts for call in report(pipe).calls} == {(16,)}


def test_options_become_settings(saved: str) -> None:
    options = ["--counts", "9,4", "--layers", "1", "--no-bias", "--no-dwc", "--steps", "1"]
    found = json.loads(run(*train(saved, "out", *options, "--json")).stdout)
    assert (found["out"], found["steps"], found["counts"]) == ("out", 1, [4, 9]) and found["loss"] > 0
    net = network("out")
    wanted = MediatorSettings(counts=(4, 9), layers=(1,), use_bias=False, use_dwc=False)
    assert MediatorSettings.of(net.config.mediator_config) == wanted
    assert list(mediator_layers(net)) == ["transformer_blocks.1.attn"]


@pytest.mark.parametrize("method", ["retrofit", "scratch"])
def test_a_number_for_each_layer(saved: str, trained: list[Any], method: str) -> None:
    own = ["--counts", "16,4", "--per-layer", "--method", method]
    run(*train(saved, "whole", "--steps", "4", *own))
    net = network("whole")
    assert MediatorSettings.of(net.config.mediator_config) == MediatorSettings(counts=(16, 4), per_layer=True)
    assert [layer.count for layer in mediator_layers(net).values()] == [16, 4]
    assert trained[0].counts is None
    run(*train(saved, "parts", "--steps", "2", *own))
    early = weights("parts")
    run(*train(saved, "parts", "--steps", "4", *own))
    assert weights("parts") == weights("whole") != early
    message = fails(*train(saved, "parts", "--steps", "4", *own, "--counts", "4,16"))
    assert "'counts': ([16, 4], [4, 16])" in message
    pipe = load_pipeline(saved)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, Recipe.from_pretrained("whole"))
    pipe([1], num_inference_steps=2)
    assert {call.stats["mediators"].counts for call in report(pipe).calls} == {(10.0,)}


def test_methods(saved: str, trained: list[Any]) -> None:
    """What they start from, and what they are drawn to."""
    still = ["--steps", "1", "--learning-rate", "0"]
    run(*train(saved, "retrofit", *still))
    run(*train(saved, "heavy", *still, "--feature-weight", "2"))
    run(*train(saved, "free", *still, "--feature-weight", "0"))
    run(*train(saved, "scratch", *still, "--method", "scratch"))
    assert [goal.feature_weight for goal in trained] == [0.5, 2.0, 0.0, 0.0]
    assert [goal.teacher is None for goal in trained] == [False, False, True, True]
    assert all(goal.counts == (4, 16) for goal in trained)
    base = load_pipeline(saved).transformer.state_dict()
    made, fresh = network("retrofit").state_dict(), network("scratch").state_dict()
    assert all(torch.equal(made[name], value) for name, value in base.items())
    assert all(not value.any() for name, value in made.items() if name not in base)
    assert made.keys() == fresh.keys()
    assert torch.equal(fresh["pos_embed"], base["pos_embed"])
    assert not torch.equal(fresh["patch_embed.weight"], base["patch_embed.weight"])
    assert all(fresh[name].any() for name in fresh if "mediator_biases" in name)


def test_training_moves_the_copy_and_not_the_teacher(saved: str, trained: list[Any]) -> None:
    run(*train(saved, "out", "--steps", "4", "--ema-decay", "0"))
    base = load_pipeline(saved).transformer.state_dict()
    teacher, made = trained[0].teacher.state_dict(), network("out").state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in base.items())
    assert torch.equal(made["pos_embed"], base["pos_embed"])
    moved = {name for name, value in made.items() if not torch.equal(value, base.get(name, torch.zeros_like(value)))}
    still = made.keys() - moved - {"pos_embed"}
    assert not still


def test_a_stopped_training_goes_on_to_the_same_weights(saved: str) -> None:
    run(*train(saved, "whole", "--steps", "4"))
    run(*train(saved, "parts", "--steps", "2"))
    early = weights("parts")
    run(*train(saved, "parts", "--steps", "4"))
    assert weights("parts") == weights("whole") != early


def test_a_resume_must_agree(saved: str) -> None:
    run(*train(saved, "out", "--steps", "1"))
    for other, named in (
        (["--counts", "4"], "'counts': ([4, 16], [4])"),
        (["--layers", "0"], "'layers': (None, [0])"),
        (["--no-dwc"], "'use_dwc': (True, False)"),
        (["--per-layer"], "'per_layer': (False, True)"),
        (["--method", "scratch"], "'method': ('retrofit', 'scratch')"),
        (["--feature-weight", "1"], "'objective.feature_weight': (0.5, 1.0)"),
        (["--batch-size", "4"], "'objective.batch_size': (8, 4)"),
    ):
        message = fails(*train(saved, "out", "--steps", "1", *other))
        assert named in message and "use another --out" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--counts", "four"], "--counts must be whole numbers between commas, such as 4,16, got 'four'"),
        (["--counts", "5"], "must be a square, such as 4, 16 or 64, got 5"),
        (["--counts", "64"], "64 mediators need a grid of at least 8 x 8 tokens, got 4 x 4"),
        (["--per-layer", "--counts", "4"], "one number for each of 2 layers, as per_layer says, got [4]"),
        (["--layers", "2"], "layers must be below the number of blocks, 2, got [2]"),
        (["--method", "magic"], "--method must be one of retrofit, scratch, got 'magic'"),
        (["--method", "scratch", "--feature-weight", "1"], "--feature-weight is for --method retrofit"),
        (["--feature-weight", "-1"], "feature_weight must not be negative, got -1.0"),
        (["--batch-size", "1"], "at most batch_size=1 of them, got [4, 16]"),
        (["--data", "cats"], "--data must be one of"),
        (["--data", "shapes"], "--data shapes has captions, and a SiTPipeline takes classes"),
    ],
)
def test_wrong_options(saved: str, options: list[str], said: str) -> None:
    assert said in fails(*train(saved, "out", *options))
    assert not Path("out").exists()


def test_other_pipelines_are_refused() -> None:
    tiny.sd3_pipeline().save_pretrained("sd3")
    said = fails(*train("sd3", "out"))
    assert "this trains parts of a SiTPipeline, got a StableDiffusion3Pipeline" in said


@pytest.mark.slow
def test_the_recipe_of_the_zoo() -> None:
    """4 mediators in the first half of a run, then 16."""
    command = ["generate", "zoo:sit-digits", "--classes", "3", "--device", "cpu", "--steps", "2", "--out", "digits"]
    ran = CliRunner().invoke(app, [*command, "--recipe", "zoo:sit-digits-mediators", "--report"])
    assert ran.exit_code == 0 and "recipe 'sit-digits-mediators'" in ran.stderr
    assert "4 mediators" in ran.stderr and "16 mediators" in ran.stderr
