"""Tables of a results dict, made once as `Cell`s and rendered for the console, for Markdown or for HTML.

Bold means one thing only: the 95 % interval of a difference to the untouched pipeline excludes "equal".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from flowaccel.evaluation.results import MetricEntry, Results, RowEntry

GLOSSARY = {
    "evals": "Evaluations of the base network per image, the count papers quote; guidance does not double it. Below, "
    "rows of a small network that stands in for the base network.",
    "MACs": "Multiply-adds per image in matrix products, convolutions and attention, counted on the run itself; below, "
    "how many times fewer than the untouched pipeline.",
    "ms/image": "Milliseconds per image of one whole pipeline call, median over interleaved rounds; below, the 10th to "
    "90th percentile.",
    "speed-up": "Wall-clock time of the untouched pipeline divided by that of the row, median of the ratios in each "
    "round; below, its 95 % interval.",
    "±": "1.96 standard errors of the value. It says how far the value would move with other samples; to compare two "
    "rows read the difference, which uses the same samples on both sides and is far sharper.",
    "difference": "Second line of a quality cell: this row minus the untouched pipeline, and its 95 % interval. Bold, "
    "with better or worse, only where the interval excludes zero.",
    "Pareto": "No other row is both at least as fast and at least as good, and better in one of the two.",
}

METRIC_GLOSSARY = {
    "fid": "Distance between the feature statistics of samples and reference; depends on n, so compare only equal n.",
    "fid_inf": "The same distance extrapolated to infinitely many samples.",
    "kid": "Squared kernel distance between features of samples and reference; unbiased at any n, can be below zero.",
    "clip_score": "100 times the cosine similarity of image and prompt under the named text-image network, at least 0.",
    "class_accuracy": "Share of samples in which a classifier sees the class that was asked for.",
    "attribute_accuracy": "Share of samples in which a classifier sees everything that the prompt states.",
    "precision": "Share of samples that lie within the manifold of the reference: fidelity.",
    "recall": "Share of the reference that lies within the manifold of the samples: variety.",
    "psnr": "Peak signal-to-noise ratio to the untouched image of the same seed, in dB, over images that differ.",
    "ssim": "Structural similarity to the untouched image of the same seed; 1 is identical.",
    "rel_l2": "Relative L2 distance to the untouched result of the same seed; 0 is identical.",
}

_NARROW = ("MACs", "ms/image")
_NAME_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Table cell: a main line and a smaller second line."""

    text: str
    note: str = ""
    verdict: str = ""
    """Ends the second line where a difference is certain: better, worse, slower."""
    bold: bool = False
    """Whether the interval in the note excludes the untouched pipeline."""


def console_table(results: Results) -> Table:
    """Return the results as a table for a terminal; 90 columns show one metric without folding, 120 show two.

    To save width the second lines of MACs and ms/image are left out, and better or worse is green or red.
    """
    header, body = cells(results)
    remarks = "".join(f"\n{entry['recipe']}: {entry['remark']}" for entry in results["rows"] if "remark" in entry)
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption=Text(
            "±: 1.96 standard errors. Second lines: 95 % interval; difference to the first row with its interval, "
            f"bold where it excludes equality.{remarks}"
        ),
        caption_justify="left",
    )
    for index, name in enumerate(header):  # Text, not str: a name is not markup
        whole = index == 0 and max(len(line[0].text) for line in body) <= _NAME_WIDTH  # short names stay on one line
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(Text(name), justify=justify, overflow="fold", vertical="top", no_wrap=whole)
    for line in body:
        table.add_row(*(_rich_cell(cell, header[index] not in _NARROW) for index, cell in enumerate(line)))
    return table


