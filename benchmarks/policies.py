"""Learned acceleration policies (RAPID3, arXiv 2509.22323) on the digits generator.

    python benchmarks/policies.py --stage train     # about 45 minutes on two CPU cores; resumes
    python benchmarks/policies.py --stage quality   # needs the first; about 25 minutes
    python benchmarks/policies.py --stage steps     # needs the first; a minute
    python benchmarks/policies.py --only second   # the same heads over second-order steps
    python benchmarks/policies.py --only step     # the step head alone, as TPDM
    python benchmarks/policies.py --only one-shot # one number of steps per image, after AdaDiff

`quality` compares the trained heads with the untouched pipeline (Euler, 30 steps), with fewer steps, with training-free
recipes, with the heads' average path for all images alike, and with paths of the heads that are dealt out to other
images: if that is as good, the heads do not look at the image. `steps` says how many steps images take, what that goes
with, and what the training saw. With `--only second` steps are of second order (Adams-Bashforth), `fidelity` is to
where the network's differential equation leads (Heun's method), not to the untouched pipeline's own steps, and there is
no discriminator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from _pairs import compared, pairs_table
from rich.console import Console
from torch import Tensor

from flowaccel import LearnedPolicy, Sampler, report
from flowaccel.cli.common import progress
from flowaccel.evaluation import (
    Protocol,
    console_table,
    environment,
    evaluate,
    load_results,
    markdown_table,
    sample_generator,
)
from flowaccel.methods.policy.accelerator import attach_policy, load_policy
from flowaccel.methods.policy.network import COMPUTE, COUNT, REUSE, AccelerationPolicy
from flowaccel.methods.policy.policy_decisions import Sight
from flowaccel.methods.policy.stats import ImagePath, paths_of
from flowaccel.methods.policy.train.loop import fidelity, references
from flowaccel.recipe import Recipe, accelerated, preset
from flowaccel.recipe.accelerator import Accelerator
from flowaccel.training.loop import train
from flowaccel.zoo_build.policy import STEPS, TASK, TRAININGS, digits_pipeline, save_policy

RESULTS = Path(__file__).parent / "results"
FEWER, BATCH = (6, 8, 10, 12, 15), 25
CACHED = "ab_cache:interval=3,order=2"
FREE = {
    1: ("ab2@10", "ab_cache:interval=4", CACHED, "taylorseer:interval=3"),
    2: ("ab2@6", "ab2@7", "ab2@8", "ab2@10", "ab2@12", CACHED),
}
"""By the order of a policy's steps, the fixed schedules that it is compared with."""
SOLVERS = {1: "euler", 2: "ab2"}
TRACED = 500
"""Images of the training's pool whose paths are written down."""


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=tuple(STAGES))
    parser.add_argument("--only", choices=tuple(TRAININGS), default="policy", help="which heads")
    parser.add_argument("--seed", type=int, default=0, help="train: of heads and decisions; quality: of the samples")
    parser.add_argument("--updates", type=int, help="default: 500, or 300 over second-order steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--claims-only", action="store_true", help="quality: work on the results that --out holds")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"))
    arguments = parser.parse_args()
    (arguments.out / arguments.only).mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage:
        STAGES[stage](arguments)


# -- training


def train_stage(arguments: argparse.Namespace) -> None:
    """Train the heads, and write down what every update saw."""
    folder, training = arguments.out / arguments.only, TRAININGS[arguments.only]
    if (folder / "policy").is_dir():
        return
    pipe, loop = digits_pipeline(), training.loop(arguments.updates, arguments.learning_rate, arguments.seed)
    heads, goal = training.heads(pipe, folder, arguments.seed), training.goal(pipe, arguments.out)
    objective = training.objective(pipe, goal, loop)
    started = time.process_time()
    with (folder / "updates.jsonl").open("a") as log:
        for state in train(heads, objective, loop, folder / "training"):
            last, judge = objective.last, objective.discriminator
            assert last is not None
            accuracy = judge and judge.accuracy()
            log.write(
                json.dumps({"update": state.step, "discriminator": accuracy, **vars(last), "stats": vars(last.stats)})
                + "\n"
            )
            if state.step % 10 == 0:
                log.flush()
                print(
                    f"{state.step}/{loop.steps} reward {last.reward:.3f} cost {last.cost:.2f} steps {last.steps:.1f} "
                    f"computed {last.computed:.1f} clipped {last.stats.clip_fraction:.0%} discriminator {accuracy}",
                    flush=True,
                )
    save_policy(heads, pipe, folder)
    (folder / "training.json").write_text(json.dumps({"cpu_seconds": time.process_time() - started}) + "\n")


