"""Learned acceleration policies (RAPID3, arXiv 2509.22323) on the digits generator.

    python benchmarks/policies.py --stage train     # about 45 minutes on two CPU cores; resumes
    python benchmarks/policies.py --stage quality   # needs the first; about 25 minutes
    python benchmarks/policies.py --stage steps     # needs the first; a minute
    python benchmarks/policies.py --only second   # the same heads over second-order steps
    python benchmarks/policies.py --only step     # the step head alone, as TPDM
    python benchmarks/policies.py --only one-shot # one number of steps per image, after AdaDiff

`quality` compares the trained heads with the untouched pipeline (Euler, 30 steps), with fewer steps, with training-free
recipes, with the heads' average path for all images alike, and with paths of the heads that are dealt out to other
images: if that is as good, the heads do not look at the image. `steps` says how many steps images take, and what that
goes with. With `--only second` steps are of second order (Adams-Bashforth), `fidelity` is to where the network's
differential equation leads (Heun's method), not to the untouched pipeline's own steps, and there is no discriminator.
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
from typing import Any, ClassVar, Literal

import torch
from _pairs import compared, pairs_table
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console
from torch import Tensor

from flowaccel import LearnedPolicy, Sampler, report, zoo
from flowaccel.accelerators import Accelerator
from flowaccel.accelerators.learned_policy import attach_policy, base_of, load_policy
from flowaccel.accelerators.policy import Sight
from flowaccel.cli.common import progress
from flowaccel.evaluation import (
    Classes,
    Protocol,
    console_table,
    environment,
    evaluate,
    load_results,
    markdown_table,
    sample_generator,
)
from flowaccel.models import AccelerationPolicy
from flowaccel.models.policy import CACHE, COMPUTE, COUNT, REUSE, STEP
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, accelerated, preset
from flowaccel.training.loop import LoopConfig, train
from flowaccel.training.policy import PolicyObjective, PolicySettings, Task, fidelity, references
from flowaccel.training.policy_discriminator import DiscriminatorConfig, DiscriminatorTraining, new_discriminator
from flowaccel.training.policy_rewards import load_reward
from flowaccel.training.policy_rollout import measured_costs

RESULTS = Path(__file__).parent / "results"
STEPS, FEWER, BATCH = 30, (6, 8, 10, 12, 15), 25
TASK = Task(conditions=Classes(tuple(range(10))), size=512, steps=STEPS, seed=1)
SETTINGS = PolicySettings(groups=8, group_size=8, discount=0.97, fidelity=1.0)
UPDATES = 500
FREE = ("ab2@10", "ab_cache:interval=4", "ab_cache:interval=3,order=2", "taylorseer:interval=3")


@dataclass(frozen=True)
class Heads:
    """Which heads there are, and what they are compared with."""

    levels: tuple[str, ...] = (STEP, CACHE)
    counts: tuple[int, ...] = ()
    """Of steps, for the count head to choose from."""
    order: Literal[1, 2] = 1
    judged: bool = True
    """Whether a discriminator learns along."""
    others: tuple[str, ...] = FREE
    """Recipes of fixed schedules."""

    @property
    def solver(self) -> str:
        """The sampler with steps of this order."""
        return {1: "euler", 2: "ab2"}[self.order]


HEADS = {
    "policy": Heads(),
    "second": Heads(order=2, judged=False, others=("ab2@6", "ab2@7", "ab2@8", "ab2@10", "ab2@12", FREE[2])),
    "step": Heads(levels=(STEP,)),
    "one-shot": Heads(levels=(COUNT,), counts=(4, 6, 8, 10, 14, 20, 28)),
}
TRACED = 500
"""Images of the training's pool whose paths are written down."""


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=tuple(STAGES))
    parser.add_argument("--only", choices=tuple(HEADS), default="policy", help="which heads")
    parser.add_argument("--seed", type=int, default=0, help="train: of heads and decisions; quality: of the samples")
    parser.add_argument("--updates", type=int, default=UPDATES)
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


