"""CPU seconds of commands that only list and help, and of imports, each in a process of its own.

python benchmarks/startup.py            # best of three
python benchmarks/startup.py --record   # and write benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from flowaccel.evaluation import environment

RESULTS = Path(__file__).parent / "results"
MEASURED = {
    "flowaccel --help": ["-m", "flowaccel", "--help"],
    "flowaccel --version": ["-m", "flowaccel", "--version"],
    "flowaccel recipes": ["-m", "flowaccel", "recipes"],
    "flowaccel zoo list": ["-m", "flowaccel", "zoo", "list"],
    "import torch, diffusers": ["-c", "import torch, diffusers"],
    "import torch, diffusers, flowaccel": ["-c", "import torch, diffusers, flowaccel"],
}


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in turns, print, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the results to benchmarks/results/")
    arguments = parser.parse_args()
    rounds = [{name: cpu_seconds(command) for name, command in MEASURED.items()} for _ in range(arguments.rounds)]
    best = {name: round(min(found[name] for found in rounds), 2) for name in MEASURED}
    for name, seconds in best.items():
        print(f"{seconds:6.2f} s  {name}")
    if arguments.record:
        written = {"cpu_seconds": best, "rounds": arguments.rounds, "environment": environment()}
        (RESULTS / "startup.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
