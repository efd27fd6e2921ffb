"""Searched step grids (BOSS, OSS) against the pipeline's own grid of as many steps.

    python benchmarks/grids.py --record                         # zoo:sit-digits, some minutes
    python benchmarks/grids.py --pipe FOLDER --prompts FILE     # a text-to-image pipeline; errors only

Grids are searched in the fine runs of a few samples, and measured on others: other seeds, and for prompts the ones that
follow. The error of an image is its relative L2 distance to the same image of the fine run. For classes, the accuracy
is what a classifier of digits says of the images. Errors are compared in pairs, with 95% intervals of the mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaccel import FlowRungeKuttaScheduler, Recipe, accelerated, zoo
from flowaccel.cli.common import progress
from flowaccel.evaluation import Classes, Conditions, Prompts, environment, load_features
from flowaccel.evaluation.metrics.pixel_metrics import rel_l2
from flowaccel.methods.grids.fit import search_grids, with_grid
from flowaccel.methods.grids.search import GRID_METHODS, METRICS
from flowaccel.pipelines import load_pipeline
from flowaccel.training.sampling import Sampling

RESULTS = Path(__file__).parent / "results"
FEATURES = "zoo:digits-features"


def main() -> None:
    """Search, measure, print, and with --record write benchmarks/results/grids_MODEL_DEVICE.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipe", default="zoo:sit-digits")
    parser.add_argument("--prompts", type=Path, help="a UTF-8 text file with one prompt a line")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 6, 8])
    parser.add_argument("--fine-steps", type=int, default=60)
    parser.add_argument("--search-samples", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=100, help="held out, per row")
    parser.add_argument("--metric", choices=METRICS, default="state")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    pipe = opened(arguments.pipe, arguments.device)
    search = Sampling(
        conditions=Prompts.from_file(arguments.prompts) if arguments.prompts else Classes(tuple(range(10))),
        steps=arguments.fine_steps,
        num_samples=arguments.search_samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        arguments={} if arguments.guidance_scale is None else {"guidance_scale": arguments.guidance_scale},
    )
    with progress() as notify:
        grids = {
            method: search_grids(
                pipe,
                method,
                max(arguments.steps),
                search,
                metric=arguments.metric,
                notify=lambda stage, done, total, method=method: notify(f"{method} {stage}", done, total),  # type: ignore[misc]
            )
            for method in GRID_METHODS
        }
        held = replace(search, first=search.num_samples, num_samples=arguments.num_samples)
        rows = list(measured(pipe, held, grids, arguments.steps, notify))
    found = {
        "protocol": {
            "model": arguments.pipe,
            "conditions": search.conditions.name,
            "fine_steps": search.steps,
            "search_samples": search.num_samples,
            "held_out_samples": held.num_samples,
            "metric": arguments.metric,
            "guidance_scale": search.guidance_scale(pipe),
            "seed": search.seed,
            "classifier": FEATURES if search.conditions.labels([0]) is not None else None,
        },
        "environment": environment(pipe.device),
        "rows": rows,
    }
    print(table(rows))
    if arguments.record:
        name = f"grids_{arguments.pipe.removeprefix(zoo.PREFIX).rstrip('/').rpartition('/')[2]}_{pipe.device.type}"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(table(rows) + "\n")


def opened(name: str, device: str) -> Any:
    """The pipeline; one of our Runge-Kutta samplers becomes Euler's, which is what grids are searched for."""
    pipe = load_pipeline(zoo.folder(name) if name.startswith(zoo.PREFIX) else name, device=device)
    if isinstance(pipe.scheduler, FlowRungeKuttaScheduler):
        pipe.scheduler = FlowRungeKuttaScheduler.from_config(pipe.scheduler.config, solver="euler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measured(pipe: Any, held: Sampling, grids: Any, counts: list[int], notify: Any) -> Iterator[dict[str, Any]]:
    """A row for the fine run, and three for every number of steps."""
    fine = sampled(pipe, Recipe(), held, notify, "fine")
    yield {"steps": held.steps, "grid": "fine", **accuracy(held.conditions, fine, held.first)}
    for count in counts:
        short = replace(held, steps=count)
        images = {"default": sampled(pipe, Recipe(), short, notify, f"default {count}")}
        for method, found in grids.items():
            recipe = with_grid(Recipe(), found[count - 1])
            images[method] = sampled(pipe, recipe, short, notify, f"{method} {count}")
        errors = {name: rel_l2(made, fine) for name, made in images.items()}
        for name, made in images.items():
            row = {"steps": count, "grid": name, "rel_l2": interval(errors[name])}
            if name != "default":
                row |= {"levels": grids[name][count - 1], "difference": interval(errors[name] - errors["default"])}
            yield row | accuracy(held.conditions, made, held.first)


def sampled(pipe: Any, recipe: Recipe, sampling: Sampling, notify: Any, stage: str) -> Tensor:
    """uint8 (N, C, H, W)."""
    with accelerated(pipe, recipe):
        return torch.cat(list(sampling.run(pipe, notify, stage)))


def accuracy(conditions: Conditions, images: Tensor, first: int) -> dict[str, Any]:
    """Share of images that show the class asked for; nothing where prompts were asked for."""
    labels = conditions.labels(range(first, first + len(images)))
    if labels is None:
        return {}
    network = load_features(FEATURES)
    assert network.classify is not None
    return {"class_accuracy": interval((network.classify(network(images)) == labels).double())}


def interval(values: Tensor) -> dict[str, Any]:
    """Mean of (N,) values, and 1.96 standard errors to either side."""
    mean, margin = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return {"value": mean, "n": len(values), "ci95": [mean - margin, mean + margin]}


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    columns = ("steps", "grid", "relative L2 error to the fine run", "searched less default, 95%", "class accuracy")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        error, difference, share = (row.get(name) for name in ("rel_l2", "difference", "class_accuracy"))
        cells = (
            str(row["steps"]),
            row["grid"],
            f"{error['value']:.4f}" if error else "",
            "{:+.4f} to {:+.4f}".format(*difference["ci95"]) if difference else "",
            f"{share['value']:.3f}" if share else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
