"""`flowaccel train moe` from outside: files, exit codes, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, EulerDiscreteScheduler
from typer.testing import CliRunner

import tiny
from commands import fails, run
from flowaccel import MixtureOfExperts, Recipe, accelerate, zoo
from flowaccel.cli import app
from flowaccel.data import digits
from flowaccel.data.shapes import SPLITS
from flowaccel.methods.dynamic_width import train_command as width_command
from flowaccel.methods.flowturbo import train_command as flowturbo_command
from flowaccel.methods.moe import train_command
from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.settings import MoESettings
from flowaccel.methods.moe.train import drawn_batches, realised_capacity
from flowaccel.pipelines import load_pipeline
from flowaccel.training.ddpm import DDPMObjective
from flowaccel.training.flow import FlowObjective

FAST = [
    "--experts",
    "4",
    "--batch-size",
    "8",
    "--calibration-batches",
    "4",
    "--learning-rate",
    "3e-3",
    "--device",
    "cpu",
]


def train(pipe: str, out: str, *more: str) -> list[str]:
    return ["train", "moe", pipe, "--out", out, *FAST, *more]


def answer(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def logged(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "training", "capacity.jsonl").read_text().splitlines()]


def network(folder: str) -> Any:
    (part,) = Recipe.from_pretrained(folder).accelerators
    assert isinstance(part, MixtureOfExperts)
    return part.resolve()


def settings(folder: str) -> dict[str, Any]:
    return dict(network(folder).config.moe_config)


def weights(folder: str) -> bytes:
    return Path(folder, "moe", "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline folder."""
    return str(tiny.save_sit_pipeline(tmp_path_factory.mktemp("saved") / "pipe", num_layers=2))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in an empty folder; few pictures are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SPLITS, "generator", 30)


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is trained on from now on."""
    seen: list[Any] = []
    original = train_command.run_training

    def watched(model: Any, objective: Any, *more: Any) -> Any:
        seen.append(objective)
        return original(model, objective, *more)

    monkeypatch.setattr(train_command, "run_training", watched)
    return seen


def dit_pipeline(**config: Any) -> DiTPipeline:
    """A stock pipeline for images as the digits are."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 2, "num_layers": 2}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 10}
    transformer = DiTTransformer2DModel(**{**sizes, **heads, **config})
    tiny.random_weights(transformer, 0)
    return DiTPipeline(transformer.eval(), tiny.autoencoder(), DDIMScheduler(beta_end=0.03))


@pytest.fixture
def dit(monkeypatch: pytest.MonkeyPatch) -> DiTPipeline:
    """What every command opens."""
    pipe = dit_pipeline()
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: pipe)
    return pipe


def test_the_recipe_that_it_writes_is_used(saved: str) -> None:
    said = run(*train(saved, "out", "--steps", "6", "--ramp", "2")).stderr
    assert "wrote the recipe to out; a token takes 1." in said or "a token takes 0." in said
    common = ["--classes", "1-3", "--steps", "3", "--device", "cpu"]
    run("generate", saved, *common, "--out", "whole")
    run("generate", saved, *common, "--recipe", "out", "--out", "sparse")
    images = [{path.name: path.read_bytes() for path in Path(name).glob("*.png")} for name in ("whole", "sparse")]
    assert len(images[0]) == 3 and images[0].keys() == images[1].keys() and images[0] != images[1]
    recipe = Recipe.from_pretrained("out")
    assert recipe.name == "out"
    pipe = load_pipeline(saved)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, recipe)
    pipe([1], num_inference_steps=3)
    assert all(layer.plan is not None for layer in moe_layers(pipe.transformer).values())


def test_result_and_log(saved: str) -> None:
    options = ["--save-every", "2", "--steps", "5", "--layers", "all"]
    found = answer(*train(saved, "out", *options))
    entries, layers = logged("out"), {f"transformer_blocks.{block}.ff" for block in (0, 1)}
    assert (found["out"], found["steps"]) == ("out", 5)
    assert found["layers"].keys() == layers
    assert found["capacity"] == pytest.approx(sum(found["layers"].values()) / 2)
    assert found["capacity"] == pytest.approx(1, abs=0.2), "of thresholds fitted to few tokens"
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    for entry in entries:
        assert entry["loss"] > 0
        assert entry["capacity"].keys() == entry["router_losses"].keys() == layers
        assert all(0 <= value <= 4 for value in entry["capacity"].values())
        assert all(value > 0 for value in entry["router_losses"].values())
    assert found["loss"] == entries[-1]["loss"]
    assert sorted(path.name for path in Path("out/training").iterdir()) == ["capacity.jsonl", "state.safetensors"]
    before = weights("out")
    again = answer(*train(saved, "out", *options))
    assert again == {**found, "loss": None} and weights("out") == before
    assert logged("out") == entries, "a finished run logs nothing again"


