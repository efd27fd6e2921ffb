"""One block-sparse attention against the full one: time, multiply-adds, and error.

    python benchmarks/sparse_attention.py                                 # minutes on two CPU cores
    python benchmarks/sparse_attention.py --device cuda --dtype bfloat16
    python benchmarks/sparse_attention.py --quick                         # seconds: whether it runs

Inputs are `random` (no structure: what is left out is as good as what is kept) or `smooth` (queries and keys are smooth
over the image, so that means of blocks say something). Neither is a trained network's. Times include the prediction.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowaccel.evaluation import environment, measure_latency
from flowaccel.methods.sparse_attention.attention import (
    BACKENDS,
    SparseRule,
    chosen_backend,
    predicted_blocks,
    sparse_attention,
)

RESULTS = Path(__file__).parent / "results"
LENGTHS, KEEP, TEXT, HEADS, WIDTH = (1024, 4096, 8192), (0.75, 0.6, 0.5, 0.25), 333, 4, 64


def main() -> None:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the image")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="one length and two rounds; no numbers to quote")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_attention"))
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--quick has no numbers to --record")
    if arguments.quick:
        arguments.lengths, arguments.rounds = (1024,), 2
    device = torch.device(arguments.device)
    rows = [
        row
        for tokens in arguments.lengths
        for text in (0, TEXT)
        for inputs in ("random", "smooth")
        for row in timed(tokens, text, inputs, arguments)
    ]
    backend = chosen_backend(arguments.backend, device)
    data = {"environment": environment(device), "dtype": arguments.dtype, "backend": backend, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"sparse_attention_{device.type}" + ("" if arguments.dtype == "float32" else f"_{arguments.dtype}")
    (arguments.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(arguments.out / f"{name}.json", RESULTS / f"{name}.json")


@torch.no_grad()
def timed(tokens: int, text: int, inputs: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every share of the key blocks against full attention, on the same inputs."""
    device = torch.device(arguments.device)
    query, key, value = made(tokens, text, inputs, arguments.seed, device, getattr(torch, arguments.dtype))

    def sparse(keep: float) -> tuple[Tensor, int | Tensor]:
        blocks = predicted_blocks(query[:, :, :tokens], key[:, :, :tokens], keep, SparseRule())
        return sparse_attention(query, key, value, blocks, arguments.backend)

    def full() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    calls = {"full": full, **{str(keep): lambda keep=keep: sparse(keep) for keep in KEEP}}
    timings = measure_latency(calls, rounds=arguments.rounds, max_warmup=3, device=device)
    exact, length, found = full().double(), tokens + text, []
    for keep in KEEP:
        output, pairs = sparse(keep)
        rule = SparseRule()
        predicting = HEADS * WIDTH * (tokens // rule.query_block) * (tokens // rule.key_block)
        macs = (2 * WIDTH * int(pairs) + predicting) / (2 * WIDTH * HEADS * length**2)
        ratio = timings[str(keep)].ratio_to(timings["full"])
        row = {
            "tokens": tokens,
            "text": text,
            "inputs": inputs,
            "keep": keep,
            "ms": 1000 * timings[str(keep)].median,
            "full_ms": 1000 * timings["full"].median,
            "times_full": ratio.value,
            "ci95": list(ratio.ci95),
            "macs_times_full": macs,
            "realised_over_ideal": macs / ratio.value,
            "rel_l2": float((output.double() - exact).norm() / exact.norm()),
            "throttled": timings[str(keep)].throttled,
        }
        found.append(row)
        print(
            f"{tokens:>5}+{text:<3} {inputs:<6} keep {keep:<4} {row['ms']:9.2f} ms {row['times_full']:5.2f}x full "
            f"[{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}], multiply-adds {macs:.2f}x, realised/ideal "
            f"{row['realised_over_ideal']:.2f}, error {row['rel_l2']:.4f}"
        )
    return found


def made(tokens: int, text: int, inputs: str, seed: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values (1, HEADS, tokens + text, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(1, HEADS, tokens + text, WIDTH, generator=generator) for _ in range(3)]
    if inputs == "smooth":
        coarse = [torch.randn(HEADS * WIDTH, 1, tokens // 256, generator=generator) for _ in range(2)]
        for part, rough in zip(parts[:2], coarse, strict=True):
            smooth = functional.interpolate(rough, tokens, mode="linear").view(HEADS, WIDTH, tokens).transpose(1, 2)
            part[0, :, :tokens] = 2 * smooth + 0.5 * part[0, :, :tokens]
    return [part.to(device, dtype) for part in parts]


if __name__ == "__main__":
    main()
