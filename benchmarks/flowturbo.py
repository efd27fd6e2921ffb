"""FlowTurbo against Heun, Euler and AB2 on the digits model: quality, measured seconds, and what may be claimed from
them.

    python benchmarks/flowturbo.py                      # everything, about half an hour on two CPU cores; resumes
    python benchmarks/flowturbo.py --num-samples 200    # a quick look
    python benchmarks/flowturbo.py --stage compiled     # eager against compiled blocks only, a few minutes

The claim: a FlowTurbo row is matched with the *cheapest* Heun row that equals it (neither is worse than the other: the
upper end of either paired difference of the Frechet distance is at most 5% of the other row's value), and the time
saved is against that row. Writes results.json, claims.json, table.md and figures to --out, and the first three to
benchmarks/results/. The stage `compiled` draws no samples for quality: it times some rows eager and with
`compile_blocks`, all interleaved in one process, and writes compiled.json and compiled.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flowaccel import VelocityRefiner, zoo
from flowaccel.cli.common import progress
from flowaccel.evaluation import (
    Classes,
    Protocol,
    Timing,
    console_table,
    difference,
    environment,
    evaluate,
    load_features,
    load_reference,
    load_results,
    markdown_table,
    measure_latency,
    not_worse,
)
from flowaccel.evaluation.reporting.plots import pareto_png
from flowaccel.evaluation.runner import row_samples
from flowaccel.evaluation.samples.store import SampleStore
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, accelerate, preset

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

COMPILED = ("heun@4", "heun@5", "flowturbo-H1P1R1-single", "flowturbo-H1P2R1-single", "flowturbo-H2P4R2")
BATCH = 25
MODES_OF_CALL = ("eager", "compiled")

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
    parser.add_argument("--stage", choices=("quality", "compiled"), default="quality")
    parser.add_argument("--recipes", nargs="*", help="rows of the stage; by default those that the docs quote")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a call in the stage compiled")
    parser.add_argument("--backend", default="inductor", help="torch.compile's, in the stage compiled")
    parser.add_argument("--heun", type=int, nargs="*", default=HEUN)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/flowturbo"))
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    parser.add_argument("--claims-only", action="store_true", help="work on the results that --out holds already")
    arguments = parser.parse_args()
    if arguments.stage == "compiled":
        compiled_stage(arguments)
        return
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
    pipe = load_pipeline(pipeline_path(arguments.pipe))
    protocol = Protocol(
        conditions=Classes(tuple(range(10))),
        steps=arguments.steps,
        baseline_steps=tuple(arguments.heun),
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        metrics=("fid", "kid", "class_accuracy", "precision", "recall", "rel_l2"),
        rounds=arguments.rounds,
    )
    recipes = [with_refiner(preset(name), arguments.refiner) for name in arguments.recipes or RECIPES]
    with progress() as notify:
        return evaluate(pipe, recipes, protocol, arguments.out, notify)


def pipeline_path(name: str) -> Path | str:
    """The folder of a zoo name; any other name itself."""
    return zoo.folder(name) if name.startswith(zoo.PREFIX) else name


def record(run: Path) -> None:
    """Copy what the docs quote."""
    copy_results(run, {"results.json": "json", "claims.json": "claims.json", "table.md": "md"})
    results = load_results(run)
    shown = [row for row in results["rows"] if row["recipe"] in SHOWN]
    pareto_png({**results, "rows": shown}, Path("docs/images/flowturbo.png"), "fid")


def copy_results(run: Path, targets: dict[str, str]) -> None:
    """Copy files of a run to the recorded results, under their suffixes there."""
    RESULTS.mkdir(exist_ok=True)
    for name, suffix in targets.items():
        shutil.copyfile(run / name, RESULTS / f"flowturbo_sit-digits_cpu.{suffix}")


def compiled_stage(arguments: argparse.Namespace) -> None:
    """Time eager and compiled rows and write compiled.json and compiled.md."""
    # Otherwise compilation would be timed with the kernels of an earlier run at hand.
    torch._inductor.config.force_disable_caches = True
    calls = {
        f"{name}/{mode}": image_call(arguments, name, compiled=mode == "compiled")
        for name in arguments.recipes or COMPILED
        for mode in MODES_OF_CALL
    }
    first = {name: first_call_s(call) for name, call in calls.items()}
    images = {name: call() for name, call in calls.items()}
    timings = measure_latency(calls, rounds=arguments.rounds, device="cpu")
    rows = [compiled_row(name, timings, images, first, arguments) for name in arguments.recipes or COMPILED]
    found = {
        "protocol": {name: getattr(arguments, name) for name in ("pipe", "batch", "rounds", "seed", "backend")},
        "environment": environment("cpu"),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compiled.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "compiled.md").write_text(compiled_table(rows) + "\n")
    print(compiled_table(rows))
    if arguments.record:
        copy_results(arguments.out, {"compiled.json": "compiled.json", "compiled.md": "compiled.md"})


def image_call(arguments: argparse.Namespace, name: str, *, compiled: bool) -> Callable[[], torch.Tensor]:
    """A call that samples one batch with a recipe, always the same images, on a pipeline of its own."""
    pipe = load_pipeline(pipeline_path(arguments.pipe))
    pipe.set_progress_bar_config(disable=True)
    recipe = with_refiner(preset(name), arguments.refiner)
    accelerate(pipe, recipe)
    if compiled:
        pipe.compile_blocks(arguments.backend)
    labels = [i % 10 for i in range(arguments.batch)]

    def call() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(arguments.seed + i) for i in range(arguments.batch)]
        options = {"num_inference_steps": recipe.num_inference_steps, "output_type": "pt"}
        return pipe(labels, generator=generators, **options).images

    return call


def first_call_s(call: Callable[[], object]) -> float:
    """Seconds of a call that finds nothing compiled."""
    torch._dynamo.reset()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compiled_row(
    name: str, timings: dict[str, Timing], images: dict[str, Any], first: dict[str, float], arguments: Any
) -> dict[str, Any]:
    """One recipe, eager and compiled, and the time it saves against every Heun row in the same mode."""
    eager, compiled = (timings[f"{name}/{mode}"] for mode in MODES_OF_CALL)
    speedup = eager.ratio_to(compiled)
    difference = (images[f"{name}/eager"] - images[f"{name}/compiled"]).abs().max()
    heun = [other.removesuffix("/eager") for other in timings if other.startswith("heun@") and other.endswith("/eager")]
    return {
        "recipe": name,
        **{
            f"{mode}_ms_per_image": [1000 * seconds / arguments.batch for seconds in timing.seconds]
            for mode, timing in zip(MODES_OF_CALL, (eager, compiled), strict=True)
        },
        **{f"{mode}_first_call_s": first[f"{name}/{mode}"] for mode in MODES_OF_CALL},
        "throttled": eager.throttled or compiled.throttled,
        "speedup": speedup.value,
        "speedup_ci95": speedup.ci95,
        "max_abs_difference": float(difference),
        "time_saved": {
            other: {mode: saved(timings[f"{name}/{mode}"], timings[f"{other}/{mode}"]) for mode in MODES_OF_CALL}
            for other in heun
            if other != name
        },
    }


def saved(timing: Timing, other: Timing) -> dict[str, Any]:
    """The share of `other`'s time that is saved."""
    ratio = timing.ratio_to(other)
    return {"value": 1 - ratio.value, "ci95": sorted(1 - end for end in ratio.ci95)}


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """The stage's rows as Markdown."""
    heun = sorted({other for row in rows for other in row["time_saved"]})
    columns = [
        "row",
        "eager ms/image",
        "compiled ms/image",
        "speed-up",
        "first call, eager s",
        "first call, compiled s",
    ]
    columns += ["largest difference of a pixel", *(f"less time than {other}, eager / compiled" for other in heun)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        low, high = row["speedup_ci95"]
        cells = [row["recipe"] + (", machine slowed down" if row["throttled"] else "")]
        cells += [f"{float(torch.tensor(row[f'{mode}_ms_per_image']).median()):.2f}" for mode in MODES_OF_CALL]
        cells += [f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"]
        cells += [f"{row[f'{mode}_first_call_s']:.1f}" for mode in MODES_OF_CALL]
        cells += [f"{row['max_abs_difference']:.1e}"]
        for other in heun:
            entry = row["time_saved"].get(other)
            cells.append(" / ".join(f"{100 * entry[mode]['value']:.0f}%" for mode in MODES_OF_CALL) if entry else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
