"""The command line from outside: files, exit codes, messages."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from commands import fails, run
from flowaccel import SiTTransformer2DModel, VelocityRefiner, accelerated, zoo
from flowaccel.cli import app, demo
from flowaccel.cli.evaluate import fewer_steps
from flowaccel.data import digits
from flowaccel.evaluation import load_features, load_results, runner
from flowaccel.evaluation.results import check_results
from flowaccel.methods.flowturbo import train_command
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import PRESETS
from tiers import Process

FLOWTURBO = "flowturbo-H1P2R2"
COMMANDS = (
    "demo",
    "generate",
    "evaluate",
    "compare",
    "calibrate",
    "stats",
    "export-npz",
    "convert",
    "recipes",
    "train refiner",
    "train mediators",
    "train policy",
    "train moe",
    "train width",
    "plan",
    "zoo list",
    "zoo show",
    "zoo build",
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline folder with a refiner."""
    return str(tiny.save_sit_pipeline(tmp_path_factory.mktemp("saved") / "pipe", num_layers=1))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluation(pipe: str, *more: str, out: str = "run") -> list[str]:
    """A small evaluation, in a few seconds."""
    small = "--num-samples 12 --rounds 2 --steps 3 --latency-batch 2 --metrics kid,class_accuracy,rel_l2"
    networks = "--features zoo:digits-features --reference zoo:digits"
    return ["evaluate", pipe, *small.split(), *networks.split(), "--device", "cpu", "--out", out, *more]


def images(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*.png"))}


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    text = " ".join(run(*command.split(), "--help").stdout.split())
    assert f"Example: flowaccel {command}" in text
    assert "Traceback" not in text


def test_every_command_is_listed_and_tested() -> None:
    names: set[str] = set()
    for name, command in typer.main.get_command(app).commands.items():
        names |= {f"{name} {sub}" for sub in command.commands} if hasattr(command, "commands") else {name}
    assert names == set(COMMANDS)
    text = run("--help").stdout
    assert all(command.split()[0] in text for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["zoo"], ["train"]])
def test_without_a_command_comes_the_help(arguments: list[str]) -> None:
    assert "Usage" in run(*arguments, code=2).output


def test_unknown_command_and_option() -> None:
    assert "No such command" in fails("quantise")
    assert "No such option" in fails("generate", "x", "--colour", "red")


def test_as_a_module(saved: str, elsewhere: Path, process: Process) -> None:
    """In a process of its own, and with the same images as in this one."""
    command = ["-m", "flowaccel", "generate", saved, "--recipe", FLOWTURBO, "--device", "cpu", "--json"]
    ended = process(*command, "--out", "own")
    assert json.loads(ended.stdout)["files"][0] == str(Path("own") / "00000.png")
    run("generate", saved, "--recipe", FLOWTURBO, "--device", "cpu", "--out", "here")
    assert images("own") == images("here")
    assert len(images("own")) == 10


def test_as_a_module_with_a_mistake(saved: str, process: Process) -> None:
    ended = process("-m", "flowaccel", "generate", saved, "--recipe", "huen", code=2)
    assert ended.stdout == ""
    assert "error: unknown recipe 'huen': did you mean 'heun'?" in ended.stderr
    assert "Traceback" not in ended.stderr


# generate


def test_generate(saved: str, elsewhere: Path) -> None:
    result = run("generate", saved, "--classes", "3,5-7", "--device", "cpu", "--out", "out")
    assert "wrote 4 images to out" in result.stderr
    assert result.stdout == ""
    assert list(images("out")) == ["00000.png", "00001.png", "00002.png", "00003.png"]
    with Image.open("out/00002.png") as image:
        assert (image.size, image.mode, image.format) == ((8, 8), "L", "PNG")


def test_generate_as_json(saved: str) -> None:
    found = json.loads(run("generate", saved, "--num-images", "3", "--device", "cpu", "--json").stdout)
    assert found["files"] == [str(Path("outputs") / "generate" / f"0000{i}.png") for i in range(3)]
    assert all(Path(path).is_file() for path in found["files"])
    assert found["seconds"] > 0


