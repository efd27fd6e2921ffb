"""Experts on the digits generator (DiffMoE, arXiv 2503.14487): what they bring at equal work, and where they work.

    python benchmarks/moe.py --stage train      # five trainings, about an hour on two CPU cores; resumes
    python benchmarks/moe.py --stage quality    # needs the first; about 20 minutes
    python benchmarks/moe.py --stage capacity   # needs the first; about 2 minutes
    python benchmarks/moe.py --stage train --seeds 1 2

`train`: DiffMoE, a dense network and token choice from scratch, as long as each other and with as much work per token;
DiffMoE upcycled from the zoo's generator, and, as its control, that generator trained as long. `quality` compares
the first three, with other capacities of the one DiffMoE network, and the last two, also with fewer steps; claims rest
on paired differences. `capacity` measures how many experts tokens take on images that were not trained on: whether it
is as many as asked for, and whether it follows how hard a time, a class, an image or a place is. Whatever is recorded
goes to benchmarks/results/ (--record).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from _pairs import compared, pairs_table
from _training import folder_of, train_missing
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor

from flowaccel import MixtureOfExperts, zoo
from flowaccel.cli.common import progress
from flowaccel.data import digits
from flowaccel.evaluation import Classes, Protocol, console_table, environment, evaluate, load_results, markdown_table
from flowaccel.evaluation.reporting.plots import pareto_png
from flowaccel.methods.moe.control import moe_layers, set_moe_capacity, set_moe_selection
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel
from flowaccel.methods.moe.train import realised_capacity
from flowaccel.models import SiTTransformer2DModel
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe
from flowaccel.samplers.paths import LINEAR, flow_loss
from flowaccel.zoo_build.moe import TRAININGS, train_moe

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
STEPS, FEWER, FEW = 10, (2, 3, 4, 5), 4
BATCH = 25
"""Images of a timed call."""
KNOB = (0.5, 0.75, 1.5, 2.0)
TIMES = 10
MODEL = "diffmoe"


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=("train", "quality", "capacity"))
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="train: of the trainings")
    parser.add_argument("--only", nargs="+", choices=tuple(TRAININGS), default=tuple(TRAININGS), help="train")
    parser.add_argument("--out", type=Path, default=Path("runs/moe"))
    parser.add_argument("--claims-only", action="store_true", help="quality: work on the results that --out holds")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage:
        STAGES[stage](arguments)


# -- training


def train_stage(arguments: argparse.Namespace) -> None:
    """Train what is not there yet, and note what it took."""
    train_missing(arguments, start_training)


def start_training(name: str, seed: int, work: Path) -> tuple[Any, int, Any]:
    training = TRAININGS[name]
    loop = replace(training.loop, seed=seed)
    network = training.network(seed)
    return network, loop.steps, train_moe(network, training, work, loop)


def dense_network(arguments: argparse.Namespace, name: str) -> Any:
    return SiTTransformer2DModel.from_pretrained(folder_of(arguments, name) / "network").eval()


def expert_network(arguments: argparse.Namespace, name: str) -> Any:
    return MoESiTTransformer2DModel.from_pretrained(folder_of(arguments, name) / "network").eval()


# -- quality


def quality_stage(arguments: argparse.Namespace) -> None:
    """Of both comparisons results.json, table.md and figures, and claims.json."""
    claims = {
        "environment": environment(torch.device("cpu")),
        "training": {name: trained_for(arguments, name) for name in TRAININGS},
        "fresh": comparison(arguments, "fresh", "dense", fresh_recipes(arguments), FRESH_PAIRS, FEWER),
        "upcycled": comparison(arguments, "upcycled", "longer", upcycled_recipes(arguments), UPCYCLED_PAIRS, (3, 4)),
    }
    target = arguments.out / "quality_claims.json"
    target.write_text(json.dumps(claims, indent=1) + "\n")
    if arguments.record:
        shutil.copyfile(target, RESULTS / "moe_sit-digits_cpu.claims.json")


def trained_for(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """How long, and the mean loss of the last steps."""
    note = json.loads((folder_of(arguments, name) / "training.json").read_text())
    last = note.pop("last_losses")
    return {**note, "last_loss": sum(last) / len(last)}


def fresh_recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Both networks with experts, and other capacities and another way to choose of the one."""
    rows = [
        row(expert_network(arguments, name), f"{name}@{steps}", steps)
        for name in (MODEL, "token_choice")
        for steps in (STEPS, FEW)
    ]
    rows += [row(expert_network(arguments, MODEL), f"C={value:g}", STEPS, capacity=value) for value in KNOB]
    return [*rows, row(expert_network(arguments, MODEL), "gate_threshold", STEPS, selection="gate_threshold")]


