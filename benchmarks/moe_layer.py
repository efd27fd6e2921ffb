"""One mixture-of-experts layer against the dense feed-forward of the same activated parameters (capacity 1).

    python benchmarks/moe_layer.py                                 # about half an hour on two CPU cores
    python benchmarks/moe_layer.py --backward                      # forward and backward of the layers, too
    python benchmarks/moe_layer.py --device cuda --dtype bfloat16  # minutes
    python benchmarks/moe_layer.py --quick                         # seconds: whether it runs

Three plans: `diffmoe` in use, by fitted thresholds (experts have different numbers of tokens), `diffmoe` while training
(equally many), and `token_choice`; besides, `diffmoe` in use with a budget, which has shapes that are known beforehand.
Each with every backend that runs it, and with what `auto` takes. Weights are random, and the same for all of them.

`x dense` is the time in units of the dense feed-forward's, of the whole layer and of the experts alone, without router
and capacity predictor; `realised/ideal` sets the first against the multiply-adds that are counted. What is recorded
goes to benchmarks/results/ (--record): the measured ground of `flowaccel.methods.moe.experts.fastest`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor

from flowaccel.evaluation import count_macs, environment, measure_latency
from flowaccel.methods.moe.control import set_experts_backend, set_moe_budget
from flowaccel.methods.moe.experts import BACKENDS, fastest, grouped_runs
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.settings import MoESettings

RESULTS = Path(__file__).parent / "results"
LENGTH, WIDENING, BUDGET = 256, 4, 1.5
"""Tokens of a sample, hidden width of the dense feed-forward over D, and room over an even share."""
TRAINED = ("diffmoe, training", "token_choice")
"""Layers that choose as in training, for --backward."""
Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """What is timed by default on a kind of device."""

    dims: tuple[int, ...]
    experts: tuple[int, ...]
    tokens: tuple[int, ...]


SIZES = {
    "cpu": Size((384, 1152), (8, 16), (64, 256, 1024, 2048, 4096, 8192)),
    "cuda": Size((1152,), (8, 16), (256, 1024, 4096, 16384, 65536)),
    "quick": Size((64,), (4,), (64, 512)),
}


def main() -> None:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", help="widths D")
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"of the pool; samples have at most {LENGTH}")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backward", action="store_true", help="time forward and backward of whole layers as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds; no numbers to quote")
    parser.add_argument("--out", type=Path, default=Path("runs/moe_layer"))
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--quick has no numbers to --record")
    kind = torch.device(arguments.device).type
    sizes = SIZES["quick" if arguments.quick else kind]
    rounds = 2 if arguments.quick else arguments.rounds
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = []
    for dim in arguments.dims or sizes.dims:
        for experts in arguments.experts or sizes.experts:
            bench = Bench(dim, experts, arguments)
            for tokens in arguments.tokens or sizes.tokens:
                found.append({"dim": dim, "experts": experts, "tokens": tokens, **bench.timed(tokens, rounds)})
                show(found[-1])
    data = {"environment": environment(torch.device(arguments.device)), "dtype": arguments.dtype, "rows": found}
    name = f"moe_layer_{kind}" + ("" if arguments.dtype == "float32" else f"_{arguments.dtype}")
    (arguments.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(arguments.out / f"{name}.json", RESULTS / f"{name}.json")


class Bench:
    """A dense feed-forward, and layers around one set of experts of its shape."""

    def __init__(self, dim: int, experts: int, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.device, self.dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        self.backward = arguments.backward
        self.dense = FeedForward(dim, mult=WIDENING, activation_fn="gelu-approximate").to(self.device, self.dtype)
        self.layers = {
            name: MoEFeedForward.of(self.dense, MoESettings(router=router, num_experts=experts))
            for name, router in (
                ("diffmoe", "diffmoe"),
                ("diffmoe, training", "diffmoe"),
                ("diffmoe, budget", "diffmoe"),
                ("token_choice", "token_choice"),
            )
        }
        first, *others = self.layers.values()
        for layer in others:
            layer.experts = first.experts
        for name, layer in self.layers.items():
            layer.train(name == "diffmoe, training")
        set_moe_budget(self.layers["diffmoe, budget"], BUDGET)
        self._fit(dim)

    def _fit(self, dim: int) -> None:
        """Thresholds from other tokens than those that are timed."""
        layer = self.layers["diffmoe"]
        layer.thresholds.collecting = True
        with torch.no_grad():
            layer(torch.randn(16, LENGTH, dim, device=self.device, dtype=self.dtype))
        layer.thresholds.collecting = False
        layer.thresholds.fit(layer.settings.capacity)
        budgeted = self.layers["diffmoe, budget"]
        budgeted.load_state_dict(layer.state_dict())
        budgeted.eval()

    def timed(self, tokens: int, rounds: int) -> dict[str, Any]:
        """Every layer with every backend, for so many tokens."""
        length = min(LENGTH, tokens)
        if tokens % length:
            raise SystemExit(f"--tokens must be at most {LENGTH} or a multiple of it, got {tokens}")
        dim = self.dense.net[2].out_features
        hidden = torch.randn(tokens // length, length, dim, device=self.device, dtype=self.dtype)
        calls: dict[str, dict[str, Any]] = {"dense": {"layer": forward(self.dense, hidden)}}
        if self.backward:
            calls["dense"]["step"] = step(self.dense, hidden)
        auto = {}
        for name, layer in self.layers.items():
            with torch.no_grad():
                plan = layer.route(hidden.flatten(0, 1), len(hidden)).plan
            auto[name] = fastest(hidden, plan)
            for backend in self.backends(hidden, even=plan.each is not None):
                calls[f"{name}, {backend}"] = self.of_layer(name, backend, hidden, plan)
        flat = {(name, part): call for name, parts in calls.items() for part, call in parts.items()}
        found = measure({f"{name} | {part}": call for (name, part), call in flat.items()}, rounds, self.device)
        rows: dict[str, dict[str, Any]] = {}
        for name, part in flat:
            rows.setdefault(name, {})[part] = found[f"{name} | {part}"]
        return {"auto": auto, "calls": rows}

    def backends(self, hidden: Tensor, *, even: bool) -> Iterator[str]:
        runs = {"auto": False, "bmm": even, "grouped_mm": grouped_runs(self.layers["diffmoe"].shape, hidden)}
        return (backend for backend in BACKENDS if runs.get(backend, True))

    def of_layer(self, name: str, backend: str, hidden: Tensor, plan: Any) -> dict[str, Call]:
        """The whole layer, the experts alone, and, if wanted, a step of training."""
        layer, pool = self.layers[name], hidden.flatten(0, 1)

        def with_backend(call: Call) -> Call:
            def chosen() -> Any:
                set_experts_backend(layer, backend)
                return call()

            return chosen

        def alone() -> Tensor:
            with torch.no_grad():
                output: Tensor = layer.experts(pool, plan)
            return output

        calls = {"layer": forward(layer, hidden), "experts": alone}
        if self.backward and name in TRAINED:
            calls["step"] = step(layer, hidden)
        return {part: with_backend(call) for part, call in calls.items()}


def forward(module: Any, hidden: Tensor) -> Call:
    """Call it without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            output: Tensor = module(hidden)
        return output

    return call