@pytest.mark.parametrize("recipe", [None, FLOWTURBO])
def test_batch_size_changes_no_image(recipe: str | None, saved: str) -> None:
    chosen = [] if recipe is None else ["--recipe", recipe]
    for size in ("16", "3", "1"):
        run("generate", saved, *chosen, "--batch-size", size, "--steps", "5", "--device", "cpu", "--out", size)
    for name in images("16"):
        one, three, sixteen = (
            torch.frombuffer(pixels(f"{size}/{name}"), dtype=torch.uint8).int() for size in (1, 3, 16)
        )
        assert (one - sixteen).abs().max() <= 1  # the network itself may round otherwise in another batch
        assert (three - sixteen).abs().max() <= 1
    run("generate", saved, *chosen, "--batch-size", "3", "--steps", "5", "--device", "cpu", "--out", "again")
    assert images("again") == images("3")


def pixels(path: str) -> bytearray:
    with Image.open(path) as image:
        return bytearray(image.tobytes())


def test_seed_changes_every_image(saved: str) -> None:
    for name, seed in (("zero", "0"), ("one", "1"), ("again", "0")):
        run("generate", saved, "--seed", seed, "--steps", "2", "--device", "cpu", "--out", name)
    assert images("zero") == images("again")
    assert all(images("zero")[name] != images("one")[name] for name in images("zero"))


def test_more_images_begin_with_the_fewer(saved: str) -> None:
    for count in ("3", "12"):
        run(
            "generate",
            saved,
            "--num-images",
            count,
            "--batch-size",
            "1",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--out",
            count,
        )
    few, many = images("3"), images("12")
    assert {name: many[name] for name in few} == few
    assert len(many) == 12


def test_recipe_from_a_folder(saved: str) -> None:
    pipe = load_pipeline(saved)
    tiny.flowturbo(tiny.random_refiner(pipe.transformer)).save_pretrained("recipe")
    run("generate", saved, "--recipe", "recipe", "--device", "cpu", "--out", "folder")
    run("generate", saved, "--recipe", "recipe/flowaccel.json", "--device", "cpu", "--out", "file")
    run("generate", saved, "--recipe", FLOWTURBO, "--device", "cpu", "--out", "name")
    run("generate", saved, "--device", "cpu", "--out", "none")
    assert images("folder") == images("file") == images("name") != images("none")


def test_half_precision(saved: str) -> None:
    run("generate", saved, "--dtype", "bfloat16", "--recipe", FLOWTURBO, "--device", "cpu", "--out", "half")
    run("generate", saved, "--recipe", FLOWTURBO, "--device", "cpu", "--out", "single")
    assert len(images("half")) == 10
    assert images("half") != images("single")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "huen"], "unknown recipe 'huen': did you mean 'heun'?"),
        (["--recipe", "flowturbo-H2P4R2@9"], "asks for different numbers of steps: [8, 9]"),
        (
            ["--recipe", FLOWTURBO, "--steps", "6"],
            "num_inference_steps must be 5 for blocks 'H1P2R2' (H + P + R), got 6",
        ),
        (["--classes", "8-12"], "class_labels must lie in 0 .. 9, got [10, 11, 12]"),
        (["--classes", "a"], "--classes must look like 0,3,5-7, got 'a'"),
        (["--classes", "3-"], "--classes must look like 0,3,5-7, got '3-'"),
        (["--classes", "7-5"], "--classes must look like 0,3,5-7, got '7-5'"),
        (["--classes", ","], "--classes must look like 0,3,5-7, got ','"),
        (["--prompt", "a cat"], "SiTPipeline takes classes, not prompts; use --classes"),
        (["--device", "warp"], "--device 'warp' cannot be used here"),
        (["--device", "meta"], "--device 'meta' cannot be used here"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--num-images", "0"], "Invalid value for '--num-images'"),
        (["--guidance-scale", "0.5"], "guidance_scale must be finite and at least 1"),
        (["--attention", "sage"], "attention must be one of ['flash', 'sdpa', 'xformers'], got 'sage'"),
    ],
)
def test_wrong_use_of_generate(arguments: list[str], message: str, saved: str) -> None:
    assert message in fails("generate", saved, "--out", "out", "--device", "cpu", *arguments)
    assert images(".") == {}


