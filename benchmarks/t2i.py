"""Everything compared on a stock text-to-image pipeline: steps, searched grids, guidance, FlowTurbo, caches, and pairs.

    python benchmarks/t2i.py --record                  # zoo:t2i-shapes, about half an hour on two CPU cores; resumes
    python benchmarks/t2i.py --num-samples 100         # a quick look
    python benchmarks/t2i.py --stage judges --half build/t2i-shapes/training/state-1650.safetensors --record

The stage `table` evaluates all rows on captions whose combinations of colour and shape were trained (quality and
interleaved timing), and a part of them (`HELD_OUT_TOO`) on captions with combinations that no training picture has
(quality). The grids are searched
on captions and seeds that neither evaluation uses. `chosen` names the fastest row that is not worse than the untouched
pipeline in every quality metric, seen and held out: the upper end of the paired interval is at most 5% of the untouched
value. Every row is also compared with the same pipeline with fewer steps, at the largest number of steps that takes no
less time.

The stage `judges` asks whether the metrics measure anything: the same pictures with their captions, with those of
other pictures, pictures of a half-trained generator, and drawn ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaccel import Recipe, Sampler, zoo
from flowaccel.cli.common import progress
from flowaccel.cli.evaluate import default_protocol
from flowaccel.data import shape_captions, shapes
from flowaccel.evaluation import (
    Prompts,
    Protocol,
    environment,
    evaluate,
    load_features,
    load_reference,
    load_results,
    measure,
)
from flowaccel.evaluation.features.extractors import quantise
from flowaccel.evaluation.metrics.attribute_accuracy import load_attributes
from flowaccel.evaluation.metrics.clip_score import load_clip
from flowaccel.evaluation.metrics.table import not_worse
from flowaccel.evaluation.protocol import call, plan_rows, row_store
from flowaccel.evaluation.reporting.plots import pareto_png, sample_grid
from flowaccel.evaluation.runner import judged
from flowaccel.evaluation.samples.store import SampleStore, folder_name
from flowaccel.methods.grids.fit import search_grids, with_grid
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import resolve
from flowaccel.recipe.resolution import joined
from flowaccel.training.loop import load_average
from flowaccel.training.sampling import Sampling
from flowaccel.training.text_to_image import TextToImage

MODEL = "zoo:t2i-shapes"
HELD_OUT = "zoo:shapes-held-out"
RESULTS = Path(__file__).parent / "results"
STEPS = 28
FEWER = (5, 6, 8, 10, 14)
GRID_STEPS = (6, 8, 10)
RECIPES = {
    "solver, time shift": ("ab2@6", "ab2@8", "ab2@10", "shift 3@6", "shift 3@8"),
    "searched grids": ("boss@6", "boss@8", "boss@10", "oss@6", "oss@8"),
    "guidance": (
        "guidance_skip",
        "guidance_skip:mode=hold",
        "guidance_interval:stop=0.5",
        "guidance_interval:stop=0.5,mode=hold",
    ),
    "FlowTurbo": ("flowturbo-H1P3R2-single", "flowturbo-H1P4R1-single", "flowturbo-H1P6R1-single", "flowturbo-H1P5"),
    "caches": (
        "fbcache",
        "easycache:threshold=0.1,warmup=3",
        "taylorseer:interval=3",
        "ab_cache:interval=3,order=2",
        "ab_cache:interval=4",
        "balanced",
        "fast",
    ),
    "pairs": (
        "ab_cache:interval=3,order=2+guidance_skip",
        "taylorseer:interval=3+guidance_interval:stop=0.75",
        "ab2@8+guidance_interval:stop=0.5",
        "boss@8+guidance_interval:stop=0.5",
        "ab2 on boss@8",
        "flowturbo-H1P4R1-single+guidance_interval:stop=0.5",
    ),
}
HELD_OUT_TOO = (
    "ab2@8",
    "shift 3@6",
    "shift 3@8",
    "boss@6",
    "boss@8",
    "oss@6",
    "guidance_skip",
    "flowturbo-H1P4R1-single",
    "taylorseer:interval=3",
    "balanced",
    "fast",
)
SHOWN = ("baseline@8", "ab2@8", "flowturbo-H1P4R1-single", "guidance_skip", "balanced")
QUALITY = ("fid", "clip_score", "attribute_accuracy")
METRICS = (*QUALITY, "rel_l2")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("table", "judges"), default="table")
    parser.add_argument("--num-samples", type=int, default=300, help="seen; a third as many held out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", type=Path, help="stage judges: state of the half-trained generator")
    parser.add_argument("--out", type=Path, default=Path("runs/t2i"))
    parser.add_argument("--keep", action="store_true", help="do not measure again what the run folder has results of")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    arguments = parser.parse_args()
    pipe = load_pipeline(zoo.folder(MODEL))
    pipe.set_progress_bar_config(disable=True)
    {"table": table_stage, "judges": judges_stage}[arguments.stage](pipe, arguments)


# -- the table


def table_stage(pipe: Any, arguments: argparse.Namespace) -> None:
    """Evaluate all rows on both sets of captions; write results, comparisons and the table."""
    grids = found_grids(pipe, arguments.out / "grids.json")
    recipes = [recipe_of(name, grids) for names in RECIPES.values() for name in names]
    seen = protocol_of(pipe, arguments)
    held_out = replace(
        seen,
        conditions=Prompts.from_zoo(HELD_OUT),
        reference=HELD_OUT,
        num_samples=max(arguments.num_samples // 3, 2),
    )
    folders = {"seen": arguments.out / "seen", "held_out": arguments.out / "held_out"}
    results: dict[str, Any] = {}
    some = [recipe for recipe in recipes if recipe.name in HELD_OUT_TOO]
    if arguments.keep and (folders["seen"] / "results.json").is_file():
        results["seen"] = load_results(folders["seen"])
    else:
        with progress() as notify:
            results["seen"] = evaluate(pipe, recipes, seen, folders["seen"], notify)
    results["held_out"] = quality(pipe, some, held_out, folders["held_out"])
    claims = compared(results)
    table = markdown(results, claims)
    print(table)
    (arguments.out / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table)
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        files = {"seen/results.json": "json", "held_out/results.json": "held_out.json", "claims.json": "claims.json"}
        for name, suffix in (files | {"table.md": "md", "grids.json": "grids.json"}).items():
            shutil.copyfile(arguments.out / name, RESULTS / f"t2i-shapes_cpu.{suffix}")
        shown = {**results["seen"], "rows": [in_group(row) for row in results["seen"]["rows"]]}
        pareto_png(shown, Path("docs/images/t2i.png"), "rel_l2")
        picture(seen, folders["seen"], claims["chosen"])


def quality(pipe: Any, recipes: list[Recipe], protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Metrics without times of the untouched pipeline, fewer steps and recipes; samples in the folder are used."""
    network, clip, attributes = judges_of(protocol)
    ids = range(protocol.num_samples)
    samples = []
    for row in plan_rows(recipes, protocol):
        store = row_store(folder, row)
        with row.switched_on(pipe):
            images = store.read(ids) if store.folder.is_dir() else sampled(pipe, protocol, row.steps)
        samples.append(judged(images, row.name, ids, protocol.conditions, network, clip, attributes))
    reference = load_reference(protocol.reference, network)
    found = measure(samples, reference, METRICS, features_name=network.name, seed=protocol.seed)
    rows = [{"recipe": name, "metrics": metrics} for name, metrics in found.items()]
    folder.mkdir(parents=True, exist_ok=True)
    results = {"protocol": {"dataset": protocol.conditions.name, "num_samples": len(ids)}, "rows": rows}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def protocol_of(pipe: Any, arguments: argparse.Namespace) -> Protocol:
    """What the zoo says, at our numbers."""
    return default_protocol(
        MODEL,
        pipe,
        steps=STEPS,
        baseline_steps=FEWER,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        metrics=METRICS,
        rounds=arguments.rounds,
        latency_batch=10,
        batch_size=50,
    )


