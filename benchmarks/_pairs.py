"""Paired comparisons of rows, for the other scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowaccel.evaluation import compare_rows


def compared(run: Path, results: Any, a: str, b: str) -> dict[str, Any]:
    """Paired differences of two rows, and how much faster the first is."""
    rows = {entry["recipe"]: entry for entry in results["rows"]}
    versus = compare_rows(run, a, b)
    low, high = versus["wall_clock"]["ci95"]
    return {
        "a": a,
        "b": b,
        "faster": 1 / versus["wall_clock"]["ratio"],
        "faster_ci95": [1 / high, 1 / low],
        "fewer_macs": rows[b]["macs_per_image"] / rows[a]["macs_per_image"],
        "fid_a": rows[a]["metrics"]["fid"]["value"],
        "fid_b": rows[b]["metrics"]["fid"]["value"],
        "metrics": versus["metrics"],
    }


def pairs_table(found: list[dict[str, Any]]) -> str:
    lines = ["| row | against | faster | fewer multiply-adds | Frechet distance, paired difference |", "|" + "---|" * 5]
    for entry in found:
        fid = entry["metrics"]["fid"]
        low, high = fid["ci95"]
        verdict = "worse" if low > 0 else "better" if high < 0 else "not worse" if fid["not_worse"] else "not shown"
        lines.append(
            f"| {entry['a']} | {entry['b']} | {entry['faster']:.2f}x [{entry['faster_ci95'][0]:.2f}, "
            f"{entry['faster_ci95'][1]:.2f}] | {entry['fewer_macs']:.2f}x | {fid['difference']:+.3f} [{low:+.3f}, "
            f"{high:+.3f}] of {entry['fid_b']:.3f}: {verdict} |"
        )
    return "\n".join(lines)