def test_pipelines_that_are_not_there(elsewhere: Path) -> None:
    assert "cannot load nowhere: it is no folder here, and the Hub did not give it" in fails("generate", "nowhere")
    assert "unknown zoo entry 'zoo:sit-digit': did you mean 'zoo:sit-digits'?" in fails("generate", "zoo:sit-digit")
    assert "is not a pipeline: it has no model_index.json" in fails("generate", "zoo:digits-features")
    (elsewhere / "empty").mkdir()
    assert "empty is not a pipeline: it has no model_index.json" in fails("generate", "empty")


def test_prompts_are_checked(saved: str) -> None:
    Path("prompts.txt").write_text("a cat\n")
    assert "takes classes, not prompts" in fails("evaluate", saved, "--prompts", "prompts.txt")


def test_a_folder_that_cannot_be_made_is_a_failure(saved: str) -> None:
    Path("file").write_text("in the way")
    assert "file" in fails("generate", saved, "--out", "file/below", "--device", "cpu", code=1)


def test_long_paths_are_not_broken(saved: str) -> None:
    name = "a" * 150
    assert f"no such/{name}" in fails("recipes", f"no such/{name}").replace("unknown recipe", "")


# evaluate


def test_evaluate_writes_everything(saved: str, elsewhere: Path) -> None:
    result = run(*evaluation(saved, "--recipe", FLOWTURBO, "--recipe", "euler@2", "--baseline-steps", "2", "--json"))
    found = json.loads(result.stdout)
    check_results(found)
    assert found == load_results("run")
    assert [row["recipe"] for row in found["rows"]] == ["baseline", "baseline@2", FLOWTURBO, "euler@2"]
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "pareto.png",
        "report.html",
        "results.json",
        "rows",
        "samples.png",
    ]
    assert len(list(Path("run/rows").rglob("0*.png"))) == 4 * 12
    assert list(elsewhere.iterdir()) == [elsewhere / "run"]


