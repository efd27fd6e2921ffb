"""Train a small acceleration policy end to end, and see where it leads each image.

python examples/train_policy.py               # about five minutes on two CPU cores
python examples/train_policy.py --updates 10  # only to see it run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flowaccel import LearnedPolicy, Recipe, accelerate, report, zoo
from flowaccel.evaluation import Classes, sample_generator
from flowaccel.methods.policy.train.loop import PolicyObjective, PolicySettings, Task, new_policy, references, set_costs
from flowaccel.methods.policy.train.rewards import load_reward
from flowaccel.pipelines import load_pipeline
from flowaccel.training.loop import LoopConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("my-policy"))
    arguments = parser.parse_args()

    pipe = load_pipeline(zoo.folder("sit-digits"))
    pipe.set_progress_bar_config(disable=True)
    task = Task(conditions=Classes(tuple(range(10))), size=100, steps=12)
    policy = new_policy(pipe, task, ("step", "cache"), width=16)
    set_costs(pipe, policy, task, arguments.out / "training")

    untouched = references(pipe, task, arguments.out / "training")
    reward = load_reward("accuracy:zoo:digits-features")
    settings = PolicySettings(groups=4, group_size=4, fidelity=1.0)
    objective = PolicyObjective(pipe, task, reward, settings, untouched, arguments.updates)
    loop = LoopConfig(steps=arguments.updates, learning_rate=3e-3, ema_decay=0.9, save_every=20)
    for state in train(policy, objective, loop, arguments.out / "training"):
        last = objective.last
        if last is not None and state.step % 5 == 0:
            print(
                f"update {state.step}: reward {last.reward:.3f}, {last.steps:.1f} steps, {last.computed:.1f} computed"
            )

    Recipe([LearnedPolicy(policy.requires_grad_(False))], name="my-policy").save_pretrained(arguments.out)
    accelerate(pipe, arguments.out)
    generators = [sample_generator(0, image) for image in range(4)]
    with torch.no_grad():
        pipe([0, 1, 2, 3], num_inference_steps=task.steps, generator=generators)
    print(report(pipe))


if __name__ == "__main__":
    main()
