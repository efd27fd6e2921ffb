"""Calls with random weights, timed against the first of them beside their multiply-adds, for the other scripts."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowaccel.evaluation import count_macs, environment, measure_latency

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


def randomized(network: nn.Module, seed: int) -> nn.Module:
    """Every weight drawn, also those that begin at 0, with gradients off."""
    torch.manual_seed(seed)
    for parameter in network.eval().requires_grad_(False).parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape))
    return network


def timed(
    calls: Mapping[str, Call],
    arguments: argparse.Namespace,
    within: Mapping[str, Any] | None = None,
    max_warmup: int = 5,
) -> dict[str, dict[str, Any]]:
    """Every call against the first: the speed-up that is realised, that of the multiply-adds, and their quotient.

    `within` are contexts, by name, to make every call in; rounds of warm-up end when they agree, or after `max_warmup`.
    """
    macs = {}
    for name, call in calls.items():
        with (within or {}).get(name, nullcontext)():
            macs[name] = count_macs(call)
    timings = measure_latency(
        calls, rounds=arguments.rounds, max_warmup=max_warmup, device=arguments.device, within=within
    )
    first = next(iter(calls))
    found = {}
    for name, timing in timings.items():
        speedup = timings[first].ratio_to(timing)
        ideal = macs[first] / macs[name]
        found[name] = {
            "ms": 1000 * timing.median,
            "speedup": speedup.value,
            "ci95": list(speedup.ci95),
            "macs": macs[name],
            "ideal": ideal,
            "realised_over_ideal": speedup.value / ideal,
            "throttled": timing.throttled,
        }
    return found


def show(title: str, calls: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for every call."""
    print(title)
    room = max(map(len, calls))
    for name, call in calls.items():
        print(
            f"  {name:<{room}} {call['ms']:9.2f} ms  {call['speedup']:.2f}x [{call['ci95'][0]:.2f}, "
            f"{call['ci95'][1]:.2f}]  {call['macs'] / 1e9:8.2f} GMACs  ideal {call['ideal']:.2f}x  realised/ideal "
            f"{call['realised_over_ideal']:.2f}{'  (slowed down while timed)' if call['throttled'] else ''}",
            flush=True,
        )


def write(arguments: argparse.Namespace, script: str, stage: str, **found: Any) -> None:
    """STAGE.json in --out, and SCRIPT_STAGE_DEVICE.json among the results if they are to be recorded."""
    device = torch.device(arguments.device)
    data = {"environment": environment(device), "dtype": arguments.dtype, **found}
    target = arguments.out / f"{stage}.json"
    target.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(target, RESULTS / f"{script}_{stage}_{device.type}.json")