def step(module: Any, hidden: Tensor) -> Call:
    """Forward and backward, with gradients of the input and the weights."""
    slope = torch.randn_like(hidden)

    def call() -> None:
        given = hidden.detach().requires_grad_()
        module(given).backward(slope)
        module.zero_grad()

    return call


def measure(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Every call against the dense one of its part."""
    macs = {name: count_macs(call) for name, call in calls.items()}
    timings = measure_latency(calls, rounds=rounds, max_warmup=3, device=device)
    found = {}
    for name, timing in timings.items():
        dense = "dense | step" if name.endswith("| step") else "dense | layer"
        ratio, ideal = timing.ratio_to(timings[dense]), macs[name] / macs[dense]
        found[name] = {
            "ms": 1000 * timing.median,
            "times_dense": ratio.value,
            "ci95": list(ratio.ci95),
            "macs_times_dense": ideal,
            "realised_over_ideal": ideal / ratio.value,
            "throttled": timing.throttled,
            "peak_memory_mb": peak(calls[name], device),
        }
    return found


def peak(call: Call, device: torch.device) -> float | None:
    """What a call has allocated at most, with all that lies there anyway; only CUDA tells."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 2**20


def show(row: dict[str, Any]) -> None:
    print(f"D {row['dim']}, {row['experts']} experts, {row['tokens']} tokens; auto: {row['auto']}")
    for name, parts in row["calls"].items():
        texts = []
        for part, call in parts.items():
            low, high = call["ci95"]
            slowed = " (slowed down while timed)" if call["throttled"] else ""
            texts.append(
                f"{part} {call['ms']:8.2f} ms {call['times_dense']:5.2f}x dense [{low:.2f}, {high:.2f}], "
                f"realised/ideal {call['realised_over_ideal']:.2f}{slowed}"
            )
        print(f"  {name:<30} " + "; ".join(texts))


if __name__ == "__main__":
    main()