@pytest.mark.slow
def test_evaluate_prints_a_table_and_resumes(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(*evaluation(saved, "--recipe", "euler@2"))
    assert "baseline" in result.stdout
    assert "euler@2" in result.stdout
    assert "results.json, pareto.png, samples.png and report.html are in run" in result.stderr
    before = {path: path.stat().st_mtime_ns for path in Path("run/rows").rglob("*.png")}
    first = load_results("run")
    made: list[int] = []
    original = runner.call
    monkeypatch.setattr(
        runner,
        "call",
        lambda pipe, protocol, ids, steps: (made.append(len(ids)), original(pipe, protocol, ids, steps))[1],
    )
    run(*evaluation(saved, "--recipe", "euler@2"))
    assert {path: path.stat().st_mtime_ns for path in Path("run/rows").rglob("*.png")} == before
    assert set(made) == {2}  # the timed calls alone
    assert [row["metrics"] for row in load_results("run")["rows"]] == [row["metrics"] for row in first["rows"]]


def test_fewer_steps_compete_unless_others_are_asked_for(saved: str) -> None:
    run(*evaluation(saved, "--recipe", "euler@2"))
    assert [row["recipe"] for row in load_results("run")["rows"]] == ["baseline", "baseline@1", "euler@2"]
    assert [fewer_steps(steps) for steps in (1, 2, 3, 4, 10, 50)] == [(), (1,), (1,), (1, 2), (2, 5), (12, 25)]


def stop_at(monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException) -> None:
    """Let the pipeline call number `nth` of an evaluation raise."""
    original, calls = runner.call, []

    def call(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise error
        return original(*arguments)

    monkeypatch.setattr(runner, "call", call)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_interrupted_evaluation_says_how_to_go_on(nth: int, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = evaluation(saved, "--recipe", "euler@2", "--batch-size", "5")
    with monkeypatch.context() as patch:
        stop_at(patch, nth, KeyboardInterrupt())
        message = fails(*command, code=1)
    assert "interrupted. What was made so far is kept; the same command goes on from there." in message
    assert len(list(Path("run").rglob("*.png"))) == {1: 0, 2: 5, 5: 12 + 5}[nth]
    run(*command)
    assert len(images("run/rows/euler@2")) == 12


def test_full_disk_is_a_failure_that_says_how_to_go_on(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 1, OSError(errno.ENOSPC, "No space left on device"))
        message = fails(*evaluation(saved), code=1)
    assert "No space left on device. What was made so far is kept; the same command goes on from there." in message


@pytest.mark.slow
def test_evaluate_from_a_file(saved: str) -> None:
    options = {
        "num-samples": 12,
        "rounds": 2,
        "steps": 3,
        "latency_batch": 2,
        "features": "zoo:digits-features",
        "reference": "zoo:digits",
        "metrics": ["kid", "rel_l2"],
        "recipe": [FLOWTURBO, "euler@2"],
        "baseline-steps": 2,
        "classes": "0-3",
        "seed": 5,
        "out": "from-file",
        "guidance_scale": None,
    }
    Path("options.yaml").write_text(yaml.safe_dump(options))
    found = json.loads(run("evaluate", saved, "--config", "options.yaml", "--device", "cpu", "--json").stdout)
    assert [row["recipe"] for row in found["rows"]] == ["baseline", "baseline@2", FLOWTURBO, "euler@2"]
    assert found["protocol"]["conditions"] == {"classes": [0, 1, 2, 3]}
    assert (found["protocol"]["seed"], found["protocol"]["metrics"]) == (5, ["kid", "rel_l2"])
    assert load_results("from-file") == found
    # and what is typed wins
    typed = ["--seed", "6", "--out", "typed", "--recipe", "heun@2", "--metrics", "kid"]
    found = json.loads(run("evaluate", saved, "--config", "options.yaml", "--device", "cpu", *typed, "--json").stdout)
    assert [row["recipe"] for row in found["rows"]] == ["baseline", "baseline@2", "heun@2"]
    assert (found["protocol"]["seed"], found["protocol"]["metrics"]) == (6, ["kid"])
    assert Path("typed/results.json").is_file()


@pytest.mark.slow
def test_the_file_and_the_command_line_make_the_same_run(saved: str) -> None:
    run(*evaluation(saved, "--recipe", "euler@2", "--baseline-steps", "2,1"))
    options = {"recipe": "euler@2", "baseline_steps": [2, 1], "metrics": "kid,class_accuracy,rel_l2", "num_samples": 12}
    rest = {"rounds": 2, "steps": 3, "latency_batch": 2, "features": "zoo:digits-features", "reference": "zoo:digits"}
    Path("options.yml").write_text(yaml.safe_dump(options | rest | {"out": "file", "device": "cpu"}))
    run("evaluate", saved, "--config", "options.yml")
    assert images("file/rows") == images("run/rows")
    for mine, theirs in zip(load_results("file")["rows"], load_results("run")["rows"], strict=True):
        assert (mine["recipe"], mine["metrics"], mine["nfe"]) == (theirs["recipe"], theirs["metrics"], theirs["nfe"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "num_sample: 12\nrecipes: x",
            "options.yaml has unknown options num_sample, recipes; allowed are argument, attention,",
        ),
        ("config: other.yaml", "has unknown options config"),
        ("- a\n- b", "must map option names to values"),
        ("just text", "must map option names to values"),
        ("", "must map option names to values"),
        ("[1, 2", "options.yaml is not YAML"),
        ("a: &a [*a", "options.yaml is not YAML"),
        ("seed: x", "Invalid value for '--seed'"),
        ("num_samples: 2.5", "Invalid value for '--num-samples'"),
        ("num_samples: 1", "Invalid value for '--num-samples'"),
        ("steps: 0", "Invalid value for '--steps'"),
        ("steps: {a: 1}", "Invalid value for '--steps'"),
        ("guidance_scale: high", "Invalid value for '--guidance-scale'"),
        ("recipe: 3", "unknown recipe '3'"),
        ("metrics: [kid, kidd]", "unknown metric 'kidd'; did you mean 'kid'?"),
        (
            "baseline_steps: [2, x]",
            "--baseline-steps must be step counts separated by commas, such as 10,20, got '2,x'",
        ),
        ("classes: [0, 30]", "class_labels must lie in 0 .. 9, got [30]"),
        ("prompts: nowhere.txt", "takes classes, not prompts"),
    ],
)
def test_wrong_files(text: str, message: str, saved: str) -> None:
    Path("options.yaml").write_text(text)
    networks = ["--features", "zoo:digits-features", "--reference", "zoo:digits", "--device", "cpu"]
    assert message in fails("evaluate", saved, "--config", "options.yaml", *networks)


def test_no_file_and_not_text(saved: str) -> None:
    assert "options.yaml" in fails("evaluate", saved, "--config", "options.yaml")
    Path("options.yaml").write_bytes(b"\xff\xfe\x81")
    assert "options.yaml is not YAML" in fails("evaluate", saved, "--config", "options.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "huen"], "unknown recipe 'huen'"),
        (["--recipe", "flowturbo-H1P2R2-single", "--recipe", "flowturbo-H1P2R2-single"], "rows need different names"),
        (["--baseline-steps", "2;3"], "--baseline-steps must be step counts separated by commas"),
        (["--baseline-steps", "0"], "--baseline-steps must be step counts separated by commas"),
        (["--baseline-steps", "2,2"], "rows need different names, got more than once: baseline@2"),
        (["--metrics", "fidd"], "unknown metric 'fidd'; did you mean 'fid'?"),
        (["--features", "inceptoin"], "zoo:NAME or MODULE:ATTRIBUTE, got 'inceptoin'"),
        (["--features", "zoo:sit-digits"], "zoo:sit-digits is a pipeline, not a feature network"),
        (
            ["--reference", "zoo:faces"],
            "unknown reference 'zoo:faces': there are zoo:digits, ",
        ),
        (["--reference", "nowhere"], "reference must be zoo:SET, a folder with images, or a"),
        (["--rounds", "1"], "Invalid value for '--rounds'"),
        (["--attention", "sage"], "attention must be one of"),
        (["--device", "warp"], "--device 'warp' cannot be used here"),
    ],
)
def test_wrong_use_of_evaluate(arguments: list[str], message: str, saved: str) -> None:
    assert message in fails(*evaluation(saved, *arguments))
    assert images("run") == {}


def test_pipelines_outside_the_zoo_have_no_default_networks(saved: str) -> None:
    assert "this pipeline has no default for --features; give one" in fails("evaluate", saved, "--device", "cpu")
    features = ["--features", "zoo:digits-features", "--device", "cpu"]
    assert "this pipeline has no default for --reference; give one" in fails("evaluate", saved, *features)


@pytest.mark.slow
def test_other_settings_in_a_used_folder(saved: str) -> None:
    run(*evaluation(saved))
    message = fails(*evaluation(saved, "--seed", "3"))
    assert "holds samples made differently (seed: there 0, now 3); choose another --out or delete it" in message


def test_demo(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(zoo.ENTRIES["sit-digits"], name=saved)  # what the zoo says, and a tiny pipeline
    monkeypatch.setitem(zoo.ENTRIES, "sit-digits", entry)
    small = replace(demo.TASKS["digits"], steps=3, baseline_steps=(2,), recipes=("euler@2", FLOWTURBO))
    monkeypatch.setitem(demo.TASKS, "digits", small)
    result = run("demo", "--num-samples", "70", "--rounds", "2", "--device", "cpu")
    assert "70 images a row, a demo-sized sample" in result.stderr
    assert [row["recipe"] for row in load_results("outputs/demo")["rows"]] == [
        "baseline",
        "baseline@2",
        "euler@2",
        FLOWTURBO,
    ]


def test_demo_names_things_that_exist() -> None:
    for task in demo.TASKS.values():
        assert zoo.entry(task.pipe).kind == "pipeline"
        for name in task.recipes:
            assert json.loads(run("recipes", name, "--json").stdout)["name"] == name
    assert "--task must be one of digits, t2i, got 'video'" in fails("demo", "--task", "video")


# compare


def test_compare(saved: str) -> None:
    run(*evaluation(saved, "--recipe", FLOWTURBO, "--baseline-steps", "2"))
    found = json.loads(run("compare", "run", "--a", FLOWTURBO, "--b", "baseline@2", "--json").stdout)
    rows = {row["recipe"]: row for row in load_results("run")["rows"]}
    for name in ("kid", "class_accuracy", "rel_l2"):
        versus = rows[FLOWTURBO]["metrics"][name]["versus"]["baseline@2"]
        assert {key: found["metrics"][name][key] for key in versus} == versus
    table = run("compare", "run", "--a", FLOWTURBO, "--b", "baseline").stdout
    assert "class_accuracy" in table
    assert "rel_l2" not in table
    assert f"seconds of {FLOWTURBO} / seconds of baseline:" in " ".join(table.split())
    assert "no row called 'basline': did you mean 'baseline'?" in fails(
        "compare", "run", "--a", FLOWTURBO, "--b", "basline"
    )
    assert "no result file at" in fails("compare", "nowhere", "--a", "x", "--b", "y")
    Path("run/results.json").write_text("{")
    assert "is not JSON" in fails("compare", "run", "--a", "x", "--b", "y")


# convert


@pytest.mark.parametrize("form", ["safetensors", "pt", "training checkpoint"])
def test_convert_there_and_back(form: str) -> None:
    network = tiny.sit_network(learn_sigma=True)
    state = {key: value.contiguous() for key, value in network.to_official().items()}
    if form == "safetensors":
        save_file(state, "official.safetensors")
        source = "official.safetensors"
    else:
        torch.save({"model": {}, "ema": state} if form == "training checkpoint" else state, "official.pt")
        source = "official.pt"
    result = run("convert", source, "--out", "folder", "--num-attention-heads", "2")
    assert '"num_layers": 3' in result.stderr
    assert "wrote folder" in result.stderr
    loaded = SiTTransformer2DModel.from_pretrained("folder")
    mine = network.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in loaded.state_dict().items())
    run("convert", "folder", "--to", "official", "--out", "below/back.safetensors")
    back = load_file("below/back.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_convert_to_dit() -> None:
    save_file({k: v.contiguous() for k, v in tiny.sit_network(learn_sigma=True).to_official().items()}, "o.safetensors")
    run("convert", "o.safetensors", "--to", "dit", "--out", "dit", "--num-attention-heads", "2")
    assert json.loads(Path("dit/config.json").read_text())["_class_name"] == "DiTTransformer2DModel"


def test_convert_a_refiner() -> None:
    refiner = tiny.random_refiner(tiny.sit_network())
    save_file({key: value.contiguous() for key, value in refiner.to_official().items()}, "r.safetensors")
    run("convert", "r.safetensors", "--out", "refiner", "--num-attention-heads", "2", "--out-channels", "1")
    pipe = tiny.sit_pipeline()
    with accelerated(pipe, tiny.flowturbo("refiner")):
        found = pipe(3, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    with accelerated(pipe, tiny.flowturbo(refiner)):
        assert torch.equal(found, pipe(3, output_type="pt", generator=torch.Generator().manual_seed(0)).images)


def test_wrong_use_of_convert(elsewhere: Path) -> None:
    assert "no checkpoint at nowhere.pt" in fails("convert", "nowhere.pt", "--out", "x")
    assert "no transformer in nowhere: it has no config.json" in fails(
        "convert", "nowhere", "--to", "official", "--out", "x"
    )
    Path("bad.pt").write_bytes(b"no checkpoint")
    assert "cannot read bad.pt: it is truncated, not a checkpoint" in fails("convert", "bad.pt", "--out", "x")
    save_file({"weight": torch.zeros(2)}, "foreign.safetensors")
    assert "not an official SiT or DiT checkpoint" in fails("convert", "foreign.safetensors", "--out", "x")
    save_file({k: v.contiguous() for k, v in tiny.sit_network().to_official().items()}, "o.safetensors")
    assert "pass num_attention_heads=" in fails("convert", "o.safetensors", "--out", "x")
    assert "has no entry 'opt'" in fails("convert", "o.safetensors", "--out", "x", "--which", "opt")
    assert "Invalid value for '--to'" in fails("convert", "o.safetensors", "--out", "x", "--to", "onnx")
    assert not (elsewhere / "x").exists()


# recipes


def test_recipes() -> None:
    assert json.loads(run("recipes", "--json").stdout) == PRESETS
    table = run("recipes").stdout
    assert all(name in table for name in PRESETS)
    assert "@N" in table
    shown = run("recipes", "heun@8")
    assert json.loads(shown.stdout) == json.loads(run("recipes", "heun@8", "--json").stdout)
    assert json.loads(shown.stdout)["num_inference_steps"] == 8
    assert "unknown recipe 'rk5': did you mean 'rk4'" in fails("recipes", "rk5")
    Path("broken.json").write_text("{}")
    assert "broken.json: not a recipe: schema must be 1, got None" in fails("recipes", "broken.json")


# zoo


def test_zoo_list() -> None:
    found = json.loads(run("zoo", "list", "--json").stdout)
    assert [entry["name"] for entry in found] == [zoo.PREFIX + name for name in zoo.ENTRIES]
    assert all(entry["rebuild"].startswith("flowaccel zoo build ") for entry in found)
    assert {entry["name"]: entry["mb"] for entry in found}["zoo:digits-features"] > 0.1
    assert "digits-features" in run("zoo", "list").stdout


def test_zoo_show_prints_the_card() -> None:
    card = (zoo.folder("digits-features") / "README.md").read_text()
    for name in ("digits-features", "zoo:digits-features"):
        assert run("zoo", "show", name).stdout.split() == card.split()


def test_wrong_use_of_the_zoo() -> None:
    for command in (["show", "sit-digit"], ["build", "sit-digit", "--out", "x"]):
        assert "unknown zoo entry 'sit-digit': did you mean 'zoo:sit-digits'?" in fails("zoo", *command)


def test_zoo_build_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowaccel.zoo_build import builders as builders

    monkeypatch.setattr(builders, "FEATURES_LOOP", replace(builders.FEATURES_LOOP, steps=3))
    assert "wrote built" in run("zoo", "build", "zoo:digits-features", "--out", "built").stderr
    assert {path.name for path in Path("built").iterdir()} >= {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "training",
    }
    first = Path("built/diffusion_pytorch_model.safetensors").read_bytes()
    run("zoo", "build", "digits-features", "--out", "built")
    assert Path("built/diffusion_pytorch_model.safetensors").read_bytes() == first


# train


def train(pipe: str, out: str, *more: str) -> list[str]:
    return ["train", "refiner", pipe, "--out", out, "--batch-size", "4", "--device", "cpu", *more]


def weights(folder: str) -> bytes:
    return Path(folder, "diffusion_pytorch_model.safetensors").read_bytes()


def test_train_resumes_to_the_same_refiner(saved: str) -> None:
    found = json.loads(run(*train(saved, "parts", "--steps", "3", "--json")).stdout)
    assert (found["out"], found["steps"]) == ("parts", 3)
    assert found["loss"] > 0
    first = weights("parts")
    run(*train(saved, "parts", "--steps", "6"))
    assert "wrote the refiner to whole" in run(*train(saved, "whole", "--steps", "6")).stderr
    assert weights("parts") == weights("whole") != first
    assert [path.name for path in Path("whole/training").iterdir()] == ["state.safetensors"]


def test_seed_of_a_training(saved: str) -> None:
    for name, seed in (("zero", "0"), ("one", "1"), ("again", "0")):
        torch.manual_seed(len(name))  # which must not matter
        run(*train(saved, name, "--steps", "1", "--seed", seed))
    assert weights("zero") == weights("again") != weights("one")


def test_a_trained_refiner_can_be_used(saved: str) -> None:
    options = (
        "--steps 2 --guidance-scale 1.5 --clamp --per-sample-delta --trajectory-steps 3 --drop-both --delta-max 0.3"
    )
    run(*train(saved, "refiner", *options.split()))
    pipe = load_pipeline(saved)
    pipe.set_progress_bar_config(disable=True)
    with accelerated(pipe, tiny.flowturbo(Path("refiner"))):
        assert len(pipe([1, 2]).images) == 2
    assert VelocityRefiner("refiner").resolve().config.in_channels == 2


def test_interrupted_training_says_how_to_go_on(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train_command.run_training

    def interrupted(*arguments: Any) -> Any:
        for state in original(*arguments):
            yield state
            if state.step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "run_training", interrupted)
        message = fails(*train(saved, "parts", "--steps", "6", "--save-every", "2"), code=1)
    assert "interrupted. The last checkpoint is kept; the same command goes on from there." in message
    run(*train(saved, "parts", "--steps", "6", "--save-every", "2"))
    run(*train(saved, "whole", "--steps", "6"))
    assert weights("parts") == weights("whole")


def test_a_loss_that_is_not_finite_is_a_failure(saved: str) -> None:
    message = fails(*train(saved, "out", "--steps", "20", "--learning-rate", "1e30"), code=1)
    assert "lower the learning rate" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "faces"], "--data must be one of ['digits', 'shapes'], got 'faces'"),
        (["--delta-max", "3"], "need 0 <= delta_min < delta_max <= 1, got 0.0 and 3.0"),
        (["--guidance-scale", "0.2"], "guidance_scale must be at least 1, got 0.2"),
        (["--label-drop", "2"], "label_drop must lie in [0, 1], got 2.0"),
        (["--precision", "fp8"], "precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--device", "warp"], "--device 'warp' cannot be used here"),
    ],
)
def test_wrong_use_of_train(arguments: list[str], message: str, saved: str) -> None:
    assert message in fails(*train(saved, "out", *arguments))
    assert not Path("out").exists()


