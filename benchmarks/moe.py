"""Experts on the digits generator (DiffMoE, arXiv 2503.14487): what they bring at equal work.

Stages:
    train    the five networks of `flowaccel.training.zoo_moe`: DiffMoE, dense and token choice from scratch, DiffMoE
             upcycled from the zoo's generator, and that generator trained as long; resumes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowaccel.training.zoo_moe import TRAININGS, train_moe

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), default="train")
    parser.add_argument("--out", type=Path, default=Path("runs/moe"))
    parser.add_argument("--only", nargs="*", choices=list(TRAININGS), help="some of the networks")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    STAGES[arguments.stage](arguments)


def folder_of(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return arguments.out / (name if seed == 0 else f"{name}-seed{seed}")


def train_stage(arguments: argparse.Namespace) -> None:
    """Train what is not there yet, and note what it took."""
    for seed in arguments.seeds:
        for name in arguments.only or TRAININGS:
            train_one(name, seed, folder_of(arguments, name, seed))


def train_one(name: str, seed: int, folder: Path) -> None:
    training = TRAININGS[name]
    if (folder / "network").is_dir():
        print(f"{name}: there already")
        return
    loop = replace(training.loop, seed=seed)
    network: Any = training.network(seed)
    started, losses = time.process_time(), []
    for progress in train_moe(network, training, folder / "training", loop):
        losses.append(progress.loss)
        if progress.step % 100 == 0:
            recent = losses[-100:]
            print(f"{name} {progress.step}/{loop.steps} loss {sum(recent) / len(recent):.4f}", flush=True)
    network.save_pretrained(folder / "network")
    note = {"cpu_seconds": time.process_time() - started, "steps_here": len(losses), "loss": losses[-100:]}
    (folder / "training.json").write_text(json.dumps(note) + "\n")


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {"train": train_stage}

if __name__ == "__main__":
    sys.exit(main())