def found_grids(pipe: Any, file: Path) -> dict[str, list[float]]:
    """The searched grids by name (`boss@8`), from the file if it is there."""
    if file.is_file():
        found: dict[str, list[float]] = json.loads(file.read_text())
        return found
    about = zoo.entry(MODEL)
    sampling = Sampling(
        conditions=Prompts(shape_captions("generator", 20)),
        steps=56,
        num_samples=20,
        seed=1,
        batch_size=20,
        arguments={**about.arguments, "guidance_scale": about.guidance_scale},
    )
    with progress() as notify:
        grids = {
            f"{method}@{steps}": list(found[steps - 1])
            for method in ("boss", "oss")
            for found in [search_grids(pipe, method, max(GRID_STEPS), sampling, notify=notify)]
            for steps in GRID_STEPS
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(grids, indent=1) + "\n")
    return grids


def recipe_of(name: str, grids: dict[str, list[float]]) -> Recipe:
    """A row by its name: a preset, a grid, AB2 on a grid, or a grid with something joined to it."""
    if name.startswith("shift "):
        return replace(resolve(name.replace("shift ", "euler:shift=")), name=name)
    if name.startswith("ab2 on "):
        return Recipe([Sampler("ab2", {"grid": grids[name.removeprefix("ab2 on ")]})], name=name)
    stem, plus, rest = name.partition("+")
    if stem not in grids:
        return resolve(name)
    recipe = with_grid(Recipe(), grids[stem])
    return joined(name, [recipe, resolve(rest)] if plus else [recipe])