def test_logging_changes_nothing(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*train(saved, "logged", "--steps", "4", "--save-every", "1", "--ramp", "3"))
    monkeypatch.setattr(train_command, "log_capacities", lambda *_: None)
    run(*train(saved, "silent", "--steps", "4", "--save-every", "1", "--ramp", "3"))
    assert weights("logged") == weights("silent")


@pytest.mark.parametrize(
    "options",
    [["--full-steps", "2", "--ramp", "4"], ["--router", "deepseek", "--capacity", "2"]],
    ids=["diffmoe", "deepseek"],
)
def test_interrupted_training_goes_on(options: list[str], saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train_command.run_training

    def interrupted(*arguments: Any) -> Any:
        for state in original(*arguments):
            yield state
            if state.step == 5:
                raise KeyboardInterrupt

    options = [*options, "--steps", "8", "--save-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "run_training", interrupted)
        message = fails(*train(saved, "parts", *options), code=1)
    assert "The last checkpoint is kept; the same command goes on from there." in message
    run(*train(saved, "parts", *options))
    run(*train(saved, "whole", *options))
    assert weights("parts") == weights("whole")
    assert logged("parts") == logged("whole")


def test_a_resume_must_agree(saved: str) -> None:
    options = ["--steps", "2", "--ramp", "1", "--layers", "1"]
    run(*train(saved, "out", *options))
    run(*train(saved, "out", *options))
    for other, named in (
        (["--ramp", "0"], "'objective.ramp': (1, 0)"),
        (["--full-steps", "1"], "'objective.full_steps': (0, 1)"),
        (["--capacity", "2"], "'capacity': (1.0, 2.0)"),
        (["--layers", "0"], "'layers': ([1], [0])"),
        (["--router", "expert_choice"], "'router': ('diffmoe', 'expert_choice')"),
        (["--moe", "threshold_momentum=0.5"], "'threshold_momentum': (0.95, 0.5)"),
        (["--method", "scratch", "--backbone-rate", "0.1"], "'method': ('copies', 'scratch')"),
        (["--backbone-rate", "1"], "'rate_scales'"),
        (["--label-drop", "0.5"], "'objective.label_drop': (0.1, 0.5)"),
    ):
        chosen = options[: options.index("--layers")] if "--layers" in other else options
        message = fails(*train(saved, "out", *chosen, *other))
        assert named in message and "use another --out" in message


@pytest.mark.slow
def test_methods(saved: str, objectives: list[Any]) -> None:
    """What they start from, and how the capacity goes from there."""
    steps = ["--steps", "50", "--learning-rate", "0", "--batch-size", "2", "--save-every", "50"]
    base = load_pipeline(saved).transformer
    dense = base.transformer_blocks[1].ff.net[2].weight
    run(*train(saved, "copies", *steps))
    run(*train(saved, "shared", *steps, "--method", "shared", "--moe", "inner_dim=16"))
    run(*train(saved, "scratch", *steps, "--method", "scratch", "--capacity", "2"))
    assert [(goal.full_steps, goal.ramp) for goal in objectives] == [(1, 5), (0, 0), (0, 0)]
    copies, shared, scratch = (network(name) for name in ("copies", "shared", "scratch"))
    (experts, beside), fresh = (made.transformer_blocks[1].ff for made in (copies, shared)), scratch
    assert all(torch.equal(one, dense) for one in experts.experts.w_out)
    assert torch.equal(beside.shared.net[2].weight, dense) and not beside.experts.w_out.any()
    assert beside.experts.w_out.shape == (4, dense.shape[0], 16)
    assert not torch.equal(fresh.transformer_blocks[0].attn.to_q.weight, base.transformer_blocks[0].attn.to_q.weight)
    assert fresh.transformer_blocks[1].ff.shared is None and settings("scratch")["capacity"] == 2.0
    assert {name: value for name, value in fresh.config.items() if name in base.config and name[0] != "_"} == {
        name: value for name, value in base.config.items() if name[0] != "_"
    }


def test_settings(saved: str) -> None:
    """Options of their own and any other entry; the rest are the defaults."""
    options = ["--router", "token_choice", "--capacity", "2", "--layers", "0,1", "--method", "scratch"]
    more = ["--moe", "score_fn=sigmoid", "--moe", "norm_topk=true", "--moe", "shared_inner_dim=8"]
    run(*train(saved, "out", *options, *more, "--steps", "1"))
    given: dict[str, Any] = {
        "router": "token_choice",
        "num_experts": 4,
        "capacity": 2.0,
        "layers": (0, 1),
        "score_fn": "sigmoid",
        "norm_topk": True,
        "shared_inner_dim": 8,
    }
    assert MoESettings.of(settings("out")) == MoESettings(**given)
    run(*train(saved, "copied", "--router", "token_choice", "--steps", "1"))
    assert settings("copied")["norm_topk"] is True, "as copies need it"


def test_only_what_is_new_learns_fast(saved: str) -> None:
    """With Adam the first step is in proportion to its rate, whatever the gradients are."""
    base = load_pipeline(saved).transformer.requires_grad_(False)
    moved = {}
    for name, more in (("default", []), ("half", ["--backbone-rate", "0.5"])):
        run(*train(saved, name, "--steps", "1", "--ema-decay", "0", "--learning-rate", "1e-3", *more))
        found = network(name).requires_grad_(False)
        of = "transformer_blocks.0.attn.to_q.weight"
        moved[name] = (found.get_parameter(of) - base.get_parameter(of)).abs().median()
        expert = found.transformer_blocks[1].ff.experts.w_out[0] - base.transformer_blocks[1].ff.net[2].weight
        assert float(expert.abs().median()) == pytest.approx(1e-3, rel=0.01)
    assert float(moved["default"]) == pytest.approx(1e-4, rel=0.01)
    assert float(moved["half"]) == pytest.approx(5e-4, rel=0.01)


@pytest.mark.slow
def test_the_zoo(objectives: list[Any]) -> None:
    found = answer(*train("zoo:sit-digits", "out", "--steps", "2", "--layers", "1", "--objective", "flow"))
    assert list(found["layers"]) == ["transformer_blocks.1.ff"]
    assert isinstance(objectives[0].objective, FlowObjective) and objectives[0].objective.null_label == 10


def test_a_dit_pipeline(dit: DiTPipeline, objectives: list[Any]) -> None:
    before = {name: value.clone() for name, value in dit.transformer.state_dict().items()}
    found = answer(*train("dit", "out", "--steps", "3", "--save-every", "1"))
    goal = objectives[0].objective
    assert isinstance(goal, DDPMObjective) and goal.null_label == 10
    level = goal.chain.noised(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([999]))
    torch.testing.assert_close(level.square().flatten(), dit.scheduler.alphas_cumprod[-1:]), "of its own scheduler"
    assert list(found["layers"]) == ["transformer_blocks.1.ff"] and len(logged("out")) == 3
    assert all(torch.equal(value, before[name]) for name, value in dit.transformer.state_dict().items())
    accelerate(dit, Recipe.from_pretrained("out"))
    assert moe_layers(dit.transformer)


def test_a_pipeline_with_prompts(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, objectives: list[Any]
) -> None:
    monkeypatch.setattr(zoo, "_ROOT", tiny.shapes_zoo(tmp_path_factory.mktemp("zoo")))
    run(*train("zoo:t2i-shapes", "out", "--data", "shapes", "--steps", "2", "--ramp", "0"))
    assert isinstance(objectives[0].objective, FlowObjective)
    (entry,) = logged("out")
    assert all(name.endswith("transformer_blocks.1.ff") for name in entry["capacity"])
    prompt = ["--prompt", "three solid blue squares", "--steps", "2", "--device", "cpu"]
    run("generate", "zoo:t2i-shapes", *prompt, "--recipe", "out", "--out", "images")
    assert len(list(Path("images").glob("*.png"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "0"], "num_experts must be a whole number of at least 1, got 0"),
        (["--capacity", "0"], "capacity must be above 0 and at most num_experts=4, got 0.0"),
        (["--capacity", "4.5"], "capacity must be above 0 and at most num_experts=4, got 4.5"),
        (["--capacity", "nan"], "capacity must be above 0 and at most num_experts=4, got nan"),
        (["--router", "best"], "router must be one of ['diffmoe', 'token_choice'"),
        (
            ["--router", "token_choice", "--capacity", "1.5"],
            "capacity must be a whole number with router='token_choice', where every token takes equally many experts",
        ),
        (["--router", "token_choice", "--ramp", "3"], "--full-steps and --ramp are for routers with which tokens"),
        (["--router", "expert_race"], "method='copies' needs weights that sum to 1, and router='expert_race' has"),
        (["--moe", "inner_dim=16"], "method='copies' makes experts as wide as the dense feed-forward"),
        (["--layers", "many"], "layers must be one of ['odd', 'even'"),
        (["--layers", "1,7"], "layers must be below the number of blocks, 2, got [1, 7]"),
        (["--layers", "1,x"], "layers must be one of"),
        (["--method", "clone"], "--method must be one of copies, shared, scratch, got 'clone'"),
        (["--objective", "ddpm"], "--objective of a SiTPipeline is flow, which its network and its sampler are made"),
        (["--objective", "edm"], "--objective of a SiTPipeline is flow"),
        (["--moe", "depth=3"], "moe_config: unknown ['depth']; allowed are ['router'"),
        (["--moe", "inner_dim"], "--moe must look like NAME=VALUE, such as inner_dim=256, got 'inner_dim'"),
        (["--moe", "bias=true", "--moe", "bias=false"], "--moe bias is given twice"),
        (["--moe", "num_experts=3"], "num_experts is given both by an option of its own and by --moe; give one"),
        (["--data", "faces"], "--data must be one of ['digits', 'shapes'], got 'faces'"),
        (["--data", "shapes"], "--data shapes has captions, and a SiTPipeline takes classes"),
        (["--label-drop", "2"], "label_drop must lie in [0, 1], got 2.0"),
        (["--ema-decay", "1"], "ema_decay must be in [0, 1), got 1.0"),
        (["--backbone-rate", "-1"], "rate_scales[''] must be a finite number of at least 0, got -1.0"),
        (["--precision", "fp8"], "precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        (["--ramp", "-1"], "Invalid value for '--ramp'"),
        (["--calibration-batches", "0"], "Invalid value for '--calibration-batches'"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, saved: str) -> None:
    assert message in fails(*train(saved, "out", *arguments))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 4, "out_channels": 8}, "shape (1, 8, 8), and the network of this pipeline takes (4, 8, 8)"),
        ({"sample_size": 16}, "shape (1, 8, 8), and the network of this pipeline takes (1, 16, 16)"),
        ({"num_embeds_ada_norm": 7}, "--data digits has 10 classes, and the network of this pipeline knows 7"),
        ({"out_channels": 1}, "output must hold noise and variance channels"),
    ],
)
def test_data_that_do_not_fit(config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = dit_pipeline(**config)
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: pipe)
    assert message in fails(*train("dit", "out"))
    assert not Path("out").exists()


