"""What it costs to be seen: the seconds that flowaccel's hooks add to a run in which they change nothing.

    python benchmarks/seam.py            # about two minutes on two CPU cores
    python benchmarks/seam.py --record   # and write benchmarks/results/seam_cpu.json

Three variants of one SiT pipeline with random weights, interleaved in one process: untouched; observed (an empty
recipe: run, step, branch and images of every network call); surrounded (every call and every block goes through a
function that takes its arguments and outputs apart and puts them together again). The difference between two variants,
divided by the network calls of a run, is what one call costs. Each variant has a pipeline of its own, so that none
pays for accelerate and restore.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowaccel
from flowaccel import FlowRungeKuttaScheduler, SiTPipeline, SiTTransformer2DModel
from flowaccel.evaluation import Timing, environment, measure_latency
from flowaccel.hooks import session_of

RESULTS = Path(__file__).parent / "results"
STEPS = 5
SIZES = {
    "12 blocks, width 16, 16 tokens": {
        "sample_size": 8, "num_layers": 12, "num_attention_heads": 2, "attention_head_dim": 8
    },
    "SiT-S/2 (12 blocks, width 384, 256 tokens)": {
        "sample_size": 32, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/seam_DEVICE.json")
    arguments = parser.parse_args()
    rows = [measure(name, sizes, arguments) for name, sizes in SIZES.items()]
    for row in rows:
        print(json.dumps(row, indent=2))
    if arguments.record:
        results = {"environment": environment(torch.device(arguments.device)), "rounds": arguments.rounds, "rows": rows}
        (RESULTS / f"seam_{arguments.device}.json").write_text(json.dumps(results, indent=2) + "\n")


def measure(name: str, sizes: dict[str, int], arguments: argparse.Namespace) -> dict[str, Any]:
    makers = {"untouched": lambda pipe: pipe, "observed": observed, "surrounded": surrounded}
    calls = {variant: make_call(make, sizes, arguments.device) for variant, make in makers.items()}
    images = {variant: call() for variant, call in calls.items()}
    timings = measure_latency(calls, rounds=arguments.rounds, device=arguments.device)
    return {
        "network": name,
        "network_call_ms": 1000 * timings["untouched"].median / STEPS,
        "outputs_equal": all(torch.equal(image, images["untouched"]) for image in images.values()),
        "throttled": any(timing.throttled for timing in timings.values()),
        **{variant: cost(timings[variant], timings["untouched"]) for variant in ("observed", "surrounded")},
    }


def make_call(make: Callable[[Any], Any], sizes: dict[str, int], device: str) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    network = SiTTransformer2DModel(**sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape))
    pipe = SiTPipeline(network.eval(), FlowRungeKuttaScheduler("euler")).to(device)
    pipe.set_progress_bar_config(disable=True)
    make(pipe)

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(1, num_inference_steps=STEPS, generator=generator, output_type="latent").images

    return call


def observed(pipe: Any) -> Any:
    return flowaccel.accelerate(pipe, [])


def surrounded(pipe: Any) -> Any:
    session = session_of(flowaccel.accelerate(pipe, []))
    session.on_call(lambda call_next, call: call_next(call.arguments))
    session.on_block(lambda call_next, call, block: block.pack(*block.unpack(call_next(block.arguments))))
    return pipe


def cost(timing: Timing, untouched: Timing) -> dict[str, Any]:
    """Microseconds per network call from per-round differences, with a bootstrap interval of the median."""
    differences = (np.array(timing.seconds) - np.array(untouched.seconds)) / STEPS * 1e6
    resampled = np.random.default_rng(0).choice(differences, (2000, len(differences)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    ratio = timing.ratio_to(untouched)
    return {
        "added_us_per_call": {"value": float(np.median(differences)), "ci95": [float(low), float(high)]},
        "time_over_untouched": {"value": ratio.value, "ci95": list(ratio.ci95)},
    }


if __name__ == "__main__":
    main()
