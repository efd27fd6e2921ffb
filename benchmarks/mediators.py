"""Mediator attention on the digits generator (arXiv 2408.05710), and what it saves over the number of tokens.

python benchmarks/mediators.py --stage train    # two trainings, about 20 minutes on two CPU cores; resumes
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _pairs import compared, pairs_table
from rich.console import Console

from flowaccel import Mediators, MediatorSchedule, zoo
from flowaccel.cli.common import progress
from flowaccel.evaluation import (
    Classes,
    Protocol,
    console_table,
    count_macs,
    environment,
    evaluate,
    load_results,
    markdown_table,
    measure_latency,
)
from flowaccel.models import SiTTransformer2DModel
from flowaccel.models.mediators import MediatorSiTTransformer2DModel
from flowaccel.models.sit import SiTAttention
from flowaccel.modules.mediators import MediatorAttention
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe
from flowaccel.training.zoo_mediators import TRAININGS, fresh_network, train_fresh
from flowaccel.training.zoo_moe import FRESH_LOOP

RESULTS = Path(__file__).parent / "results"
STEPS, FEWER, FEW = 10, (2, 3, 4, 5), 4
BATCH = 25
"""Images of a timed call."""
SIDES, LAYER_COUNTS = (16, 32, 64, 128), (16, 64, 256)
DYNAMIC = MediatorSchedule(fixed=((0.0, 4), (0.5, 16)))


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=("train", "quality", "layers"))
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--dense", type=Path, default=Path("runs/moe/dense/network"), help="quality: the softmax network"
    )
    parser.add_argument("--device", default="cpu", help="layers")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="layers")
    parser.add_argument("--width", type=int, default=384, help="layers")
    parser.add_argument("--heads", type=int, default=6, help="layers")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="layers: of square grids of tokens")
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


def folder_of(arguments: argparse.Namespace, name: str, seed: int = 0) -> Path:
    return arguments.out / (name if seed == 0 else f"{name}-seed{seed}")


def train_stage(arguments: argparse.Namespace) -> None:
    """Train what is not there yet, and note what it took."""
    for seed in arguments.seeds:
        for name in arguments.only:
            folder = folder_of(arguments, name, seed)
            if not (folder / "network").is_dir():
                train_one(name, seed, folder)


def train_one(name: str, seed: int, folder: Path) -> None:
    loop = replace(FRESH_LOOP, seed=seed)
    network = fresh_network(TRAININGS[name], seed)
    started, losses = time.process_time(), []
    for state in train_fresh(network, TRAININGS[name], folder / "training", loop):
        losses.append(state.loss)
        if state.step % 100 == 0:
            recent = losses[-100:]
            print(f"{name} {state.step}/{loop.steps} loss {sum(recent) / len(recent):.4f}", flush=True)
    network.save_pretrained(folder / "network")
    note = {"cpu_seconds": time.process_time() - started, "steps": len(losses), "last_losses": losses[-100:]}
    (folder / "training.json").write_text(json.dumps(note) + "\n")


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


# -- time


def layers_stage(arguments: argparse.Namespace) -> None:
    """One layer of attention: softmax, and as many mediators as fit."""
    dtype = getattr(torch, arguments.dtype)
    found = []
    for side in arguments.sides:
        tokens = side * side
        hidden = torch.randn(1, tokens, arguments.width, device=arguments.device, dtype=dtype)
        calls = {"softmax": layer_call(SiTAttention(arguments.width, arguments.heads), hidden)}
        for count in (count for count in LAYER_COUNTS if count < tokens):
            layer = MediatorAttention(arguments.width, arguments.heads, (side, side), (count,))
            calls[f"n={count}"] = layer_call(layer, hidden)
        plain = MediatorAttention(arguments.width, arguments.heads, (side, side), (64,), use_bias=False, use_dwc=False)
        calls["n=64, no biases, no convolution"] = layer_call(plain, hidden)
        macs = {name: count_macs(call) for name, call in calls.items()}
        timings = measure_latency(calls, rounds=arguments.rounds, device=arguments.device)
        entry: dict[str, Any] = {"tokens": tokens, "calls": {}}
        print(f"{tokens} tokens")
        for name, timing in timings.items():
            speedup, ideal = timings["softmax"].ratio_to(timing), macs["softmax"] / macs[name]
            entry["calls"][name] = {
                "ms": 1000 * timing.median,
                "speedup": speedup.value,
                "ci95": list(speedup.ci95),
                "ideal": ideal,
                "realised_over_ideal": speedup.value / ideal,
            }
            print(
                f"  {name:<32} {1000 * timing.median:9.2f} ms  {speedup.value:.2f}x [{speedup.ci95[0]:.2f}, "
                f"{speedup.ci95[1]:.2f}]  ideal {ideal:.2f}x  realised/ideal {speedup.value / ideal:.2f}"
            )
        found.append(entry)
    data = {
        "environment": environment(torch.device(arguments.device)),
        "dtype": arguments.dtype,
        "width": arguments.width,
        "heads": arguments.heads,
        "rows": found,
    }
    target = arguments.out / "layers.json"
    target.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.record:
        shutil.copyfile(target, RESULTS / f"mediators_layers_{torch.device(arguments.device).type}.json")


def layer_call(layer: Any, hidden: torch.Tensor) -> Callable[[], torch.Tensor]:
    layer = layer.to(hidden.device, hidden.dtype).eval()

    def call() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = layer(hidden)
        return output

    return call


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": train_stage,
    "quality": quality_stage,
    "layers": layers_stage,
}

if __name__ == "__main__":
    main()
