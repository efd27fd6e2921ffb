"""Training what is not there yet, for the other scripts."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowaccel.training.loop import Progress

Started = Callable[[str, int, Path], tuple[Any, int, Iterator[Progress]]]
"""`start(name, seed, folder)`: the network, its steps, and what trains it, with its state in the folder."""


def folder_of(arguments: argparse.Namespace, name: str, seed: int = 0) -> Path:
    return arguments.out / (name if seed == 0 else f"{name}-seed{seed}")


def train_missing(arguments: argparse.Namespace, start: Started) -> None:
    """Train what `--only` and `--seeds` ask for and is not there, and note what it took."""
    for seed in arguments.seeds:
        for name in arguments.only:
            folder = folder_of(arguments, name, seed)
            if not (folder / "network").is_dir():
                train_one(name, folder, *start(name, seed, folder / "training"))


def train_one(name: str, folder: Path, network: Any, steps: int, states: Iterator[Progress]) -> None:
    started, losses = time.process_time(), []
    for state in states:
        losses.append(state.loss)
        if state.step % 100 == 0:
            recent = losses[-100:]
            print(f"{name} {state.step}/{steps} loss {sum(recent) / len(recent):.4f}", flush=True)
    network.save_pretrained(folder / "network")
    note = {"cpu_seconds": time.process_time() - started, "steps": len(losses), "last_losses": losses[-100:]}
    (folder / "training.json").write_text(json.dumps(note) + "\n")