def picture(protocol: Protocol, folder: Path, chosen: str | None) -> None:
    """The first samples of a few rows, for the docs."""
    ids = range(10)
    names = ["baseline", *SHOWN, *([chosen] if chosen and chosen not in SHOWN else [])]
    images = {name: SampleStore(folder / "rows" / folder_name(name)).read(ids) for name in names}
    sample_grid(images, Path("docs/images/t2i_samples.png"), captions=protocol.conditions.texts(ids) or ())


def group_of(name: str) -> str:
    """The heading that a row stands under."""
    if name.startswith("baseline"):
        return "baseline"
    return next(group for group, names in RECIPES.items() if name in names)


def in_group(row: Any) -> Any:
    """The row under the colour of its group."""
    return {**row, "family": group_of(row["recipe"])}


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """Every row against the untouched pipeline, and against fewer steps of no less time; and the row chosen."""
    parts = {part: {row["recipe"]: row for row in found["rows"]} for part, found in results.items()}
    rows = parts["seen"]
    fewer = [name for name in rows if name.startswith("baseline@")]
    claims: dict[str, Any] = {}
    for name in [name for name in rows if name != "baseline"]:
        entry: dict[str, Any] = {
            part: {metric: paired(found, name, "baseline", metric) for metric in QUALITY}
            for part, found in parts.items()
            if name in found
        }
        slower = [other for other in fewer if other != name and speed(rows[other]) <= speed(rows[name])]
        if name not in fewer and slower:
            rival = max(slower, key=lambda other: speed(rows[other]))
            entry["fewer_steps"] = {"row": rival} | {metric: paired(rows, name, rival, metric) for metric in METRICS}
        entry["not_worse"] = all(
            entry[part][metric]["not_worse"] for part in parts if part in entry for metric in QUALITY
        )
        claims[name] = entry
    good = [name for name, entry in claims.items() if entry["not_worse"] and "held_out" in entry]
    return {"chosen": max(good, key=lambda name: speed(rows[name]), default=None), "rows": claims}


def paired(rows: dict[str, Any], name: str, other: str, metric: str) -> dict[str, Any]:
    """The paired difference of a metric between two rows, and whether the first is not worse."""
    found = rows[name]["metrics"][metric]
    difference = found["versus"][other]
    value = rows[other]["metrics"][metric]["value"]
    return {**difference, "not_worse": not_worse(difference["ci95"], value, found["higher_is_better"])}


def speed(row: Any) -> float:
    """How many times as fast as the untouched pipeline."""
    return float(row["speedup"]["wall_clock"]["value"])


