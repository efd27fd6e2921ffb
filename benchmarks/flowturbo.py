"""FlowTurbo against Heun, Euler and AB2 on the digits model: quality, measured seconds, and what may be claimed from
them.

    python benchmarks/flowturbo.py                      # everything, about half an hour on two CPU cores; resumes
    python benchmarks/flowturbo.py --num-samples 200    # a quick look

The claim: a FlowTurbo row is matched with the *cheapest* Heun row that equals it (neither is worse than the other: the
upper end of either paired difference of the Frechet distance is at most 5% of the other row's value), and the time
saved is against that row. Writes results.json, claims.json, table.md and figures to --out, and the first three to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from flowaccel import zoo
from flowaccel.evaluation import (
    Classes,
    Protocol,
    Timing,
    console_table,
    difference,
    evaluate,
    load_features,
    load_reference,
    load_results,
    markdown_table,
    not_worse,
)
from flowaccel.evaluation.figures import pareto_png
from flowaccel.evaluation.runner import row_samples
from flowaccel.evaluation.store import SampleStore
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, VelocityRefiner, preset

RESULTS = Path(__file__).parent / "results"
STEPS = 20
HEUN = (1, 2, 3, 4, 5)
MODES = ("", "-consistent", "-single")
RECIPES = (
    *(f"euler@{n}" for n in (2, 3, 4, 6)),
    *(f"ab2@{n}" for n in (2, 3, 4, 5)),
    *(f"flowturbo-{blocks}" for blocks in ("H1P1", "H1P2", "H1P3")),
    *(f"flowturbo-H1P1R1{mode}" for mode in MODES),
    *(f"flowturbo-H1P2R1{mode}" for mode in MODES),
    "flowturbo-H1R1-consistent",
    "flowturbo-H2P4R2",
)

# The rows of the picture in the docs; all of them would hide each other's names.
SHOWN = {
    *("baseline", "baseline@2", "baseline@3", "baseline@4", "baseline@5"),
    *("euler@2", "euler@3", "euler@4", "euler@6", "ab2@2", "ab2@3", "ab2@4"),
    *("flowturbo-H1P1R1-single", "flowturbo-H1P2R1-single"),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipe", default="zoo:sit-digits")
    parser.add_argument("--refiner", type=Path, help="another refiner than the pipeline's own")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--heun", type=int, nargs="*", default=HEUN)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/flowturbo"))
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    parser.add_argument("--claims-only", action="store_true", help="work on the results that --out holds already")
    arguments = parser.parse_args()
    results = load_results(arguments.out) if arguments.claims_only else measure(arguments)
    found = claims(arguments.out, results)
    (arguments.out / "claims.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "table.md").write_text(markdown_table(results) + "\n" + claims_table(found) + "\n")
    Console(width=150).print(console_table(results))
    print(claims_table(found))
    if arguments.record:
        record(arguments.out)


def measure(arguments: argparse.Namespace) -> Any:
    """The results of all rows."""
    path = zoo.folder(arguments.pipe) if arguments.pipe.startswith(zoo.PREFIX) else arguments.pipe
    pipe = load_pipeline(path)
    protocol = Protocol(
        conditions=Classes(tuple(range(10))),
        steps=arguments.steps,
        baseline_steps=tuple(arguments.heun),
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        metrics=("fid", "kid", "class_accuracy", "precision", "recall", "rel_l2"),
        rounds=arguments.rounds,
    )
    recipes = [with_refiner(preset(name), arguments.refiner) for name in arguments.recipes]
    with Progress() as bar:
        tasks: dict[str, Any] = {}

        def notify(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        return evaluate(pipe, recipes, protocol, arguments.out, notify)


def record(run: Path) -> None:
    """Copy what the docs quote."""
    RESULTS.mkdir(exist_ok=True)
    targets = {"results.json": "json", "claims.json": "claims.json", "table.md": "md"}
    for name, suffix in targets.items():
        shutil.copyfile(run / name, RESULTS / f"flowturbo_sit-digits_cpu.{suffix}")
    results = load_results(run)
    shown = [row for row in results["rows"] if row["recipe"] in SHOWN]
    pareto_png({**results, "rows": shown}, Path("docs/images/flowturbo.png"), "fid")


def with_refiner(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe with its refiner taken from `folder`, if one is given."""
    if folder is None:
        return recipe
    parts = [VelocityRefiner(folder) if isinstance(part, VelocityRefiner) else part for part in recipe.accelerators]
    return Recipe(parts, recipe.name, recipe.num_inference_steps)


def claims(run: Path, results: Any) -> list[dict[str, Any]]:
    """For every row that is not Heun: the cheapest Heun row that equals it, and the time saved against it."""
    network = load_features(results["protocol"]["feature_extractor"])
    reference = load_reference(results["protocol"]["reference"], network)
    ids = range(results["protocol"]["num_samples"])
    conditions = Classes(tuple(results["protocol"]["conditions"]["classes"]))
    samples = {
        row["recipe"]: row_samples(SampleStore(run / "rows" / row["recipe"]), row["recipe"], ids, conditions, network)
        for row in results["rows"]
    }

    def compare(row: Any, other: Any) -> dict[str, Any]:
        pair = samples[row["recipe"]], samples[other["recipe"]]
        return difference(*pair, "fid", reference, seed=results["protocol"]["seed"])

    heun = sorted((row for row in results["rows"] if row["family"] == "baseline"), key=lambda row: row["nfe"])
    return [claim(row, heun, compare) for row in results["rows"] if row["family"] != "baseline"]


def claim(row: Any, heun: list[Any], compare: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    """One row against every Heun row, and which of these is its match."""
    value = row["metrics"]["fid"]["value"]
    against = []
    for other in heun:
        found = compare(row, other)
        backwards = [-end for end in reversed(found["ci95"])]
        ratio = timing(row).ratio_to(timing(other))
        against.append(
            {
                "heun": other["recipe"],
                "nfe": other["nfe"],
                "fid": other["metrics"]["fid"]["value"],
                "difference": found["difference"],
                "difference_ci95": found["ci95"],
                "not_worse": found["not_worse"],
                "heun_not_worse": not_worse(backwards, value, higher_is_better=False),
                "time_saved": 1 - ratio.value,
                "time_saved_ci95": sorted(1 - end for end in ratio.ci95),
            }
        )
    equal = [entry for entry in against if entry["not_worse"] and entry["heun_not_worse"]]
    match = equal[0] if equal else None
    return {"recipe": row["recipe"], "nfe": row["nfe"], "fid": value, "match": match, "against": against}


def timing(row: Any) -> Timing:
    """The seconds of a row, round by round."""
    return Timing(seconds=tuple(row["latency_ms_per_image"]["per_round"]), first_call_s=row["first_call_s"])


def claims_table(found: list[dict[str, Any]]) -> str:
    """The claims as Markdown."""
    lines = [
        "| row | evaluations | Frechet distance | equal Heun row | its evaluations | paired difference | time saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in found:
        head = f"| {entry['recipe']} | {entry['nfe']:g} | {entry['fid']:.3f} |"
        match = entry["match"]
        if match is None:
            lines.append(f"{head} none | | | |")
            continue
        low, high = match["difference_ci95"]
        saved = [100 * value for value in (match["time_saved"], *match["time_saved_ci95"])]
        lines.append(
            f"{head} {match['heun']} ({match['fid']:.3f}) | {match['nfe']:g} | "
            f"{match['difference']:+.3f} [{low:+.3f}, {high:+.3f}] | {saved[0]:.0f}% [{saved[1]:.0f}, {saved[2]:.0f}] |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
