"""Figures of a results dict: the Pareto plot of quality against time, and contact sheets of samples."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowaccel.evaluation.reporting.tables import metric_displays
from flowaccel.evaluation.results import MetricEntry, Results, RowEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARETO_METRICS = ("fid", "fid_inf", "kid", "attribute_accuracy", "clip_score", "rel_l2")
"""Metrics of the quality axis, in order of preference, unless one is named."""

_MOST_LINES = 40  # of one column of names
_NEAR = 12  # typographic points; of nearer rows the numbers would cover each other
_CAPTION_LINE, _CAPTION_LINES = 12, 6  # pixels and number
_BASELINE_COLOUR = "#444444"
# Okabe and Ito's palette, distinguishable with every common colour vision; the marker repeats the information.
_STYLES = tuple(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "sD^vPX", strict=True))


def pareto(rows: Sequence[RowEntry], metric: str) -> set[str]:
    """Return the names of the rows that no other row dominates in latency (median) and in `metric`.

    A row dominates another when it is at least as fast and at least as good, and better in one of the two; so exact
    ties stay together. Rows without the metric, or with an undefined value, are not in the set.
    """
    points = {
        entry["recipe"]: (entry["latency_ms_per_image"]["median"], _loss(entry["metrics"][metric]))
        for entry in rows
        if _has_value(entry, metric)
    }
    return {
        name
        for name, point in points.items()
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points.values())
    }


def primary_metric(results: Results) -> str:
    """Return the metric of the quality axis.

    A ValueError says which metrics there are when none of the usual ones is.
    """
    names = metric_displays(results["rows"])
    for name in PARETO_METRICS:
        if name in names:
            return name
    raise ValueError(
        f"the results have none of {', '.join(PARETO_METRICS)} for the quality axis: "
        f"pass metric= one of {', '.join(names) or '(there are no metrics)'}"
    )


def _has_value(entry: RowEntry, metric: str) -> bool:
    return metric in entry["metrics"] and entry["metrics"][metric]["value"] is not None


def _loss(metric: MetricEntry) -> float:
    """Return the value with the sign that makes less better."""
    assert metric["value"] is not None
    return -metric["value"] if metric["higher_is_better"] else metric["value"]


def pareto_png(results: Results, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Plot quality against milliseconds per image, 1600 x 1040 pixels, readable at half that size.

    The grey line is the untouched pipeline with fewer steps: an accelerator is worth its name only on the good side of
    it. Filled markers are Pareto-optimal. Error bars: the 10th to 90th percentile of rounds, and 1.96 standard errors;
    what leaves the axes is cut off there. Numbers stand for the rows, in their order in the results; the list beside
    the plot has their names.

    Raises:
        ValueError: no row has a value of `metric`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of import that a table does not need
    from matplotlib.figure import Figure

    metric = primary_metric(results) if metric is None else metric
    rows = [entry for entry in results["rows"] if _has_value(entry, metric)]
    if not rows:
        known = ", ".join(metric_displays(results["rows"])) or "(there are no metrics)"
        raise ValueError(f"no row has a value of metric {metric!r}: choose one of {known}")
    figure = Figure(figsize=(8, 5.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _dress(axes, rows, metric)
    _draw_rows(axes, rows, metric, untouched=results["rows"][0]["recipe"])
    figure.draw_without_rendering()  # the layout must be final before it is known which points are near each other
    figure.set_layout_engine("none")
    _number(axes, rows, metric)
    figure.savefig(Path(path), format="png")


def _family(entry: RowEntry, untouched: str) -> str:
    """Return the row's family, which has one colour: the row's own key, else its name up to "@"."""
    stem = entry["recipe"].partition("@")[0]
    return untouched if stem in (untouched, "baseline") else entry.get("family", stem)


def _xy(entry: RowEntry, metric: str) -> tuple[float, float]:
    value = entry["metrics"][metric]["value"]
    assert value is not None
    return entry["latency_ms_per_image"]["median"], value


def _half(entry: RowEntry, metric: str) -> float:
    """Return the length of an error bar to either side."""
    return 1.96 * (entry["metrics"][metric]["stderr"] or 0.0)


def _draw_rows(axes: Axes, rows: Sequence[RowEntry], metric: str, *, untouched: str) -> None:
    front = pareto(rows, metric)
    families: dict[str, list[RowEntry]] = {}
    for entry in sorted(rows, key=lambda entry: entry["latency_ms_per_image"]["median"]):
        families.setdefault(_family(entry, untouched), []).append(entry)
    others = [name for name in dict.fromkeys(_family(entry, untouched) for entry in rows) if name != untouched]
    styles = {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(others)}
    styles[untouched] = _BASELINE_COLOUR, "o"
    for name, members in families.items():
        beat, (colour, _) = name == untouched, styles[name]
        points = [_xy(entry, metric) for entry in members]
        axes.plot(*zip(*points, strict=True), color=colour, lw=2 if beat else 1, alpha=0.5 if beat else 0.35, zorder=1)
    columns = -(-len(rows) // _MOST_LINES)
    size = min(1.0, 22 / (len(rows) / columns + 1))  # of 22 lines all fit
    handles = []
    for entry in rows:
        colour, marker = styles[_family(entry, untouched)]
        fill = colour if entry["recipe"] in front else "white"
        handles.append(axes.plot([], [], marker, ms=7 * size, mew=1.6 * size, color=colour, mfc=fill)[0])
        _draw_point(axes, entry, metric, colour, marker, fill)
    labels = [f"{number}  {_short(entry['recipe'])}" for number, entry in enumerate(rows, 1)]
    handles.append(axes.plot([], [], color=_BASELINE_COLOUR, lw=2, alpha=0.5)[0])
    labels.append("the line to beat: the untouched\npipeline with fewer steps")
    legend = axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, ncols=columns,
        fontsize=8.5 * size, handlelength=1.2, columnspacing=1,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign


def _draw_point(axes: Axes, entry: RowEntry, metric: str, colour: str, marker: str, fill: str) -> None:
    (x, y), latency, half = _xy(entry, metric), entry["latency_ms_per_image"], _half(entry, metric)
    low, high = axes.get_ylim()
    reach = high / low if axes.get_yscale() == "log" else high - low
    # The axes cut off what leaves them; on a logarithmic one nothing may go down to zero.
    down = min(half, y - low / reach if axes.get_yscale() == "log" else half)
    spread = [[max(0.0, x - latency["p10"])], [max(0.0, latency["p90"] - x)]]
    axes.errorbar(
        x, y, xerr=spread, yerr=[[down], [half]], fmt=marker, ms=8, mew=1.6, color=colour, mfc=fill,
        ecolor=colour, elinewidth=1.2, capsize=3, zorder=3,
    )  # fmt: skip


def _dress(axes: Axes, rows: Sequence[RowEntry], metric: str) -> None:
    """Set scales, limits, ticks and axis labels."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    times = [entry["latency_ms_per_image"]["median"] for entry in rows]
    values = [_xy(entry, metric)[1] for entry in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.35, max(times) * 1.35)
    axes.set_xticks(_log_ticks(min(times) / 1.35, max(times) * 1.35))
    if min(values) > 0 and max(values) / min(values) > 5:
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
        axes.set_yticks(_log_ticks(min(values) / 1.5, max(values) * 1.5))
    else:
        axes.set_ylim(*_linear_limits(values, [_half(entry, metric) for entry in rows]))
    for axis in [axes.xaxis] + ([axes.yaxis] if axes.get_yscale() == "log" else []):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    shown = rows[0]["metrics"][metric]
    better = "higher" if shown["higher_is_better"] else "lower"
    axes.set_xlabel("milliseconds per image (log scale, faster is left)", fontsize=11)
    axes.set_ylabel(f"{_short(shown['display'], 58)}\n({better} is better)", fontsize=11, parse_math=False)
    axes.set_title(
        "filled: no other row is both faster and better; bars: p10 to p90, and 1.96 standard errors",
        fontsize=9, color="#444444", loc="left",
    )  # fmt: skip
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _linear_limits(values: Sequence[float], halves: Sequence[float]) -> tuple[float, float]:
    """Return limits that hold all points and, except for bars much longer than the others, all error bars."""
    least, most = min(values), max(values)
    reach = 2 * max(most - least, sorted(halves)[len(halves) // 2])
    low = max(min(value - half for value, half in zip(values, halves, strict=True)), least - reach)
    high = min(max(value + half for value, half in zip(values, halves, strict=True)), most + reach)
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two bounds, as many as can be read: few per decade for a wide range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _short(text: str, limit: int = 34) -> str:
    """Shorten a text to one line, leaving out the middle, because names differ at their ends."""
    text = " ".join(text.split())
    kept = limit // 2
    return text if len(text) <= limit else f"{text[: limit - kept - 1]}…{text[-kept:]}"


def _number(axes: Axes, rows: Sequence[RowEntry], metric: str) -> None:
    """Write the number of every row beside its point; points that touch share one text."""
    from matplotlib.patheffects import withStroke

    points = [tuple(map(float, axes.transData.transform(_xy(entry, metric)))) for entry in rows]
    middle = axes.transAxes.transform((0.6, 0))[0]
    for group in _together(points, _NEAR * axes.figure.dpi / 72):
        highest = max(group, key=lambda index: points[index][1])
        left = points[highest][0] > middle  # so that a list of many numbers stays within the axes
        axes.annotate(
            _numbers(group), _xy(rows[highest], metric), xytext=(-5 if left else 5, 5), textcoords="offset points",
            ha="right" if left else "left", fontsize=9, zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _numbers(indices: Sequence[int]) -> str:
    """Format rising indices from 0 as numbers from 1: `[0, 2, 3, 4]` -> "1, 3-5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(
        f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 2 else ", ".join(str(i + 1) for i in run) for run in runs
    )


def _together(points: Sequence[Sequence[float]], near: float) -> list[list[int]]:
    """Group the indices of points: each is `near` another of its group, and none is near a point of another group."""
    groups: list[list[int]] = []
    for index, point in enumerate(points):
        touched = [group for group in groups if any(math.dist(point, points[other]) < near for other in group)]
        groups = [group for group in groups if group not in touched] + [[*itertools.chain(*touched), index]]
    return [sorted(group) for group in groups]


def sample_grid(
    images: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    columns: int = 10,
    scale: int | None = None,
    captions: Sequence[str] = (),
) -> None:
    """Write a contact sheet: one line per row, named at the left, one column per sample id.

    Args:
        images: row name to uint8 tensor (N, C, H, W), C 1 or 3; the same shape everywhere and the same ids in the same
            order, so that a column can be compared from top to bottom.
        path: the PNG.
        columns: most samples shown, from the first.
        scale: whole-number enlargement with hard pixel edges; None makes small images at least 64 pixels wide.
        captions: text above each column, such as its prompt; none where empty.

    Raises:
        ValueError: there are no images, or their type or shapes do not fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    shape = _grid_shape(images)
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns and scale must be at least 1, got columns={columns}, scale={scale}")
    count, _, height, width = shape
    count = min(count, columns)
    scale = max(1, -(-64 // width)) if scale is None else scale
    tile_width, tile_height, gap = width * scale, height * scale, 4
    font = ImageFont.load_default(size=14)
    names = [_short(name, 26) for name in images]
    margin = max(math.ceil(font.getlength(name)) for name in names) + 16
    line_height = max(tile_height, 20) + gap
    small = ImageFont.load_default(size=10)
    heads = [_wrapped(caption, tile_width, small.getlength) for caption in captions[:count]]
    head = max((len(lines) for lines in heads), default=0) * _CAPTION_LINE
    sheet = Image.new("RGB", (margin + count * (tile_width + gap), head + len(images) * line_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        for line, text in enumerate(lines):
            draw.text((margin + column * (tile_width + gap), line * _CAPTION_LINE), text, fill="black", font=small)
    for line, (name, batch) in enumerate(zip(names, images.values(), strict=True)):
        top = head + gap + line * line_height
        draw.text((8, top + tile_height // 2), name, fill="black", font=font, anchor="lm")
        for column, pixels in enumerate(batch[:count].cpu()):
            tile = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((tile_width, tile_height), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * (tile_width + gap), top))
    sheet.save(Path(path), format="PNG")


def _wrapped(text: str, width: int, length: Callable[[str], float]) -> list[str]:
    """Wrap `text` into at most six lines of `width` pixels, as far as single words fit; the last line is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= _CAPTION_LINES else [*lines[: _CAPTION_LINES - 1], "..."]


def _grid_shape(images: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    if not images:
        raise ValueError("images is empty: give at least one row name and its uint8 tensor (N, C, H, W)")
    first = next(iter(images.values())).shape
    for name, batch in images.items():
        if batch.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[1] not in (1, 3):
            raise ValueError(
                f"images[{name!r}] must be uint8 of shape (N, 1 or 3, H, W), got {batch.dtype} {tuple(batch.shape)}"
            )
        if batch.shape != first or 0 in batch.shape:
            raise ValueError(
                f"images[{name!r}] has shape {tuple(batch.shape)}, the first row has {tuple(first)}: columns must be "
                "the same sample ids in every row, at least one, and at one size"
            )
    return first[0], first[1], first[2], first[3]