def upcycled_recipes(arguments: argparse.Namespace) -> list[Recipe]:
    return [row(expert_network(arguments, "upcycled"), f"upcycled@{steps}", steps) for steps in (STEPS, FEW)]


def row(network: Any, name: str, steps: int, **options: Any) -> Recipe:
    return Recipe([MixtureOfExperts(network, **options)], name=name, num_inference_steps=steps)


FRESH_PAIRS = (
    *((f"{name}@{STEPS}", "baseline") for name in (MODEL, "token_choice")),
    *((f"{name}@{FEW}", f"baseline@{FEW}") for name in (MODEL, "token_choice")),
    (f"{MODEL}@{STEPS}", f"token_choice@{STEPS}"),
    (f"{MODEL}@{FEW}", "baseline@5"),
    ("gate_threshold", f"{MODEL}@{STEPS}"),
    *((f"C={value:g}", f"{MODEL}@{STEPS}") for value in KNOB),
)
UPCYCLED_PAIRS = ((f"upcycled@{STEPS}", "baseline"), (f"upcycled@{FEW}", f"baseline@{FEW}"))
"""The baseline is the dense network that was trained as long."""


def comparison(
    arguments: argparse.Namespace,
    name: str,
    control: str,
    recipes: list[Recipe],
    pairs: tuple[tuple[str, str], ...],
    fewer: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Evaluate recipes for a pipeline with the dense network `control`; returns the pairs."""
    pipe = load_pipeline(zoo.folder("sit-digits"), torch_dtype=torch.float32)
    pipe.transformer = dense_network(arguments, control)
    protocol = Protocol(
        conditions=Classes(tuple(range(10))),
        steps=STEPS,
        baseline_steps=fewer,
        num_samples=arguments.num_samples,
        latency_batch=BATCH,
        seed=arguments.seed,
        metrics=("fid", "kid", "class_accuracy", "precision", "recall"),
        rounds=arguments.rounds,
    )
    run = arguments.out / f"quality-{name}"
    with progress() as notify:
        results = load_results(run) if arguments.claims_only else evaluate(pipe, recipes, protocol, run, notify)
    found = [compared(run, results, a, b) for a, b in pairs]
    table = markdown_table(results) + "\n\n" + pairs_table(found) + "\n"
    (run / "table.md").write_text(table)
    Console(width=150).print(console_table(results))
    print(pairs_table(found))
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        for source, suffix in (("results.json", "json"), ("table.md", "md")):
            shutil.copyfile(run / source, RESULTS / f"moe_{name}_sit-digits_cpu.{suffix}")
        pareto_png(results, Path(f"docs/images/moe_{name}.png"), "fid")
    return found


# -- capacity


def capacity_stage(arguments: argparse.Namespace) -> None:
    """capacity.json and a figure."""
    network = expert_network(arguments, MODEL)
    found = {
        "environment": environment(torch.device("cpu")),
        "asked_and_realised": [
            {"network": name, "selection": selection, "asked": asked, "realised": realised(other, selection, asked)}
            for name, other in ((MODEL, network), ("upcycled", expert_network(arguments, "upcycled")))
            for selection in ("predictor_mask", "gate_threshold")
            for asked in (*KNOB[:2], 1.0, *KNOB[2:])
        ],
        "difficulty": difficulty(network),
    }
    for entry in found["asked_and_realised"]:
        print(f"{entry['network']:<9} {entry['selection']:<15} asked {entry['asked']:4.2f} got {entry['realised']:.3f}")
    hard = found["difficulty"]
    for name, value in hard["rank_correlation"].items():
        print(f"capacity and {name}: rank correlation {value['r']:+.2f} (p {value['p']:.2g})")
    (arguments.out / "capacity.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(hard, arguments.out / "capacity.png")
    if arguments.record:
        shutil.copyfile(arguments.out / "capacity.json", RESULTS / "moe_capacity_sit-digits_cpu.json")
        shutil.copyfile(arguments.out / "capacity.png", Path("docs/images/moe_capacity.png"))


def noised(images: Tensor, t: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States at time t, the noise, and the times."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    times = torch.full((len(images),), t)
    return LINEAR.interpolate(images, noise, times), noise, times


def grid() -> list[float]:
    """The middles of equal parts of [0, 1]."""
    return [(index + 0.5) / TIMES for index in range(TIMES)]


def realised(network: Any, selection: str, asked: float) -> float:
    """Experts per token over images that were not trained on, at times spread evenly."""
    data = digits("reference")
    states = [noised(data.images, t, place) for place, t in enumerate(grid())]
    set_moe_selection(network, selection)
    set_moe_capacity(network, None if asked == 1.0 else asked)
    found = realised_capacity(network, [(state, times, data.labels) for state, _, times in states])
    set_moe_selection(network, "predictor_mask")
    set_moe_capacity(network, None)
    return sum(found.values()) / len(found)


@torch.no_grad()
def difficulty(network: Any) -> dict[str, Any]:
    """Experts per token by time, layer, class, image and place, beside the loss there."""
    data, layers = digits("reference"), moe_layers(network)
    tokens = network.pos_embed.shape[1]
    capacity, losses = [], []  # by time: (layers, images, tokens), (images, tokens)
    for place, t in enumerate(grid()):
        states, noise, times = noised(data.images, t, place)
        output = network(states, times, data.labels, return_dict=False)[0]
        losses.append((output - (data.images - noise)).square().flatten(1))
        assert torch.allclose(losses[-1].mean(1), flow_loss(LINEAR, output, data.images, noise, times), atol=1e-5)
        counts = [torch.bincount(layer.plan.tokens, minlength=states.shape[0] * tokens) for layer in layers.values()]
        capacity.append(torch.stack(counts).view(len(layers), -1, tokens).float())
    taken, loss = torch.stack(capacity), torch.stack(losses)
    by_class = [data.labels == label for label in range(10)]
    per_image, image_loss = taken.mean((1, 3)), loss.mean(2)  # (times, images)
    centred = [(value - value.mean(1, keepdim=True)).flatten().tolist() for value in (per_image, image_loss)]
    return {
        "times": grid(),
        "layers": list(layers),
        "by_time": taken.mean((1, 2, 3)).tolist(),
        "by_time_and_layer": taken.mean((2, 3)).tolist(),
        "by_class": [float(taken[:, :, chosen].mean()) for chosen in by_class],
        "by_place": taken.mean((0, 1, 2)).tolist(),
        "loss_by_time": loss.mean((1, 2)).tolist(),
        "loss_by_class": [float(loss[:, chosen].mean()) for chosen in by_class],
        "loss_by_place": loss.mean((0, 1)).tolist(),
        "without_experts": float((taken == 0).float().mean()),
        "rank_correlation": {
            "loss over times": rank_correlation(taken.mean((1, 2, 3)).tolist(), loss.mean((1, 2)).tolist()),
            "loss over classes": rank_correlation(
                [float(taken[:, :, chosen].mean()) for chosen in by_class],
                [float(loss[:, chosen].mean()) for chosen in by_class],
            ),
            "loss over images at equal time": rank_correlation(*centred),
            "loss over places": rank_correlation(taken.mean((0, 1, 2)).tolist(), loss.mean((0, 1)).tolist()),
        },
    }


def rank_correlation(capacity: list[float], loss: list[float]) -> dict[str, float]:
    found = spearmanr(capacity, loss)
    return {"r": float(found.statistic), "p": float(found.pvalue), "n": len(capacity)}


def draw(found: dict[str, Any], path: Path) -> None:
    """Capacity by layer and time, by class, and by place, with the loss."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4), layout="constrained")
    image = axes[0].imshow(torch.tensor(found["by_time_and_layer"]).T, aspect="auto", cmap="viridis")
    axes[0].set(xlabel="time (0 noise, 1 data)", ylabel="block", title="experts per token")
    axes[0].set_yticks(range(len(found["layers"])), [path.split(".")[1] for path in found["layers"]])
    axes[0].set_xticks(range(0, TIMES, 3), [f"{found['times'][place]:.2f}" for place in range(0, TIMES, 3)])
    figure.colorbar(image, ax=axes[0])
    axes[1].plot(found["times"], found["by_time"], marker="o", label="experts per token")
    loss = axes[1].twinx()
    loss.plot(found["times"], found["loss_by_time"], color="tab:orange", marker="s")
    axes[1].set(xlabel="time", ylabel="experts per token (blue)", title="over times")
    loss.set_ylabel("loss (orange)")
    axes[2].scatter(found["loss_by_class"], found["by_class"])
    for label, (x, y) in enumerate(zip(found["loss_by_class"], found["by_class"], strict=True)):
        axes[2].annotate(str(label), (x, y), textcoords="offset points", xytext=(4, 2))
    axes[2].set(xlabel="loss", ylabel="experts per token", title="over classes")
    side = round(len(found["by_place"]) ** 0.5)
    places = axes[3].imshow(torch.tensor(found["by_place"]).view(side, side), cmap="viridis")
    axes[3].set(title="over places", xticks=[], yticks=[])
    figure.colorbar(places, ax=axes[3])
    figure.savefig(path, dpi=110)
    plt.close(figure)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": train_stage,
    "quality": quality_stage,
    "capacity": capacity_stage,
}

if __name__ == "__main__":
    main()