def test_schedulers_and_pipelines_that_it_is_not_for(dit: DiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--objective of a DiTPipeline is ddpm" in fails(*train("dit", "out", "--objective", "flow"))
    for scheduler in (DDIMScheduler(prediction_type="v_prediction"), EulerDiscreteScheduler(prediction_type="sample")):
        dit.scheduler = scheduler
        message = fails(*train("dit", "out"))
        assert "must have betas and prediction_type 'epsilon' to train for it" in message
        assert f"got a {type(scheduler).__name__} with prediction_type" in message
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: tiny.flux_pipeline())
    message = fails(*train("flux", "out"))
    assert "a SiTPipeline, a StableDiffusion3Pipeline or a DiTPipeline, got a FluxPipeline" in message
    for method, module in (("refiner", flowturbo_command), ("width", width_command)):
        monkeypatch.setattr(module, "open_pipeline", lambda *_: dit)
        message = fails("train", method, "dit", "--out", "out", "--device", "cpu")
        assert "a SiTPipeline or a StableDiffusion3Pipeline, got a DiTPipeline" in message


@pytest.mark.slow
def test_the_recipe_of_the_zoo() -> None:
    common = ["generate", "zoo:sit-digits", "--classes", "3", "--device", "cpu", "--steps", "2"]
    ran = CliRunner().invoke(app, [*common, "--recipe", "zoo:sit-digits-moe", "--report", "--out", "sparse"])
    assert ran.exit_code == 0 and "recipe 'sit-digits-moe'" in ran.stderr and "experts a token" in ran.stderr
    network = Recipe.from_pretrained(zoo.recipe_folder("sit-digits-moe")).accelerators[0].resolve()  # type: ignore[attr-defined]
    data = digits("reference")
    drawn = FlowObjective(data=data, null_label=network.null_label, batch_size=256)
    found = realised_capacity(network, drawn_batches(drawn, 4, seed=0))
    assert sum(found.values()) / len(found) == pytest.approx(1, abs=0.05)