def pipeline() -> Any:
    """The digits generator with diffusers' own Euler scheduler."""
    pipe = load_pipeline(zoo.folder("sit-digits"), torch_dtype=torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- training


def train_stage(arguments: argparse.Namespace) -> None:
    """Train the heads, and write down what every update saw."""
    folder = arguments.out / arguments.only
    if (folder / "policy").is_dir():
        return
    pipe, work, kind = pipeline(), folder / "training", HEADS[arguments.only]
    torch.manual_seed(arguments.seed)
    heads = AccelerationPolicy(
        in_channels=pipe.transformer.config.in_channels,
        condition_dim=pipe.transformer.pos_embed.shape[-1],
        levels=kind.levels,
        counts=kind.counts,
        width=32,
        max_steps=STEPS,
        solver_order=kind.order,
        base=base_of(pipe.transformer),
    )
    wanted = goal(pipe, kind, arguments.out)
    heads.register_to_config(costs=costs(pipe, heads, folder / "costs.json"))
    discriminator = None
    if kind.judged:
        discriminator = DiscriminatorTraining(
            new_discriminator("conv", tuple(wanted.shape[1:]), arguments.seed),
            wanted,
            DiscriminatorConfig(learning_rate=1e-3, seed=arguments.seed),
        )
    objective = PolicyObjective(
        pipe,
        TASK,
        load_reward("accuracy:zoo:digits-features"),
        SETTINGS,
        wanted,
        arguments.updates,
        discriminator,
        arguments.seed,
    )
    loop = LoopConfig(
        steps=arguments.updates,
        learning_rate=arguments.learning_rate,
        cosine=True,
        ema_decay=0.95,
        save_every=25,
        seed=arguments.seed,
    )
    started = time.process_time()
    with (folder / "updates.jsonl").open("a") as log:
        for state in train(heads, objective, loop, work):
            last = objective.last
            assert last is not None
            seen = {"update": state.step, "discriminator": discriminator and discriminator.accuracy(), **vars(last)}
            log.write(json.dumps({**seen, "stats": vars(last.stats)}) + "\n")
            if state.step % 10 == 0:
                log.flush()
                print(
                    f"{state.step}/{arguments.updates} reward {last.reward:.3f} cost {last.cost:.2f} steps "
                    f"{last.steps:.1f} computed {last.computed:.1f} clipped {last.stats.clip_fraction:.0%} "
                    f"discriminator {seen['discriminator']}",
                    flush=True,
                )
    heads.requires_grad_(False).save_pretrained(folder / "policy")
    (folder / "training.json").write_text(json.dumps({"cpu_seconds": time.process_time() - started}) + "\n")


def goal(pipe: Any, kind: Heads, folder: Path) -> Tensor:
    """The images that trained ones are to come near."""
    if kind.order == 1:
        return references(pipe, TASK, folder)
    with accelerated(pipe, Recipe([Sampler("heun")])):
        return references(pipe, TASK, folder / "converged")


def costs(pipe: Any, heads: AccelerationPolicy, file: Path) -> dict[str, Any]:
    """Measured once."""
    if not file.exists():
        found = measured_costs(pipe, heads, lambda: TASK.generate(pipe, range(BATCH)))
        file.write_text(json.dumps(found) + "\n")
    kept: dict[str, Any] = json.loads(file.read_text())
    return kept


# -- what it is compared with

Trace = tuple[tuple[float, bool], ...]
"""Of an image: timesteps, and whether blocks were computed."""


def traced(pipe: Any, policy: AccelerationPolicy, count: int, seed: int) -> list[Trace]:
    """The paths of images of another seed than those that are evaluated."""
    found: list[Trace] = []
    with accelerated(pipe, LearnedPolicy(policy)):
        for start in range(0, count, BATCH):
            ids = range(start, min(start + BATCH, count))
            generators = [sample_generator(seed, sample) for sample in ids]
            asked = TASK.conditions.arguments(ids)
            pipe(**asked, num_inference_steps=STEPS, generator=generators, output_type="latent")
            found += report(pipe).paths
    return found


@dataclass(frozen=True)
class DealtOut(Accelerator):
    """Paths of a policy for other images than those it chose them for: of the same cost, and blind."""

    name: ClassVar[str] = "dealt_out"

    policy_folder: str
    paths: tuple[Trace, ...]

    @property
    def tags(self) -> frozenset[str]:
        return super().tags | {"cache", "scheduler"}

    def attach(self, pipe: Any) -> Any:
        policy = load_policy(Path(self.policy_folder))
        return attach_policy(pipe, policy, Dealer(self.paths, policy.config))


class Dealer:
    """Gives every image a path by a hash of what the network says of it first."""

    def __init__(self, paths: Sequence[Trace], config: Any) -> None:
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

    def _pick(self, velocity: Tensor) -> Trace:
        digest = hashlib.sha256(velocity.mul(100).round().to(torch.int16).numpy().tobytes()).digest()
        return self.paths[int.from_bytes(digest[:8], "little") % len(self.paths)]


def average_grid(paths: Sequence[Trace], scale: int) -> list[float]:
    """As many steps as images take on average, at the average of where they are after each share of their steps."""
    steps = round(sum(len(path) for path in paths) / len(paths))
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    total = torch.zeros(steps + 1, dtype=torch.float64)
    for path in paths:
        times = torch.tensor([*(time for time, _ in path), 0.0], dtype=torch.float64) / scale
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
    pipe, policy, kind = pipeline(), load_policy(folder / "policy"), HEADS[arguments.only]
    scale = policy.config.num_train_timesteps
    paths = traced(pipe, policy, TRACED, TASK.seed)
    (folder / "paths.json").write_text(json.dumps(paths) + "\n")
    grid = average_grid(paths, scale)
    learned = Recipe([LearnedPolicy(policy)], name="policy", num_inference_steps=STEPS)
    dealt = DealtOut(str(folder / "policy"), tuple(paths))
    rows = [
        learned,
        Recipe([dealt], name="dealt out", num_inference_steps=STEPS),
        Recipe([Sampler(kind.solver, {"grid": grid})], name="average path", num_inference_steps=len(grid) - 1),
        *map(preset, kind.others),
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
    pipe, policy = pipeline(), load_policy(folder / "policy")
    paths = traced(pipe, policy, TRACED, TASK.seed)
    steps = torch.tensor([float(len(path)) for path in paths])
    computed = torch.tensor([float(sum(on for _, on in path)) for path in paths])
    untouched = references(pipe, TASK, arguments.out)[:TRACED]
    short = torch.cat([few(pipe, range(start, min(start + BATCH, TRACED))) for start in range(0, TRACED, BATCH)])
    hardness = 1 - fidelity(short, untouched)
    labels = torch.tensor(TASK.asked(range(TRACED)))
    found = {
        "environment": environment(torch.device("cpu")),
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


def few(pipe: Any, ids: Sequence[int]) -> Tensor:
    """Untouched images at 10 steps."""
    short = Task(conditions=TASK.conditions, size=TASK.size, steps=10, seed=TASK.seed)
    return short.generate(pipe, ids)


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
