"""`flowaccel train width` and `flowaccel plan` from outside: files, exit codes, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from commands import fails, run
from flowaccel import DynamicWidth, Recipe, Sampler, accelerate, accelerated, report, zoo
from flowaccel.data.shapes import SPLITS
from flowaccel.methods.dynamic_width import train_command
from flowaccel.methods.dynamic_width.adapter import WidthAdapter
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.plan import WidthPlan
from flowaccel.methods.dynamic_width.train_command import deployment_times
from flowaccel.pipelines import load_pipeline

HEADS = 4
VARIED = "--bias 0 --learning-rate 3e-2 --router-rate 3 --ramp 4 --ema-decay 0.5"
"""Routers that leave something out after a few steps."""


def train(pipe: str, out: str, *more: str) -> list[str]:
    return ["train", "width", pipe, "--out", out, "--batch-size", "8", "--device", "cpu", *more]


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}


def weights(folder: str) -> bytes:
    (path,) = Path(folder).glob("*/diffusion_pytorch_model.safetensors")
    return path.read_bytes()


def logged(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "training", "ratios.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline folder."""
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    return str(tiny.save_sit_pipeline(folder, num_layers=2, num_attention_heads=HEADS, attention_head_dim=4))


@pytest.fixture(scope="module")
def narrow(saved: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe with a width for it that is another one at every time."""
    out, pipe = tmp_path_factory.mktemp("narrow") / "narrow", load_pipeline(saved)
    network = make_dynamic(pipe.transformer, {"normalise": True})
    generator = torch.Generator().manual_seed(0)
    for gated in network.dynamic.gated_layers:
        gated.gate.router.weight.data.normal_(generator=generator)
        gated.gate.router.bias.data.zero_()
    Recipe([DynamicWidth(network)], name="narrow").for_pipeline(pipe).save_pretrained(out)
    return str(out)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in an empty folder; few pictures are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SPLITS, "generator", 30)


# train width


def test_the_recipe_that_it_writes_is_used(saved: str) -> None:
    said = run(*train(saved, "out", "--steps", "12", "--tokens", *VARIED.split())).stderr
    assert "wrote the recipe to out; ratio with the gates of evaluation 0." in said
    common = ["--classes", "1-4", "--steps", "3", "--device", "cpu"]
    run("generate", saved, *common, "--out", "whole")
    said = run("generate", saved, *common, "--recipe", "out", "--report", "--out", "narrow").stderr
    assert list(files("narrow")) == list(files("whole")) and files("narrow") != files("whole")
    assert "of the multiply-adds" in " ".join(said.split())
    recipe = Recipe.from_pretrained("out")
    assert recipe.name == "out" and [part.name for part in recipe.accelerators] == ["dynamic_width"]
    pipe = load_pipeline(saved)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, recipe)
    pipe([1], num_inference_steps=3)
    assert all(call.stats["dynamic_width"].width < 1 for call in report(pipe).calls)


def test_ratios_of_all_layers_are_logged(saved: str) -> None:
    options = [*VARIED.split(), "--tokens", "--save-every", "2", "--steps", "5"]
    found = json.loads(run(*train(saved, "out", *options, "--json")).stdout)
    entries = logged("out")
    gates = {f"transformer_blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn", "ff")}
    sites = {f"transformer_blocks.{block}.tokens" for block in (0, 1)}
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    for entry in (*entries, found):
        assert set(entry["gates"]) == gates and set(entry["tokens"]) == sites
        assert all(1 / HEADS <= share <= 1 for share in entry["gates"].values())
        assert 0 < entry["ratio"] <= 1
    assert all(entry["loss"] > 0 for entry in entries)
    assert (found["out"], found["steps"]) == ("out", 5)
    assert sorted(path.name for path in Path("out/training").iterdir()) == ["ratios.jsonl", "state.safetensors"]
    assert "ratio with the gates of evaluation" in run(*train(saved, "out", *options)).stderr
    assert logged("out") == entries, "a finished run logs nothing again"


@pytest.mark.slow
def test_interrupted_training_goes_on(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train_command.run_training

    def interrupted(*arguments: Any) -> Any:
        for state in original(*arguments):
            yield state
            if state.step == 5:
                raise KeyboardInterrupt

    options = [*VARIED.split(), "--steps", "8", "--save-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "run_training", interrupted)
        message = fails(*train(saved, "parts", *options), code=1)
    assert "The last checkpoint is kept; the same command goes on from there." in message
    run(*train(saved, "parts", *options))
    run(*train(saved, "whole", *options))
    assert weights("parts") == weights("whole")
    assert logged("parts") == logged("whole")
    for other, named in (
        (["--ratio", "0.6"], "'objective.ratio': (0.5, 0.6)"),
        (["--tokens"], "'tokens': (False, True)"),
        (["--tau", "3"], "'tau': (2.0, 3.0)"),
        (["--no-normalise"], "'normalise': (True, False)"),
        (["--router-rate", "1"], "'rate_scales'"),
        (["--deploy", "euler@3"], "'objective.times'"),
    ):
        message = fails(*train(saved, "parts", *options, *other))
        assert named in message and "use another --out" in message


def settings(folder: str) -> dict[str, Any]:
    (part,) = Recipe.from_pretrained(folder).accelerators
    assert isinstance(part, DynamicWidth)
    return dict(part.resolve().config.dynamic_config)  # type: ignore[union-attr, operator]


def test_styles(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives: list[Any] = []
    original = train_command.run_training

    def watched(network: Any, objective: Any, *more: Any) -> Any:
        objectives.append(objective)
        return original(network, objective, *more)

    monkeypatch.setattr(train_command, "run_training", watched)
    run(*train(saved, "published", "--style", "published", "--steps", "2", "--complete-steps", "1"))
    run(*train(saved, "ours", "--steps", "20", "--groups", "2", "--tau", "3"))
    published, ours = objectives
    assert (published.teacher, published.controller, published.freeze_step) == (None, False, None)
    assert (published.ramp_start, published.complete_steps, published.density) == (100, 1, "stratified")
    assert ours.teacher is not None
    assert (ours.controller, ours.freeze_step, ours.ramp_start) == (True, 18, 0)
    plain = {"tokens": False, "groups": None, "normalise": False, "bias": 15.0, "token_bias": 35.0, "tau": 5.0}
    assert settings("published") == plain
    assert settings("ours") == {**plain, "groups": 2, "normalise": True, "bias": 4.0, "token_bias": 4.0, "tau": 3.0}


@pytest.mark.slow
def test_a_target_that_is_not_reached_is_said(saved: str) -> None:
    """The published ramp is longer than this training."""
    said = " ".join(run(*train(saved, "short", "--steps", "10", "--ratio", "0.4")).stderr.split())
    assert "aims at 0.995 when it ends, not at --ratio 0.4" in said  # 1 - 0.6 * 8 / 1000, routers rest in step 9
    assert "lower --ramp or give more --steps" in said
    said = " ".join(run(*train(saved, "resting", "--steps", "2", "--rest", "0.9", "--ramp", "1")).stderr.split())
    assert "aims at 1.000 when it ends" in said, "routers that rest from the start"
    assert "when it ends" not in run(*train(saved, "long", "--steps", "10", "--ramp", "5")).stderr


@pytest.mark.parametrize("recipe", ["euler@3", "heun@2", "none@3"])
def test_times_of_deployment_are_those_of_a_run(recipe: str, saved: str) -> None:
    pipe = load_pipeline(saved)
    pipe.set_progress_bar_config(disable=True)
    found = deployment_times(pipe, recipe)
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, named: seen.append(float((named["timestep"] if "timestep" in named else args[1])[0])),
        with_kwargs=True,
    )
    name, steps = recipe.split("@")
    with accelerated(pipe, Recipe() if name == "none" else Recipe([Sampler(name)])):
        pipe([1], num_inference_steps=int(steps))
    assert sorted(found) == pytest.approx(sorted(seen), abs=1e-5)


def test_training_for_a_sampler(saved: str) -> None:
    found = json.loads(run(*train(saved, "out", "--steps", "2", "--deploy", "euler@3", "--json")).stdout)
    assert found["ratio"] == 1.0
    assert "--deploy must say how many steps, such as euler@20, got 'euler'" in fails(
        *train(saved, "other", "--deploy", "euler")
    )
    assert "unknown recipe 'eulr@3': did you mean 'euler'" in fails(*train(saved, "other", "--deploy", "eulr@3"))
    assert "density='stratified' and 3 times" in fails(
        *train(saved, "other", "--deploy", "euler@3", "--density", "stratified")
    )
    assert not Path("other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0"], "ratio must lie in (0, 1], got 0.0"),
        (["--ratio", "1.5"], "ratio must lie in (0, 1], got 1.5"),
        (["--style", "fast"], "style must be one of recommended, published, got 'fast'"),
        (["--data", "faces"], "--data must be one of ['digits', 'shapes'], got 'faces'"),
        (["--data", "shapes"], "--data shapes has captions, and a SiTPipeline takes classes"),
        (["--density", "deployment"], "density='deployment' needs the times"),
        (["--density", "normal"], "density must be 'stratified', 'uniform' or 'deployment', got 'normal'"),
        (["--label-drop", "2"], "label_drop must lie in [0, 1], got 2.0"),
        (["--rest", "1"], "rest must lie in [0, 1), got 1.0"),
        (["--distill", "-1"], "distill_weight must be a finite number of at least 0, got -1.0"),
        (["--router-rate", "-1"], "rate_scales['dynamic'] must be a finite number of at least 0, got -1.0"),
        (["--tau", "0"], "tau must be positive, got 0.0"),
        (["--groups", "3"], "cannot be divided into 3 equal groups"),
        (["--precision", "fp8"], "precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        (["--ramp", "-1"], "Invalid value for '--ramp'"),
    ],
)
def test_wrong_use_of_train_width(arguments: list[str], message: str, saved: str) -> None:
    assert message in fails(*train(saved, "out", *arguments))
    assert not Path("out").exists()
    pipe = load_pipeline(saved)
    whole = make_dynamic(pipe.transformer, {"tokens": False})
    Recipe([DynamicWidth(whole)], name="whole").for_pipeline(pipe).save_pretrained("whole")
    assert "--capacities is for networks that leave out tokens" in fails(*plan(saved, "whole", "--capacities"))


def test_pipelines_that_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: tiny.flux_pipeline())
    assert "a SiTPipeline or a StableDiffusion3Pipeline, got a FluxPipeline" in fails(*train("flux", "out"))
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: tiny.sd3_pipeline())
    assert "--data digits has no captions, and a StableDiffusion3Pipeline takes prompts" in fails(*train("sd3", "out"))


@pytest.mark.slow
def test_a_pipeline_with_prompts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_ROOT", tiny.shapes_zoo(tmp_path_factory.mktemp("zoo")))
    options = ["--data", "shapes", "--steps", "3", "--bias", "0", "--learning-rate", "1e-2", "--ramp", "1"]
    run(*train("zoo:t2i-shapes", "narrow", *options, "--deploy", "none@3"))
    (entry,) = logged("narrow")
    assert {name.rsplit(".", 1)[1] for name in entry["gates"]} >= {"attn", "ff"}
    prompt = ["--prompt", "three solid blue squares", "--steps", "2", "--device", "cpu"]
    run("generate", "zoo:t2i-shapes", *prompt, "--recipe", "narrow", "--out", "images")
    assert len(files("images")) == 1
    found = json.loads(run("plan", "zoo:t2i-shapes", *prompt, "--recipe", "narrow", "--json").stdout)
    assert len(found["ratios"]) == 2 and min(found["ratios"]) < 1


# plan


def plan(saved: str, recipe: str, *more: str) -> list[str]:
    return ["plan", saved, "--recipe", recipe, "--steps", "4", "--device", "cpu", *more]


def plan_in(folder: str) -> WidthPlan:
    (part,) = Recipe.from_pretrained(folder).accelerators
    assert isinstance(part, DynamicWidth) and part.plan is not None
    return part.plan


def test_plan_prints_what_is_on(saved: str, narrow: str) -> None:
    result = run(*plan(saved, narrow))
    assert result.stdout == ""
    text = " ".join(result.stderr.split())
    assert "transformer_blocks.0.attn" in text and "transformer_blocks.1.ff" in text and "all weights" in text
    found = json.loads(run(*plan(saved, narrow, "--json")).stdout)
    mean = sum(found["ratios"]) / len(found["ratios"])
    assert f"{mean:.0%}" in text
    assert f"{found['different_widths']} different widths at {len(found['timesteps'])} evaluations" in text
    assert not list(Path.cwd().iterdir()), "without --out nothing is written"


def test_plan_as_json(saved: str, narrow: str) -> None:
    found = json.loads(run(*plan(saved, narrow, "--json", "--out", "planned")).stdout)
    held = plan_in("planned")
    assert (found["out"], found["scheduler"]) == ("planned", "FlowRungeKuttaScheduler")
    assert found["timesteps"] == list(held.timesteps) and found["gates"] == list(held.gates)
    shares = torch.tensor([[gate.count("1") / len(gate) for gate in row] for row in held.bits])
    torch.testing.assert_close(torch.tensor(found["shares"]), shares)
    assert 1 / HEADS <= shares.min() < shares.max() <= 1
    # heads switch 4 D^2 weights of a block and channels 8 D^2
    by_hand = (shares * torch.tensor([4.0, 8.0, 4.0, 8.0])).sum(1) / 24
    torch.testing.assert_close(torch.tensor(found["ratios"]), by_hand)
    assert found["different_widths"] == len(set(held.widths)) > 2


def test_a_plan_is_written_and_used(saved: str, narrow: str) -> None:
    said = run(*plan(saved, narrow, "--out", "planned")).stderr
    assert "wrote the recipe and plan.png to planned; use it with --recipe planned" in said
    with Image.open("planned/plan.png") as image:
        assert image.format == "PNG" and image.width > image.height > 100
    common = ["--classes", "1-3", "--device", "cpu"]
    run("generate", saved, *common, "--recipe", "planned", "--out", "with")  # in as many steps as it was made for
    run("generate", saved, *common, "--recipe", narrow, "--steps", "4", "--out", "without")
    assert files("with") == files("without")
    message = fails("generate", saved, *common, "--recipe", "planned", "--steps", "5", "--out", "more")
    assert "the width plan was made for another run: it makes" in message
    assert "make a new one with `flowaccel plan`, or leave the plan out" in message
    run("plan", saved, "--recipe", "planned", "--steps", "6", "--device", "cpu", "--out", "longer")
    assert len(plan_in("longer").timesteps) > len(plan_in("planned").timesteps)


def test_buckets(saved: str, narrow: str) -> None:
    each = json.loads(run(*plan(saved, narrow, "--json")).stdout)
    found = json.loads(run(*plan(saved, narrow, "--buckets", "2", "--json", "--out", "two")).stdout)
    assert each["different_widths"] > 2 == found["different_widths"]
    assert torch.all(torch.tensor(found["shares"]) >= torch.tensor(each["shares"]))
    assert plan_in("two").buckets == 2
    run("generate", saved, "--classes", "1", "--recipe", "two", "--device", "cpu", "--out", "images")
    assert "Invalid value for '--buckets'" in fails(*plan(saved, narrow, "--buckets", "0"))


def test_the_plan_of_a_recipe_that_lies_with_the_pipeline(saved: str, narrow: str) -> None:
    pipe = load_pipeline(saved)
    accelerate(pipe, Recipe.from_pretrained(narrow))
    pipe.save_pretrained("own")
    found = json.loads(run("plan", "own", "--steps", "4", "--device", "cpu", "--json").stdout)
    expected = json.loads(run(*plan(saved, narrow, "--json")).stdout)
    assert found.pop("tokens")["kept"] == expected.pop("tokens")["kept"]  # beside it are seconds
    assert found == expected


@pytest.mark.slow
def test_how_tokens_are_left_out_is_part_of_the_plan(saved: str, narrow: str) -> None:
    def part(folder: str) -> DynamicWidth:
        (found,) = Recipe.from_pretrained(folder).accelerators
        assert isinstance(found, DynamicWidth)
        return found

    layers = {"transformer_blocks.0.tokens", "transformer_blocks.1.tokens"}
    result = run(*plan(saved, narrow, "--classes", "1-3", "--num-samples", "3", "--out", "planned", "--json"))
    tokens = json.loads(result.stdout)["tokens"]
    assert set(tokens["kept"]) == set(tokens["relative_time"]) == set(tokens["gather"]) == layers
    assert all(0 < share <= 1 for share in tokens["kept"].values())
    assert tokens["gather"] == {path: time < 1 for path, time in tokens["relative_time"].items()}
    assert (part("planned").gather, part("planned").capacities) == (tokens["gather"], None)
    assert "of 2 layers here" in " ".join(run(*plan(saved, narrow)).stderr.split())
    run(*plan(saved, narrow, "--classes", "1-3", "--num-samples", "3", "--out", "fixed", "--capacities"))
    capacities = part("fixed").capacities
    assert capacities is not None and set(capacities) == layers
    assert all(tokens["kept"][path] <= share <= 1 for path, share in capacities.items())
    common = ["generate", saved, "--classes", "1-3", "--device", "cpu"]
    run(*common, "--recipe", "planned", "--out", "a")
    run(*common, "--recipe", "fixed", "--out", "b")
    assert files("a") == files("b"), "all that was counted fits"


@pytest.mark.slow
def test_a_frozen_backbone(saved: str) -> None:
    result = run(*train(saved, "small", "--frozen", "--steps", "3", "--ramp", "0", "--rank", "2", "--json"))
    found = json.loads(result.stdout)
    assert 0 < found["trained_share"] < 1
    adapter = WidthAdapter.from_pretrained("small/width")
    assert adapter.timed_lora is not None and (adapter.timed_lora.rank, adapter.timed_lora.experts) == (2, 4)
    assert not list(Path("small").glob("*/diffusion_pytorch_model.safetensors"))
    run("generate", saved, "--classes", "1", "--recipe", "small", "--device", "cpu", "--out", "images")


@pytest.mark.slow
def test_wrong_use_of_plan(saved: str, narrow: str) -> None:
    assert "recipe 'euler' has no dynamic width; train one with `flowaccel train width`" in fails(
        *plan(saved, "euler", "--out", "out")
    )
    assert "has no dynamic width; train one" in fails("plan", saved, "--device", "cpu")
    assert "unknown recipe 'narow'" in fails(*plan(saved, "narow"))
    assert "class_labels must lie in 0 .. 9, got [12]" in fails(*plan(saved, narrow, "--classes", "12"))
    tiny.sit_pipeline(num_layers=1, num_attention_heads=HEADS, attention_head_dim=4).save_pretrained("other")
    assert "use it on the pipeline that it was made for, or train its parts for this one" in fails(
        *plan("other", narrow)
    )
    assert not Path("out").exists()
    pipe = load_pipeline(saved)
    whole = make_dynamic(pipe.transformer, {"tokens": False})
    Recipe([DynamicWidth(whole)], name="whole").for_pipeline(pipe).save_pretrained("whole")
    assert "--capacities is for networks that leave out tokens" in fails(*plan(saved, "whole", "--capacities"))


@pytest.mark.slow
def test_recipes_of_the_zoo() -> None:
    common = ["generate", "zoo:sit-digits", "--classes", "3", "--device", "cpu"]
    said = run(*common, "--recipe", "zoo:sit-digits-width", "--steps", "2", "--report", "--out", "narrow").stderr
    assert "recipe 'sit-digits-width'" in said and "of the multiply-adds left out" in said
    both = "zoo:sit-digits-width+flowturbo-H1P1R1-single"
    said = run(*common, "--recipe", both, "--report", "--out", "both").stderr
    assert f"recipe {both!r}" in said and "refined" in said and "width" in said
    message = fails(*common, "--recipe", "flowturbo-H1P1R1-single+zoo:sit-digits-width", "--out", "wrong")
    assert "must come before" in message and "a variant is another network" in message
    assert "zoo:sit-digits is a pipeline, not a recipe; there are zoo:sit-digits-width" in fails(
        *common, "--recipe", "zoo:sit-digits", "--out", "wrong"
    )