def markdown(results: dict[str, Any], claims: dict[str, Any]) -> str:
    """The table; differences are to the untouched pipeline, with 95% intervals."""
    held = {row["recipe"]: row for row in results["held_out"]["rows"]}
    columns = ("row", "speed-up", "ms/image", "Frechet", "CLIP score", "attributes", "held out", "rel. L2", "not worse")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    heading = ""
    for row in results["seen"]["rows"]:
        name = row["recipe"]
        if group_of(name) != heading:
            heading = group_of(name)
            lines.append(f"| **{heading}** |" + " |" * (len(columns) - 1))
        low, high = row["speedup"]["wall_clock"]["ci95"]
        cells = [
            f"{name}{' (chosen)' if name == claims['chosen'] else ''}",
            f"{speed(row):.2f}x [{low:.2f}, {high:.2f}]",
            f"{row['latency_ms_per_image']['median']:.1f}",
            with_difference(row, "fid", "{:.3f}"),
            with_difference(row, "clip_score", "{:.2f}"),
            with_difference(row, "attribute_accuracy", "{:.3f}"),
            with_difference(held[name], "attribute_accuracy", "{:.3f}") if name in held else "",
            f"{row['metrics']['rel_l2']['value']:.4f}" if "rel_l2" in row["metrics"] else "",
            {True: "yes", False: "no", None: ""}[claims["rows"].get(name, {}).get("not_worse")],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_difference(row: Any, metric: str, form: str) -> str:
    """`0.93 (-0.01 [-0.02, +0.01])`."""
    found = row["metrics"][metric]
    text = form.format(found["value"])
    if "baseline" not in found["versus"]:
        return text
    other = found["versus"]["baseline"]
    signed = form.replace("{:", "{:+")
    low, high = (signed.format(value) for value in other["ci95"])
    return f"{text} ({signed.format(other['difference'])} [{low}, {high}])"


# -- do the metrics measure anything?


def judges_stage(pipe: Any, arguments: argparse.Namespace) -> None:
    """CLIP score, attribute accuracy and Frechet distance of pictures that are right, and of such that are not."""
    protocol = protocol_of(pipe, arguments)
    captions = protocol.conditions.texts(range(arguments.num_samples))
    assert captions is not None
    drawn = shapes("reference", arguments.num_samples)
    made = sampled(pipe, protocol)
    rows = {"generated": (made, captions), "generated, captions of others": (made, (*captions[1:], captions[0]))}
    rows["drawn"] = (quantise(drawn), drawn.captions)
    if arguments.half is not None:
        parts = TextToImage(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2).requires_grad_(True)
        load_average(parts, arguments.half)
        rows["half-trained"] = (sampled(pipe, protocol), captions)
    network, clip, attributes = judges_of(protocol)
    ids = range(arguments.num_samples)
    samples = [
        judged(images, name, ids, Prompts(tuple(texts)), network, clip, attributes)
        for name, (images, texts) in rows.items()
    ]
    found = {
        "protocol": {"samples": arguments.num_samples, "steps": STEPS, "seed": arguments.seed},
        "environment": environment("cpu"),
        "rows": measure(samples, load_reference(protocol.reference, network), QUALITY, features_name=network.name),
    }
    print(json.dumps(found["rows"], indent=1))
    if arguments.record:
        (RESULTS / "t2i_judges_cpu.json").write_text(json.dumps(found, indent=1) + "\n")


def judges_of(protocol: Protocol) -> tuple[Any, Any, Any]:
    """The feature network, the CLIP network and the set of attributes."""
    network = load_features(protocol.features)
    return network, load_clip(protocol.clip, network), load_attributes(protocol.attributes, network)


def sampled(pipe: Any, protocol: Protocol, steps: int = STEPS) -> Tensor:
    """uint8 (N, 3, 32, 32), of the pipeline as it is."""
    ids = torch.arange(protocol.num_samples).split(protocol.batch_size)
    return torch.cat([call(pipe, protocol, part.tolist(), steps) for part in ids])


if __name__ == "__main__":
    main()
