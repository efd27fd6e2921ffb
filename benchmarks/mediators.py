"""Mediator attention on the digits generator (arXiv 2408.05710); its time is in mediators_time.py.

python benchmarks/mediators.py --stage train    # two trainings, about 20 minutes on two CPU cores; resumes
python benchmarks/mediators.py --stage quality  # needs the first and --dense; about 20 minutes
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _pairs import compared, pairs_table
from _training import folder_of, train_missing
from rich.console import Console

from flowaccel import Mediators, zoo
from flowaccel.cli.common import progress
from flowaccel.evaluation import Classes, Protocol, console_table, evaluate, load_results, markdown_table
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.models import SiTTransformer2DModel
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe
from flowaccel.zoo_build.mediators import DYNAMIC, TRAININGS, fresh_network, train_fresh
from flowaccel.zoo_build.moe import FRESH_LOOP

RESULTS = Path(__file__).parent / "results"
STEPS, FEWER, FEW = 10, (2, 3, 4, 5), 4
BATCH = 25
"""Images of a timed call."""


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=("train", "quality"))
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--dense", type=Path, default=Path("runs/moe/dense/network"), help="quality: the softmax network"
    )
    parser.add_argument("--claims-only", action="store_true", help="quality: work on the results that --out holds")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="train: of the trainings")
    parser.add_argument("--only", nargs="+", choices=tuple(TRAININGS), default=tuple(TRAININGS), help="train")
    parser.add_argument("--out", type=Path, default=Path("runs/mediators"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage:
        STAGES[stage](arguments)


# -- training


def train_stage(arguments: argparse.Namespace) -> None:
    """Train what is not there yet, and note what it took."""
    train_missing(arguments, start_training)


def start_training(name: str, seed: int, work: Path) -> tuple[Any, int, Any]:
    loop = replace(FRESH_LOOP, seed=seed)
    network = fresh_network(TRAININGS[name], seed)
    return network, loop.steps, train_fresh(network, TRAININGS[name], work, loop)


# -- quality


def trained(arguments: argparse.Namespace, name: str) -> Any:
    return MediatorSiTTransformer2DModel.from_pretrained(folder_of(arguments, name) / "network").eval()


def recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """The control, and the one network with mediators at fixed numbers and growing ones."""
    rows = []
    for steps in (STEPS, FEW):
        rows.append(row(f"control@{steps}", steps, Mediators(trained(arguments, "control"))))
        for count in (4, 16):
            rows.append(row(f"n={count}@{steps}", steps, Mediators(trained(arguments, "mediators"), count=count)))
        rows.append(row(f"dynamic@{steps}", steps, Mediators(trained(arguments, "mediators"), schedule=DYNAMIC)))
    return rows


def row(name: str, steps: int, part: Any) -> Recipe:
    return Recipe([part], name=name, num_inference_steps=steps)


PAIRS = (
    *((f"{name}@{STEPS}", "baseline") for name in ("control", "n=4", "n=16", "dynamic")),
    *((f"{name}@{STEPS}", f"control@{STEPS}") for name in ("n=4", "n=16", "dynamic")),
    (f"dynamic@{STEPS}", f"n=4@{STEPS}"),
    (f"dynamic@{STEPS}", f"n=16@{STEPS}"),
    *((f"{name}@{FEW}", f"baseline@{FEW}") for name in ("control", "n=4", "n=16", "dynamic")),
    (f"n=16@{STEPS}", "baseline@5"),
)


def quality_stage(arguments: argparse.Namespace) -> None:
    """results.json, table.md and claims.json."""
    pipe = load_pipeline(zoo.folder("sit-digits"), torch_dtype=torch.float32)
    pipe.transformer = SiTTransformer2DModel.from_pretrained(arguments.dense).eval()
    protocol = Protocol(
        conditions=Classes(tuple(range(10))),
        steps=STEPS,
        baseline_steps=FEWER,
        num_samples=arguments.num_samples,
        latency_batch=BATCH,
        seed=arguments.seed,
        metrics=("fid", "kid", "class_accuracy", "precision", "recall"),
        rounds=arguments.rounds,
    )
    run = arguments.out / "quality"
    with progress() as notify:
        results = (
            load_results(run) if arguments.claims_only else evaluate(pipe, recipes(arguments), protocol, run, notify)
        )
    pairs = [compared(run, results, a, b) for a, b in PAIRS]
    (run / "claims.json").write_text(json.dumps({"pairs": pairs}, indent=1) + "\n")
    table = markdown_table(results) + "\n\n" + pairs_table(pairs) + "\n"
    (run / "table.md").write_text(table)
    Console(width=150).print(console_table(results))
    print(pairs_table(pairs))
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        for source, suffix in (("results.json", "json"), ("claims.json", "claims.json"), ("table.md", "md")):
            shutil.copyfile(run / source, RESULTS / f"mediators_sit-digits_cpu.{suffix}")


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": train_stage,
    "quality": quality_stage,
}

if __name__ == "__main__":
    main()