def test_other_settings_of_a_training(saved: str) -> None:
    run(*train(saved, "out", "--steps", "2"))
    assert "other settings (there, now): {'seed': (0, 1)}; use another --out" in fails(
        *train(saved, "out", "--steps", "2", "--seed", "1")
    )
    assert "'objective.clamp': (False, True)" in fails(*train(saved, "out", "--steps", "2", "--clamp"))


def test_images_of_another_size() -> None:
    tiny.sit_pipeline(sample_size=16).save_pretrained("large")
    message = fails(*train("large", "out", "--steps", "2"))
    assert "--data digits has images of shape (1, 8, 8), and the network of this pipeline takes (1, 16, 16)" in message


def test_pipelines_without_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: tiny.flux_pipeline())
    message = fails(*train("flux", "out", "--steps", "2"))
    assert "trains parts of a SiTPipeline or a StableDiffusion3Pipeline, got a FluxPipeline" in message
    monkeypatch.setattr(train_command, "open_pipeline", lambda *_: tiny.sd3_pipeline())
    assert "--data digits has no captions" in fails(*train("sd3", "out", "--steps", "2"))


# the reference model


@pytest.mark.slow
def test_the_reference_model_draws_digits_faster() -> None:
    """Smoke: the shipped pipeline and refiner load, run, and what they draw is read as what was asked for."""
    command = ["generate", "zoo:sit-digits", "--num-images", "40", "--batch-size", "40", "--device", "cpu"]
    run(*command, "--recipe", "flowturbo-H2P4R2", "--out", "digits")
    drawn = torch.stack([torch.frombuffer(pixels(f"digits/{name}"), dtype=torch.uint8) for name in images("digits")])
    network = load_features("zoo:digits-features")
    found = network.classify(network(drawn.reshape(-1, 1, 8, 8)))
    assert found.eq(torch.arange(40) % 10).float().mean() > 0.8


def test_the_reference_model_has_its_networks() -> None:
    entry = zoo.entry("sit-digits")
    assert entry.features is not None
    assert load_features(entry.features).module.config.num_classes == 10
    pipe = load_pipeline(zoo.folder("sit-digits"))
    assert pipe.transformer.config.sample_size == digits("reference").images.shape[-1]
