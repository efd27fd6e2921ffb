"""Mediator attention on the digits generator (arXiv 2408.05710), and what it saves over the number of tokens.

python benchmarks/mediators.py --stage train    # two trainings, about 20 minutes on two CPU cores; resumes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flowaccel.training.zoo_mediators import TRAININGS, fresh_network, train_fresh
from flowaccel.training.zoo_moe import FRESH_LOOP

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=("train",))
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


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {"train": train_stage}

if __name__ == "__main__":
    main()