# -- what it is compared with


def traced(pipe: Any, policy: AccelerationPolicy, count: int, seed: int) -> list[ImagePath]:
    """The paths of images of another seed than those that are evaluated."""
    found: list[ImagePath] = []
    with accelerated(pipe, LearnedPolicy(policy)):
        for start in range(0, count, BATCH):
            ids = range(start, min(start + BATCH, count))
            generators = [sample_generator(seed, sample) for sample in ids]
            asked = TASK.conditions.arguments(ids)
            pipe(**asked, num_inference_steps=STEPS, generator=generators, output_type="latent")
            found += paths_of(report(pipe).stats("learned_policy"))
    return found


@dataclass(frozen=True)
class DealtOut(Accelerator):
    """Paths of a policy for other images than those it chose them for: of the same cost, and blind."""

    name: ClassVar[str] = "dealt_out"

    policy_folder: str
    paths: tuple[ImagePath, ...]

    @property
    def tags(self) -> frozenset[str]:
        return super().tags | {"cache", "scheduler"}

    def attach(self, pipe: Any) -> Any:
        policy = load_policy(Path(self.policy_folder))
        return attach_policy(pipe, policy, Dealer(self.paths, policy.config))


class Dealer:
    """Gives every image a path by a hash of what the network says of it first."""

    def __init__(self, paths: Sequence[ImagePath], config: Any) -> None:
        self.paths, self.config, self.dealt = paths, config, {}

    def jump(self, sight: Sight, levels: Sequence[float]) -> list[float]:
        if sight.step == 0:
            self._deal(sight)
        return [
            path[sight.step + 1][0] / self.config.num_train_timesteps if sight.step + 1 < len(path) else 0.0
            for path in (self.dealt[image] for image in sight.images)
        ]

    def choose(self, level: str, sight: Sight) -> list[int]:
        if level == COUNT:
            self._deal(sight)
            return [self.config.counts.index(len(self.dealt[image])) for image in sight.images]
        computed = [self.dealt[image][min(sight.step, len(self.dealt[image]) - 1)][1] for image in sight.images]
        return [COMPUTE if on else REUSE for on in computed]

    def _deal(self, sight: Sight) -> None:
        self.dealt = {image: self._pick(velocity) for image, velocity in zip(sight.images, sight.features, strict=True)}

    def _pick(self, velocity: Tensor) -> ImagePath:
        digest = hashlib.sha256(velocity.mul(100).round().to(torch.int16).numpy().tobytes()).digest()
        return self.paths[int.from_bytes(digest[:8], "little") % len(self.paths)]


def average_grid(paths: Sequence[ImagePath], scale: int) -> list[float]:
    """As many steps as images take on average, at the average of where they are after each share of their steps."""
    steps = round(sum(len(path) for path in paths) / len(paths))
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    total = torch.zeros(steps + 1, dtype=torch.float64)
    for path in paths:
        times = torch.tensor([*(time for time, *_ in path), 0.0], dtype=torch.float64) / scale
        places = shares * len(path)
        lower = places.floor().long().clamp(max=len(path) - 1)
        total += torch.lerp(times[lower], times[lower + 1], places - lower)
    grid: list[float] = (total / len(paths)).tolist()
    return [1.0, *grid[1:-1], 0.0]


def protocol(arguments: argparse.Namespace) -> Protocol:
    """What every row is asked for."""
    return Protocol(
        conditions=TASK.conditions,
        steps=STEPS,
        baseline_steps=FEWER,
        num_samples=arguments.num_samples,
        latency_batch=BATCH,
        seed=arguments.seed,
        metrics=("fid", "kid", "class_accuracy", "precision", "recall", "rel_l2"),
        rounds=arguments.rounds,
    )


