"""Pictures of a results dict: the Pareto plot of quality against time, and contact sheets of samples."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .schema import Metric, Results, Row
from .tables import metric_displays

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

PARETO_METRICS = ("fid", "fid_inf", "kid", "attribute_accuracy", "clip_score", "rel_l2")
"""The quality axis is the first of these that the results have, unless one is named."""

_MOST_NAMES = 12
_NEAR = 13  # typographic points; a name farther from its marker gets a line to it
_CAPTION_LINE, _CAPTION_LINES = 12, 6  # pixels and number
_BASELINE_COLOUR = "#444444"
# Okabe and Ito's palette, distinguishable with every common colour vision; the marker repeats the information.
_STYLES = tuple(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "sD^vPX", strict=True))


def pareto(rows: Sequence[Row], metric: str) -> set[str]:
    """Names of the rows that no other row dominates in latency (median) and in `metric`.

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
    """The metric of the quality axis; a ValueError says which metrics there are when none of the usual ones is."""
    names = metric_displays(results["rows"])
    for name in PARETO_METRICS:
        if name in names:
            return name
    raise ValueError(
        f"the results have none of {', '.join(PARETO_METRICS)} for the quality axis: "
        f"pass metric= one of {', '.join(names) or '(there are no metrics)'}"
    )


def _has_value(entry: Row, metric: str) -> bool:
    return metric in entry["metrics"] and entry["metrics"][metric]["value"] is not None


def _loss(metric: Metric) -> float:
    """The value with the sign that makes less better."""
    assert metric["value"] is not None
    return -metric["value"] if metric["higher_is_better"] else metric["value"]


