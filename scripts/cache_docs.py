"""Write docs/caches/: a page per cache preset, from the presets, their docstrings and the recorded benchmark.

python scripts/cache_docs.py          # after a change of a preset or of benchmarks/results/caches_*.json
python scripts/cache_docs.py --check  # exit 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from flowaccel.caching.feature_cache import FeatureCache
from flowaccel.caching.gates import ModulatedInput
from flowaccel.caching.gates.teacache_fits import PUBLISHED, UNUSABLE
from flowaccel.caching.presets import CACHE_PRESETS, CachePreset

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "caches"
RESULTS = ROOT / "benchmarks" / "results" / "caches_sit-digits_cpu.json"
PARTS = ("gate", "scope", "predictor", "guard")


def main() -> None:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    written = pages()
    stale = [
        name for name, text in written.items() if not (PAGES / name).is_file() or (PAGES / name).read_text() != text
    ]
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python scripts/cache_docs.py")
    if not check:
        PAGES.mkdir(exist_ok=True)
        for name, text in written.items():
            (PAGES / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else None
    return {f"{name}.md": page(name, preset, results) for name, preset in CACHE_PRESETS.items()}


def page(name: str, preset: CachePreset, results: Any) -> str:
    """One page."""
    gate = preset.cache.gate
    sections = [
        f"<!-- Written by scripts/cache_docs.py; change the preset or the script instead. -->\n\n# `{name}`",
        f"{preset.summary}\n\nSource: {preset.source}.",
        f'```python\nflowaccel.accelerate(pipe, "{name}")  # or "{name}:{example(preset.cache)}"\n```',
        f"## Rule\n\n{prose(type(gate))}",
        f"## Defaults\n\n{defaults(preset)}",
        f"With `{name}:parity` it is as published: {differences(preset)}.",
        *([f"## Published fits\n\n{fits()}"] if isinstance(gate, ModulatedInput) else []),
        f"## Measured\n\n{measured(name, results)}",
        f"## When not to use it\n\n{preset.avoid}",
    ]
    return "\n\n".join(sections) + "\n"


def example(cache: FeatureCache) -> str:
    """An option with a value of its own."""
    first = fields(cache.gate)[0].name
    value = getattr(cache.gate, first)
    shown = {"threshold": lambda: f"{2 * value:g}", "interval": lambda: f"{value + 1}"}.get(first)
    return f"{first}={shown()}" if shown else f"{first}={'slow' if first in ('codebook', 'mask') else value}"


def prose(kind: type) -> str:
    """A docstring up to its arguments, as Markdown."""
    text = inspect.cleandoc(kind.__doc__ or "")
    text = re.split(r"\n(?:Args|Raises):", text)[0].strip()
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def defaults(preset: CachePreset) -> str:
    """All options with their values and meaning."""
    lines = ["| part | option | default | meaning |", "|---|---|---|---|"]
    for part in PARTS:
        value = getattr(preset.cache, part)
        meanings = arguments(type(value))
        options = [field.name for field in fields(value)]
        first = prose(type(value)).split("\n\n")[0].rstrip(".")
        lines += [f"| {part} `{value.name}` | | | {cell(first)} |"]
        lines += [
            f"| | `{option}` | `{json.dumps(getattr(value, option))}` | {cell(meanings.get(option, ''))} |"
            for option in options
        ]
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return text.replace("|", "\\|").rstrip(".")


def arguments(kind: type) -> dict[str, str]:
    """Argument -> its description in the docstring."""
    text = inspect.cleandoc(kind.__doc__ or "")
    block = re.search(r"\nArgs:\n((?:    .*\n?|\n)+)", text)
    found: dict[str, str] = {}
    for line in block[1].splitlines() if block else ():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def differences(preset: CachePreset) -> str:
    """What parity changes, in words."""
    changes = [] if preset.as_published.decide == preset.cache.decide else [f"decide={preset.as_published.decide!r}"]
    for part in PARTS:
        before, after = getattr(preset.cache, part), getattr(preset.as_published, part)
        if before != after:
            usual = before if type(before) is type(after) else type(after)()
            options = [
                f"{field.name}={json.dumps(getattr(after, field.name))}"
                for field in fields(after)
                if getattr(after, field.name) != getattr(usual, field.name)
            ]
            changes.append(f"{part} `{after.name}`" + (f" with `{', '.join(options)}`" if options else ""))
    return ", ".join(changes) or "the same, because this is the published rule"


def fits() -> str:
    """The table of the published polynomials, and why some are not in it."""
    lines = [
        'Option `coefficients`, such as `teacache:coefficients="flux"`. A fit holds for its very checkpoint. It brings '
        "the first of its thresholds and its guard with it; changes are clipped to the range given here, which was "
        "read off the polynomial, and with `parity` nothing is clipped and negative values are added, as in the "
        "published code.",
        "",
        "| name | fitted to the | changes | published thresholds (speed-up) | first and last steps computed | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, fit in PUBLISHED.items():
        shown = ", ".join(f"{at:g}" + (f" ({speed:g}x)" if speed else "") for at, speed in fit.speedups.items())
        low, high = fit.changes
        lines.append(
            f"| `{name}` | {fit.signal.replace('_', ' ')} | {low:g} to {high:g} | {shown} | {fit.warmup}, {fit.last} "
            f"| {fit.source} |"
        )
    refused = "; ".join(f"`{name}`: {reason}" for name, reason in UNUSABLE.items())
    return "\n".join([*lines, "", f"Not to be had: {refused}."])


def measured(name: str, results: Any) -> str:
    """The rows of the recorded benchmark, between those with fewer steps."""
    rows = [row for row in (results or {"rows": []})["rows"] if row["recipe"].partition(":")[0] == name]
    if not rows:
        return "Not among the recorded rows; `python benchmarks/caches.py --recipes NAME` measures it."
    fewer = [row for row in results["rows"] if row["recipe"].startswith("baseline@")]
    protocol = results["protocol"]
    lines = [
        f"`zoo:sit-digits`, Euler with {protocol['steps']} steps, {protocol['num_samples']} images, two CPU cores; "
        "`python benchmarks/caches.py`. Speed-up is measured time against the untouched pipeline, the error relative "
        "L2 to its images; both with 95% intervals.",
        "",
        "| row | speed-up | error |",
        "|---|---|---|",
    ]
    for row in sorted([*rows, *fewer], key=lambda row: row["speedup"]["wall_clock"]["value"]):
        speed, error = row["speedup"]["wall_clock"], row["metrics"]["rel_l2"]
        shown = "fewer steps: " + row["recipe"].partition("@")[2] if row in fewer else f"`{row['recipe']}`"
        lines.append(f"| {shown} | {interval(speed, 2)}x | {interval(error, 4)} |")
    return "\n".join(lines)


def interval(number: Any, digits: int) -> str:
    """A value with its interval."""
    low, high = number["ci95"]
    return f"{number['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