def quality_stage(arguments: argparse.Namespace) -> None:
    """results.json, table.md and claims.json."""
    folder = arguments.out / arguments.only
    pipe, policy = digits_pipeline(), load_policy(folder / "policy")
    scale = policy.config.num_train_timesteps
    paths = traced(pipe, policy, TRACED, TASK.seed)
    (folder / "paths.json").write_text(json.dumps(paths) + "\n")
    grid = average_grid(paths, scale)
    learned = Recipe([LearnedPolicy(policy)], name="policy", num_inference_steps=STEPS)
    dealt = DealtOut(str(folder / "policy"), tuple(paths))
    rows = [
        learned,
        Recipe([dealt], name="dealt out", num_inference_steps=STEPS),
        Recipe(
            [Sampler(SOLVERS[policy.config.solver_order], {"grid": grid})],
            name="average path",
            num_inference_steps=len(grid) - 1,
        ),
        *map(preset, FREE[policy.config.solver_order]),
    ]
    run = folder / "quality"
    with progress() as notify:
        results = load_results(run) if arguments.claims_only else evaluate(pipe, rows, protocol(arguments), run, notify)
    others = [row["recipe"] for row in results["rows"] if row["recipe"] != "policy"]
    pairs = [compared(run, results, "policy", other) for other in others]
    pairs += [compared(run, results, other, "baseline") for other in others if other != "baseline"]
    (run / "claims.json").write_text(json.dumps({"pairs": pairs, "average_path": grid}, indent=1) + "\n")
    (run / "table.md").write_text(markdown_table(results) + "\n\n" + pairs_table(pairs) + "\n")
    Console(width=150).print(console_table(results))
    print(pairs_table(pairs))
    if arguments.record:
        for source, suffix in (("results.json", "json"), ("claims.json", "claims.json"), ("table.md", "md")):
            shutil.copyfile(run / source, RESULTS / f"policies_{arguments.only}_sit-digits_cpu.{suffix}")


# -- what the number of steps goes with


def steps_stage(arguments: argparse.Namespace) -> None:
    """How many steps images take, by class and by how hard they are."""
    folder = arguments.out / arguments.only
    pipe, policy = digits_pipeline(), load_policy(folder / "policy")
    paths = traced(pipe, policy, TRACED, TASK.seed)
    steps = torch.tensor([float(len(path)) for path in paths])
    computed = torch.tensor([float(sum(on for _, on, _ in path)) for path in paths])
    untouched = references(pipe, TASK, arguments.out)[:TRACED]
    parts = [range(start, min(start + BATCH, TRACED)) for start in range(0, TRACED, BATCH)]
    short = torch.cat([TASK.generate(pipe, ids, steps=10) for ids in parts])
    hardness = 1 - fidelity(short, untouched)
    labels = torch.tensor(TASK.asked(range(TRACED)))
    found = {
        "environment": environment(torch.device("cpu")),
        "training": summary(folder),
        "images": TRACED,
        "steps": counts(steps),
        "computed": counts(computed),
        "by_class": [float(steps[labels == label].mean()) for label in range(10)],
        "rank_correlation_with_error_at_10_steps": rank_correlation(steps, hardness),
        "rank_correlation_with_ink": rank_correlation(steps, untouched.flatten(1).mean(dim=1)),
    }
    for name, value in found.items():
        if name != "environment":
            print(f"{name}: {value}")
    (folder / "steps.json").write_text(json.dumps(found, indent=1) + "\n")
    if arguments.record:
        shutil.copyfile(folder / "steps.json", RESULTS / f"policies_{arguments.only}_steps_cpu.json")


def summary(folder: Path) -> dict[str, Any]:
    """What the training saw, in means over its first and last tenth, and what it took."""
    seen = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    tenth = max(1, len(seen) // 10)
    names = ("reward", "quality", "cost", "steps", "computed")
    found = {name: [mean(row[name] for row in part) for part in (seen[:tenth], seen[-tenth:])] for name in names}
    judged = [row["discriminator"] for row in seen if row["discriminator"] is not None]
    accuracy = [min(judged), mean(judged), max(judged)] if judged else None
    taken = json.loads((folder / "training.json").read_text())
    return {"updates": len(seen), **taken, **found, "discriminator_accuracy_min_mean_max": accuracy}


def counts(values: Tensor) -> dict[str, int]:
    """How many images take how many."""
    numbers, found = values.int().unique(return_counts=True)
    return {str(int(number)): int(count) for number, count in zip(numbers, found, strict=True)}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, with mean ranks for ties."""
    ranks = [(x[:, None] > x).sum(dim=1) + 0.5 * (x[:, None] == x).sum(dim=1) for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


STAGES = {"train": train_stage, "quality": quality_stage, "steps": steps_stage}

if __name__ == "__main__":
    main()
