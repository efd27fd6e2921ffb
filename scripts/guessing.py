"""Can a newcomer find things? Draw names of what users meet, and score guesses of the file that each is in.

    python scripts/guessing.py > names.txt            # 21 names, one a line
    python scripts/guessing.py --answers answers.txt  # "name: path" a line, in any order

A reader who has README.md and the list of files, and no search in them, names a file for each; the first answer counts.
Right is the file where the thing is written down or described: of a preset its entry or its class, of a metric its
estimator or its formula.
"""

from __future__ import annotations

import argparse
import inspect
import random
from pathlib import Path
from typing import Any

from flowaccel.caching.gates import GATES
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.cli.app import COMMANDS
from flowaccel.evaluation.metrics import frechet, kid, pixel_metrics, precision_recall
from flowaccel.evaluation.metrics.table import METRICS
from flowaccel.recipe import registry
from flowaccel.recipe.sampler import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
DRAWN = 21
FORMULAS = {
    "fid": frechet,
    "fid_inf": frechet,
    "kid": kid,
    "precision": precision_recall,
    "recall": precision_recall,
    "psnr": pixel_metrics,
    "ssim": pixel_metrics,
    "rel_l2": pixel_metrics,
}


def truth() -> dict[str, set[str]]:
    """Return the files that are right for every name."""
    found: dict[str, set[str]] = {}
    for method in registry.all_methods():
        for name, preset in method.presets.items():
            right = {_file(registry.load(preset.make))}
            right |= {_file(registry.load(reference)) for reference in method.accelerators.values()}
            if name in CACHE_PRESETS:
                right = {f"flowaccel/caching/presets/{name}.py"}
            if name in SAMPLERS:
                right = {_file(SAMPLERS[name][0]), "flowaccel/methods/samplers/__init__.py"}
            found[f"preset {name}"] = right
        for name, reference in {**method.train, **method.commands}.items():
            found[f"command {'train ' if name in method.train else ''}{name}"] = {_file(registry.load(reference))}
    found |= {f"command {name}": {_file(registry.load(reference))} for name, reference in COMMANDS.items()}
    found |= {f"gate {name}": {_file(gate)} for name, gate in GATES.items()}
    for name, metric in METRICS.items():
        found[f"metric {name}"] = {_file(metric.estimate)} | ({_file(FORMULAS[name])} if name in FORMULAS else set())
    return found


def _file(value: Any) -> str:
    return Path(inspect.getfile(inspect.unwrap(value))).resolve().relative_to(ROOT).as_posix()


def main() -> None:
    """Print the names, or the score of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, help="lines of `name: path`")
    arguments = parser.parse_args()
    right = truth()
    names = random.Random(0).sample(sorted(right), DRAWN)
    if arguments.answers is None:
        print("\n".join(names))
        return
    given = dict(line.split(": ", 1) for line in arguments.answers.read_text().splitlines() if ": " in line)
    hits = [name for name in names if given.get(name, "").strip() in right[name]]
    for name in names:
        print(f"{'right' if name in hits else 'WRONG'}  {name}: {given.get(name)} ({' or '.join(sorted(right[name]))})")
    print(f"{len(hits)} of {len(names)} right")


if __name__ == "__main__":
    main()