def markdown_table(results: Results) -> str:
    """Return the results as a GitHub-flavoured Markdown table, ending with a newline."""
    header, body = cells(results)
    lines = [[_markdown(name) for name in header], ["---", *["---:"] * (len(header) - 1)]]
    for entry in body:
        lines.append([_markdown_cell(cell) for cell in entry])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Return the column names, and one list of cells per row."""
    rows = results["rows"]
    metrics = metric_displays(rows)
    arrows = {name: "higher" if rows_metric["higher_is_better"] else "lower" for name, rows_metric in metrics.items()}
    header = ["row", "evals", "MACs", "ms/image", "speed-up"]
    header += [f"{metric['display']} ({arrows[name]} is better)" for name, metric in metrics.items()]
    untouched = rows[0]["recipe"]
    return header, [
        [*_cost_cells(entry, untouched), *(_metric_cell(entry, name, untouched) for name in metrics)] for entry in rows
    ]


def metric_displays(rows: Iterable[RowEntry]) -> dict[str, MetricEntry]:
    """Return every metric name in the order it first appears, with one metric that has it."""
    found: dict[str, MetricEntry] = {}
    for entry in rows:
        for name, metric in entry["metrics"].items():
            found.setdefault(name, metric)
    return found


def _cost_cells(entry: RowEntry, untouched: str) -> list[Cell]:
    latency, speedup = entry["latency_ms_per_image"], entry["speedup"]
    refiner, macs = entry.get("refiner_rows", 0), entry.get("macs_per_image")
    fewer = f"{speedup['macs']:.2f}x fewer" if "macs" in speedup and entry["recipe"] != untouched else ""
    spread = f"{_figures(latency['p10'])} to {_figures(latency['p90'])}"
    if entry.get("throttled", False):
        spread += ", machine slowed down"
    if "own_process" in entry:
        spread += ", own process"
    low, high = speedup["wall_clock"]["ci95"]
    speed = Cell(text="1x", note="untouched")
    if entry["recipe"] != untouched:
        speed = Cell(
            text=f"{speedup['wall_clock']['value']:.2f}x",
            note=f"{low:.2f} to {high:.2f}",
            verdict="slower" if high < 1 else "",
            bold=low > 1 or high < 1,
        )
    return [
        Cell(text=entry["recipe"], note="Pareto" if entry.get("pareto", False) else ""),
        Cell(text=f"{entry['nfe']:g}", note=f"+ {refiner:g} small" if refiner else ""),
        Cell(text=_si(macs) if macs is not None else "-", note=fewer),
        Cell(text=_figures(latency["median"]), note=spread),
        speed,
    ]


def _metric_cell(entry: RowEntry, name: str, untouched: str) -> Cell:
    metric = entry["metrics"].get(name)
    if metric is None:
        return Cell(text="-")
    if metric["value"] is None:
        return Cell(text="undefined", note="all identical" if metric.get("identical_fraction") == 1 else "")
    text = _plus_minus(metric["value"], metric["stderr"])
    versus = metric.get("versus", {}).get(untouched)
    if entry["recipe"] == untouched or versus is None:
        return Cell(text=text)
    low, high = versus["ci95"]
    digits = _decimals((high - low) / 2 or abs(versus["difference"]))
    note = f"{versus['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    if not (low > 0 or high < 0):
        return Cell(text=text, note=note)
    verdict = "better" if (low > 0) == metric["higher_is_better"] else "worse"
    return Cell(text=text, note=note, verdict=verdict, bold=True)


def _decimals(uncertainty: float) -> int:
    """Return the number of decimals that shows two figures of an uncertainty."""
    return min(6, max(0, 1 - math.floor(math.log10(uncertainty)))) if uncertainty > 0 else 3


def _plus_minus(value: float, stderr: float | None) -> str:
    if not stderr:
        return _figures(value)
    digits = _decimals(1.96 * stderr)
    return f"{value:.{digits}f} ± {1.96 * stderr:.{digits}f}"


def _figures(value: float) -> str:
    """Format three significant figures without an exponent for everyday sizes, all figures of the integer part."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _si(value: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:g}"


def _rich_cell(cell: Cell, with_note: bool) -> Text:
    text = Text(cell.text)
    if cell.note and with_note:
        colour = {"": "", "better": " green"}.get(cell.verdict, " red")
        text.append(f"\n{cell.note}", style=f"bold{colour}" if cell.bold else "dim")
    return text


def _markdown_cell(cell: Cell) -> str:
    note = _markdown(f"{cell.note} {cell.verdict}".strip())
    return _markdown(cell.text) + (f"<br>{f'**{note}**' if cell.bold else note}" if note else "")


def _markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, on one line of a table."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
