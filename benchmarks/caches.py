"""Feature caches against each other, against diffusers' own and cache-dit's, and against fewer steps.

    python benchmarks/caches.py                    # quality and seconds on zoo:sit-digits, about 20 minutes; resumes
    python benchmarks/caches.py --num-samples 100  # a quick look
    python benchmarks/caches.py --stage overhead   # what the hooks, a reused call and gathering cost, three minutes

The stage `quality` evaluates one Euler pipeline under one protocol: untouched, with fewer steps, with other solvers,
with our presets, with diffusers' hooks and (if installed) cache-dit. `versus_peers` then asks, for every peer that is
1.5 to 3 times as fast as the untouched pipeline: has the best of our rows that takes at most as much time a paired
error (relative L2 to the untouched image, same sample ids) that is no worse?

The stage `overhead` times a SiT of 12 blocks with random weights. The time inside the hooks is read from clocks on both
sides of every wrapper; what the first block costs is read from a pipeline that has no other.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

import flowaccel
from flowaccel import FeatureCache, FlowRungeKuttaScheduler, SiTPipeline, SiTTransformer2DModel, zoo
from flowaccel.caching.gates import Gate
from flowaccel.caching.level_cache import LEVELS
from flowaccel.caching.predictors import Hold
from flowaccel.cli.common import progress
from flowaccel.evaluation import (
    Classes,
    Protocol,
    compare_rows,
    console_table,
    environment,
    evaluate,
    markdown_table,
    measure_latency,
)
from flowaccel.evaluation.reporting.plots import pareto_png
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import preset

RESULTS = Path(__file__).parent / "results"
STEPS = 30
FEWER = (10, 12, 15, 20)
SOLVERS = ("ab2@10", "ab2@12", "ab2@15", "heun@5")
PRESETS = (
    "fbcache",
    "fbcache:threshold=0.1",
    "fbcache:threshold=0.1,decide=batch",
    "dbcache:blocks=2,warmup=3",
    "teacache",
    "magcache",
    "easycache",
    "easycache:threshold=0.1,warmup=3",
    "taylorseer:interval=3",
    "taylorseer:parity,interval=3",
    "adacache",
    "ab_cache",
    "ab_cache:interval=3,order=2",
    "ab_cache:interval=4",
    "adaptive_diffusion",
    "mask",
    "safe",
    "balanced",
    "fast",
)
PEERS = (
    "native:fbc:threshold=0.05",
    "native:fbc:threshold=0.1",
    "native:taylorseer:cache_interval=3,disable_cache_before_step=3",
    "native:mag",
    "native:mag:threshold=0.2",
)
CACHE_DIT = (
    "cache-dit:Fn_compute_blocks=1,Bn_compute_blocks=0,max_warmup_steps=3,residual_diff_threshold=0.08",
    "cache-dit:Fn_compute_blocks=1,Bn_compute_blocks=0,max_warmup_steps=3,residual_diff_threshold=0.08,"
    "taylorseer_order=1",
)
SPEEDUPS = (1.5, 3.0)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("quality", "overhead"), default="quality")
    parser.add_argument("--num-samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pipe", default="zoo:sit-digits")
    parser.add_argument("--recipes", nargs="*", default=[*SOLVERS, *PRESETS])
    parser.add_argument("--baselines", nargs="*", help="by default diffusers' caches, and cache-dit's if installed")
    parser.add_argument("--out", type=Path, default=Path("runs/caches"))
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.stage == "overhead":
        overhead_stage(arguments)
    else:
        quality_stage(arguments)


def quality_stage(arguments: argparse.Namespace) -> None:
    """Evaluate all rows and write results.json, peers.json, table.md and figures."""
    results = measure(arguments)
    peers = versus_peers(arguments.out, results)
    (arguments.out / "peers.json").write_text(json.dumps(peers, indent=1) + "\n")
    (arguments.out / "table.md").write_text(markdown_table(results) + "\n" + peers_table(peers) + "\n")
    Console(width=170).print(console_table(results))
    print(peers_table(peers))
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        for name, suffix in {"results.json": "json", "peers.json": "peers.json", "table.md": "md"}.items():
            shutil.copyfile(arguments.out / name, RESULTS / f"caches_sit-digits_cpu.{suffix}")
        pareto_png({**results, "rows": list(map(grouped, results["rows"]))}, Path("docs/images/caches.png"), "rel_l2")


def measure(arguments: argparse.Namespace) -> Any:
    """The results of all rows."""
    baselines = arguments.baselines
    if baselines is None:
        baselines = [*PEERS, *(CACHE_DIT if importlib.util.find_spec("cache_dit") else ())]
    path = zoo.folder(arguments.pipe) if arguments.pipe.startswith(zoo.PREFIX) else arguments.pipe
    pipe = load_pipeline(path)
    pipe.scheduler = FlowRungeKuttaScheduler(solver="euler")
    pipe.save_pretrained(arguments.out / "pipeline")  # cache-dit's process loads it from there
    pipe = load_pipeline(arguments.out / "pipeline")
    protocol = Protocol(
        conditions=Classes(tuple(range(10))),
        steps=arguments.steps,
        baseline_steps=FEWER,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        metrics=("fid", "class_accuracy", "rel_l2", "psnr"),
        rounds=arguments.rounds,
        latency_batch=10,
        baselines=tuple(baselines),
    )
    with progress() as notify:
        recipes = [preset(name) for name in arguments.recipes]
        return evaluate(pipe, recipes, protocol, arguments.out, notify)


def grouped(row: Any) -> Any:
    """The row under one of a few colours."""
    name = row["recipe"]
    if name.startswith(("baseline", "native:", "cache-dit:")):
        return row
    if name in SOLVERS:
        return {**row, "family": "other solvers, fewer steps"}
    extrapolates = name in LEVELS or preset(name).accelerators[0].predictor != Hold()
    return {**row, "family": f"ours, {'extrapolating' if extrapolates else 'holding'}"}


def versus_peers(run: Path, results: Any) -> list[dict[str, Any]]:
    """Every peer in the range of speed-ups, against the best of our rows that takes at most as much time."""
    rows = {row["recipe"]: row for row in results["rows"]}
    ours = [row for name, row in rows.items() if name.partition(":")[0] in {p.partition(":")[0] for p in PRESETS}]
    found = []
    for name, row in rows.items():
        fewer = name.startswith("baseline@") or name in SOLVERS
        if not (fewer or name.startswith(("native:", "cache-dit:"))) or not in_range(speed(row)):
            continue
        as_fast = [own for own in ours if speed(own) >= 0.98 * speed(row)]
        if not as_fast:
            found.append({"peer": name, "speedup": speed(row), "error": error(row), "ours": None})
            continue
        best = min(as_fast, key=error)
        compared = compare_rows(run, best["recipe"], name)["metrics"]
        found.append(
            {
                "peer": name,
                "speedup": speed(row),
                "error": error(row),
                "ours": best["recipe"],
                "our_speedup": speed(best),
                "our_error": error(best),
                "rel_l2": compared["rel_l2"],
                "fid": compared["fid"],
            }
        )
    return found


def in_range(speedup: float) -> bool:
    """Whether the claim is about such a speed-up."""
    return SPEEDUPS[0] <= speedup <= SPEEDUPS[1]


def speed(row: Any) -> float:
    """How many times as fast as the untouched pipeline."""
    return float(row["speedup"]["wall_clock"]["value"])


def error(row: Any) -> float:
    """Mean relative L2 distance to the untouched images."""
    return float(row["metrics"]["rel_l2"]["value"])


def peers_table(peers: list[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    columns = (
        "row",
        "speed-up",
        "rel. L2",
        "ours, at least as fast",
        "its speed-up",
        "its rel. L2",
        "paired difference",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for entry in peers:
        head = f"| {entry['peer']} | {entry['speedup']:.2f}x | {entry['error']:.4f} |"
        if entry["ours"] is None:
            lines.append(head + " none | | | |")
            continue
        low, high = entry["rel_l2"]["ci95"]
        lines.append(
            f"{head} {entry['ours']} | {entry['our_speedup']:.2f}x | {entry['our_error']:.4f} "
            f"| {entry['rel_l2']['difference']:+.4f} [{low:+.4f}, {high:+.4f}] |"
        )
    return "\n".join(lines)


# -- what the machinery costs

SIZE = {"sample_size": 32, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}
IMAGES, RUN_STEPS, REPEATS = 1, 6, 3
VARIANTS = {
    "first block, all computed": "fbcache:threshold=0",
    "first block, all reused": "fbcache:threshold=1e9",
    "modulated input, all computed": "teacache:threshold=0",
    "magnitude, all computed": "magcache:threshold=0",
    "easycache, all computed": "easycache:threshold=0",
    "codebook, all computed": "adacache:codebook=[[1.0,1]]",
    "third difference, all computed": "adaptive_diffusion:threshold=0",
    "mask, half reused": "mask:mask=[1,0,1,0,1,0],last=0",
    "linear forecasts of modules, half reused": "taylorseer:parity,interval=2,phase=0,warmup=1",
}


@dataclass(frozen=True)
class Half(Gate):
    """Compute every second image: what a batch of unlike images asks for."""

    name: ClassVar[str] = "half"
    signal = "input"

    def score(self, state: Any, signal: Tensor | None, step: Any) -> tuple[Tensor, Any]:
        """2 for even images, 0 for odd ones."""
        assert signal is not None
        return 2.0 * (torch.arange(len(signal)) % 2 == 0), state

    def update(self, state: Any, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Any) -> Any:
        """Nothing to remember."""
        return {"units": computed}


def overhead_stage(arguments: argparse.Namespace) -> None:
    """Time the hooks, a reused call and gathering, and write overhead.json."""
    pipe = random_pipeline()
    whole = per_call(pipe, None)
    rows = {name: hook_cost(recipe, whole) for name, recipe in VARIANTS.items()}
    found = {
        "environment": environment("cpu"),
        "network": f"SiT, {SIZE}, {IMAGES} image with guidance (gathering: 2)",
        "network_call_ms": 1000 * whole,
        "hooks": rows,
        "reused_call": reused_call(arguments.rounds),
        "gathering": gathering(arguments.rounds),
    }
    print(json.dumps(found, indent=1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    if arguments.record:
        shutil.copyfile(arguments.out / "overhead.json", RESULTS / "caches_overhead_cpu.json")


def random_pipeline(blocks: int | None = None) -> Any:
    """A SiT of random weights, or only its first blocks."""
    torch.manual_seed(0)
    network = SiTTransformer2DModel(**SIZE)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    network.transformer_blocks = network.transformer_blocks[:blocks]
    pipe = SiTPipeline(network.eval(), FlowRungeKuttaScheduler(solver="euler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, images: int = IMAGES) -> None:
    """One call."""
    generators = [torch.Generator().manual_seed(i) for i in range(images)]
    pipe(list(range(images)), num_inference_steps=RUN_STEPS, generator=generators, output_type="latent")


def per_call(pipe: Any, recipe: Any) -> float:
    """Seconds of a network call, the median of a few runs."""
    if recipe is not None:
        flowaccel.accelerate(pipe, recipe)
    timing = measure_latency({"run": lambda: run(pipe)}, rounds=3, max_warmup=2, device="cpu")["run"]
    return timing.median / RUN_STEPS


def hook_cost(recipe: str, whole: float) -> dict[str, float]:
    """Seconds inside the wrappers, without what they surround."""
    pipe = random_pipeline()
    modules = [pipe.transformer, *pipe.transformer.transformer_blocks]
    inner, outer = Clock(), Clock()
    with inner.on(modules):
        flowaccel.accelerate(pipe, recipe)
        with outer.on(modules):
            run(pipe)
            inner.seconds = outer.seconds = 0.0
            for _ in range(REPEATS):
                run(pipe)
        flowaccel.restore(pipe)
    added = (outer.seconds - inner.seconds) / (REPEATS * RUN_STEPS)
    return {"ms_per_call": 1000 * added, "of_a_computed_call": added / whole}


class Clock:
    """Seconds spent in the `forward` of modules, nested ones counted each."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, modules: list[nn.Module]) -> Iterator[None]:
        """Measure inside the block."""
        before = [module.__dict__.get("forward") for module in modules]
        for module in modules:
            module.forward = self._timed(module.forward)
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def reused_call(rounds: int) -> dict[str, Any]:
    """A call whose blocks but the first are reused, against a network that has the first block only."""
    pipes = {"whole": random_pipeline(), "first block only": random_pipeline(1), "reused": random_pipeline()}
    flowaccel.accelerate(pipes["reused"], "fbcache:threshold=1e9")
    timings = measure_latency(
        {name: functools.partial(run, pipe) for name, pipe in pipes.items()}, rounds=rounds, max_warmup=2, device="cpu"
    )
    whole, probe = (timings[name].median / RUN_STEPS for name in ("whole", "first block only"))
    reused = (timings["reused"].median - whole) / (RUN_STEPS - 1)
    return {
        "computed_ms": 1000 * whole,
        "first_block_only_ms": 1000 * probe,
        "reused_ms": 1000 * reused,
        "beyond_the_probe_of_a_computed_call": (reused - probe) / whole,
    }


def gathering(rounds: int) -> dict[str, Any]:
    """Half of the images computed: gathered, and as a whole batch of which half is thrown away."""
    half = FeatureCache(gate=Half(), scope="stack", last=0)
    pipes = {"all computed": random_pipeline(), "half gathered": random_pipeline(), "one batch": random_pipeline()}
    flowaccel.accelerate(pipes["half gathered"], half)
    flowaccel.accelerate(pipes["one batch"], FeatureCache(gate=Half(), scope="stack", last=0, decide="batch"))
    timings = measure_latency(
        {name: functools.partial(run, pipe, 2) for name, pipe in pipes.items()},
        rounds=rounds,
        max_warmup=2,
        device="cpu",
    )
    whole = timings["all computed"]
    return {
        name: {"ms_per_call": 1000 * timing.median / RUN_STEPS, "of_all_computed": timing.ratio_to(whole).value}
        for name, timing in timings.items()
    }


if __name__ == "__main__":
    main()