def pareto_png(results: Results, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Plot quality against milliseconds per image, 1600 x 1040 pixels, readable at half that size.

    The grey line is the untouched pipeline with fewer steps: an accelerator is worth its name only on the good side of
    it. Filled markers are Pareto-optimal. Error bars: the 10th to 90th percentile of rounds, and 1.96 standard errors.
    Of more than twelve rows only the Pareto-optimal and the untouched ones are named.

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
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    untouched = results["rows"][0]["recipe"]
    _draw_rows(axes, rows, metric, untouched=untouched)
    _dress(axes, rows, metric)
    canvas.draw()  # the layout must be final before labels can be kept from touching
    figure.set_layout_engine("none")
    _place_labels(axes, canvas, rows, metric, _named(rows, metric, untouched))
    figure.savefig(Path(path), format="png")


def _family(entry: Row, untouched: str) -> str:
    """Rows of one family share a colour: the row's own key, else its name up to "@"."""
    stem = entry["recipe"].partition("@")[0]
    return untouched if stem in (untouched, "baseline") else entry.get("family", stem)


def _xy(entry: Row, metric: str) -> tuple[float, float]:
    value = entry["metrics"][metric]["value"]
    assert value is not None
    return entry["latency_ms_per_image"]["median"], value


def _draw_rows(axes: Axes, rows: Sequence[Row], metric: str, *, untouched: str) -> None:
    front = pareto(rows, metric)
    families: dict[str, list[Row]] = {}
    for entry in sorted(rows, key=lambda entry: entry["latency_ms_per_image"]["median"]):
        families.setdefault(_family(entry, untouched), []).append(entry)
    others = [name for name in dict.fromkeys(_family(entry, untouched) for entry in rows) if name != untouched]
    styles = {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(others)}
    handles, labels = [], []
    for name in ([untouched] if untouched in families else []) + others:
        beat = name == untouched
        colour, marker = (_BASELINE_COLOUR, "o") if beat else styles[name]
        points = [_xy(entry, metric) for entry in families[name]]
        axes.plot(*zip(*points, strict=True), color=colour, lw=2 if beat else 1, alpha=0.5 if beat else 0.35, zorder=1)
        for entry in families[name]:
            _draw_point(axes, entry, metric, colour, marker, filled=entry["recipe"] in front)
        handles.append(axes.plot([], [], color=colour, marker=marker, lw=2 if beat else 1)[0])
        labels.append("the line to beat: untouched pipeline with fewer steps" if beat else _short(name))
    for text in axes.legend(handles, labels, fontsize=9, framealpha=0.85, loc="best").get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign


def _draw_point(axes: Axes, entry: Row, metric: str, colour: str, marker: str, *, filled: bool) -> None:
    (x, y), latency = _xy(entry, metric), entry["latency_ms_per_image"]
    spread = [[max(0.0, x - latency["p10"])], [max(0.0, latency["p90"] - x)]]
    half = 1.96 * (entry["metrics"][metric]["stderr"] or 0.0)
    axes.errorbar(
        x, y, xerr=spread, yerr=half, fmt=marker, ms=8, mew=1.6, color=colour, mfc=colour if filled else "white",
        ecolor=colour, elinewidth=1.2, capsize=3, zorder=3,
    )  # fmt: skip


def _dress(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Scales, ticks and axis labels."""
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
        axes.margins(y=0.15)
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


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, as many as can be read: few per decade for a wide range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _short(text: str, limit: int = 34) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _named(rows: Sequence[Row], metric: str, untouched: str) -> set[str]:
    """The rows whose names fit into the plot."""
    if len(rows) <= _MOST_NAMES:
        return {entry["recipe"] for entry in rows}
    return pareto(rows, metric) | {entry["recipe"] for entry in rows if _family(entry, untouched) == untouched}


def _place_labels(
    axes: Axes, canvas: FigureCanvasAgg, rows: Sequence[Row], metric: str, named: Collection[str]
) -> None:
    """Name the points of the rows in `named`, each at the free place nearest to it: greedy, off markers, lines, legend
    and the other names.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = canvas.get_renderer()
    pixels = axes.figure.dpi / 72  # per point of the offsets
    points = [axes.transData.transform(_xy(entry, metric)) for entry in rows]
    taken = [_square(x, y, 12 * pixels) for x, y in points]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent(renderer))
    crossed, inside = _line_boxes(axes, 5 * pixels), axes.get_window_extent(renderer)
    for entry, (x, y) in zip(rows, points, strict=True):
        if entry["recipe"] not in named:
            continue
        label = axes.annotate(
            _short(entry["recipe"], 26), _xy(entry, metric), xytext=(0, 0), textcoords="offset points", fontsize=9,
            parse_math=False, ha="center", va="center", zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        size = label.get_window_extent(renderer)
        places = []
        for gap, dx, dy in _offsets(size.width / pixels, size.height / pixels):
            left, bottom = x + dx * pixels - size.width / 2, y + dy * pixels - size.height / 2
            place = Bbox.from_bounds(left, bottom, size.width, size.height)
            hidden = sum(_overlap(place, other) for other in taken)
            struck = sum(_overlap(place, other) for other in crossed)
            outside = size.width * size.height - _overlap(place, inside)
            # a name far from its point reads as another point's: rather cross a line, never hide a name or a marker
            places.append((20 * hidden + struck + 4 * outside + 4 * gap * pixels**2, gap, (dx, dy), place))
        _, gap, label.xyann, chosen = min(places, key=lambda candidate: candidate[0])
        taken.append(chosen)
        if gap > _NEAR:
            axes.annotate(
                "", _xy(entry, metric), xytext=label.xyann, textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "-", "lw": 0.8, "color": "#777777", "shrinkB": 5},
            )  # fmt: skip


def _offsets(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Gap to the point, and where the centre of a label may then lie relative to it, all in typographic points."""
    for gap in (8, 13, 20, 30, 44):
        across, up = width / 2 + gap, height / 2 + gap
        for dx, dy in itertools.product((across, -across, 0), (0, up / 2, -up / 2, up, -up)):
            if dx or abs(dy) == up:  # else it would cover the point
                yield gap, dx, dy


def _line_boxes(axes: Axes, size: float) -> list[Bbox]:
    """Small squares along every line and error bar, in pixels."""
    from matplotlib.collections import LineCollection

    paths = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            paths += [np.asarray(segment) for segment in bars.get_segments()]
    boxes = []
    for path in paths:
        for start, end in itertools.pairwise(axes.transData.transform(path) if len(path) else []):
            steps = max(1, round(math.dist(start, end) / size))
            places = [start + (end - start) * step / steps for step in range(steps + 1)]
            boxes += [_square(x, y, size) for x, y in places]
    return boxes


def _square(x: float, y: float, size: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(x - size / 2, y - size / 2, size, size)


def _overlap(one: Bbox, other: Bbox) -> float:
    """Shared area in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))


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
        captions: what stands above each column, such as its prompt; none where empty.

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
    """The words of `text` in lines of `width` pixels at most, as far as single words fit; six lines, the last cut."""
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
