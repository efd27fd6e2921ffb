"""Hand-made results through every renderer; nothing in them was measured."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from flowaccel.evaluation import runner
from flowaccel.evaluation.reporting import plots as figures
from flowaccel.evaluation.reporting import report, tables
from flowaccel.evaluation.results import SCHEMA_VERSION, check_results

HOSTILE = "<script>alert(1)</script>$x_{|[bold]`*"


def make_row(
    name: str,
    ms: float,
    fid: float | None,
    *,
    versus: tuple[float, float, float] | None = None,
    higher: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    metric = {
        "value": fid,
        "n": 200,
        "stderr": None if fid is None else 0.1,
        "ci95": None if fid is None else [fid - 0.196, fid + 0.196],
        "higher_is_better": higher,
        "display": "Frechet distance, zoo:small-features, n=200",
    }
    if versus is not None:
        metric["versus"] = {"baseline": {"difference": versus[0], "ci95": [versus[1], versus[2]]}}
    return {
        "recipe": name,
        "num_inference_steps": 10,
        "nfe": 10,
        "macs_per_image": 1.5e9,
        "latency_ms_per_image": {"median": ms, "p10": 0.9 * ms, "p90": 1.1 * ms, "rounds": 10},
        "speedup": {"wall_clock": {"value": 40 / ms, "ci95": [38 / ms, 42 / ms]}, "macs": 2.0},
        "metrics": {"fid": metric},
    } | extra


@pytest.fixture
def results() -> Any:
    return {
        "schema": SCHEMA_VERSION,
        "protocol": {"dataset": "digits", "num_samples": 200, "seed": 0, "batch_size": 5, "metrics": ["fid"]},
        "environment": {"device": "cpu", "torch": "2"},
        "rows": [
            make_row("baseline", 40.0, 2.0),
            make_row("baseline@5", 20.0, 9.0, versus=(7.0, 6.5, 7.5)),
            make_row("heun@5", 21.0, 1.5, versus=(-0.5, -0.7, -0.3), family="heun", pareto=True, refiner_rows=3),
            make_row(HOSTILE, 39.0, 2.1, versus=(0.1, -0.1, 0.3), family="_odd$"),
        ],
    }


def rendered(results: Any, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.console_table(results))
    return console.export_text()


# --- Pareto


def test_pareto_keeps_ties_and_drops_the_dominated() -> None:
    rows: Any = [
        make_row("best", 10.0, 3.0),
        make_row("twin", 10.0, 3.0),
        make_row("same time, worse", 10.0, 3.1),
        make_row("same value, slower", 11.0, 3.0),
        make_row("slow and good", 20.0, 1.0),
        make_row("fast and poor", 5.0, 9.0),
        make_row("dominated", 21.0, 1.5),
        make_row("undefined", 1.0, None),
    ]
    del rows[6]["metrics"]["fid"]["stderr"]
    assert figures.pareto(rows, "fid") == {"best", "twin", "slow and good", "fast and poor"}
    assert figures.pareto(rows, "kid") == set()


def test_pareto_knows_when_higher_is_better() -> None:
    rows: Any = [make_row("low", 10.0, 1.0, higher=True), make_row("high", 10.0, 2.0, higher=True)]
    assert figures.pareto(rows, "fid") == {"high"}


def test_primary_metric(results: Any) -> None:
    for entry in results["rows"]:
        entry["metrics"] = {"psnr": {}, "kid": {}, "rel_l2": {}}
    assert figures.primary_metric(results) == "kid"
    for entry in results["rows"]:
        entry["metrics"] = {"rel_l2": {}, "clip_score": {}, "attribute_accuracy": {}}
    assert figures.primary_metric(results) == "attribute_accuracy"
    for entry in results["rows"]:
        entry["metrics"] = {"psnr": {}}
    with pytest.raises(ValueError, match="pass metric= one of psnr"):
        figures.primary_metric(results)


# --- tables


def test_sample_results_are_valid(results: Any) -> None:
    check_results(results)


def test_console_table_says_what_differs(results: Any) -> None:
    text = rendered(results)
    assert HOSTILE in text  # shown as it is: neither markup nor swallowed
    assert "Frechet distance, zoo:small-features" in text
    assert "2.00 ± 0.20" in text
    assert "-0.50 [-0.70, -0.30]" in text
    assert "1.90x" in text
    assert "+ 3 small" in text


def test_console_table_folds_instead_of_cutting(results: Any) -> None:
    text = rendered(results, width=60)
    assert "…" not in text


def test_only_certain_differences_are_bold(results: Any) -> None:
    lines = tables.markdown_table(results).splitlines()
    assert len(lines) == 2 + 4
    untouched, fewer_steps, heun, hostile = lines[2:]
    assert "**" not in untouched
    assert r"**+7.00 \[+6.50, +7.50\] worse**" in fewer_steps
    assert r"**-0.50 \[-0.70, -0.30\] better**" in heun
    assert r"<br>+0.10 \[-0.10, +0.30\] |" in hostile
    assert "1.03x<br>0.97 to 1.08 |" in hostile  # the interval holds 1: no speed-up is claimed


def test_markdown_escapes_names(results: Any) -> None:
    line = tables.markdown_table(results).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", line)) == 7
    assert "<script>" not in line
    assert "&lt;script&gt;" in line


def test_absent_and_undefined_metrics(results: Any) -> None:
    results["rows"][1]["metrics"] = {}
    results["rows"][2]["metrics"]["fid"] |= {"value": None, "stderr": None, "ci95": None, "identical_fraction": 1.0}
    lines = tables.markdown_table(results).splitlines()
    assert lines[3].endswith("| - |")
    assert lines[4].endswith("| undefined<br>all identical |")


def test_numbers_show_two_figures_of_their_uncertainty() -> None:
    assert tables._plus_minus(12.3456, 0.431) == "12.35 ± 0.84"
    assert tables._plus_minus(0.98123, 0.0041) == "0.9812 ± 0.0080"
    assert tables._plus_minus(154.2, 30.0) == "154 ± 59"
    assert tables._plus_minus(3.0, 0.0) == "3"


# --- pictures


def test_pareto_png(results: Any, tmp_path: Path) -> None:
    figures.pareto_png(results, tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as image:
        assert image.size == (1600, 1040)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_pareto_png_with_one_row_and_no_error(results: Any, tmp_path: Path) -> None:
    results["rows"] = results["rows"][:1]
    results["rows"][0]["metrics"]["fid"]["stderr"] = 0.0
    figures.pareto_png(results, tmp_path / "pareto.png", "fid")
    with pytest.raises(ValueError, match="no row has a value of metric 'kid': choose one of fid"):
        figures.pareto_png(results, tmp_path / "pareto.png", "kid")


def drawn(rows: Any) -> Any:
    """The axes of a plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figures._dress(axes, rows, "fid")
    figures._draw_rows(axes, rows, "fid", untouched="baseline")
    figures._number(axes, rows, "fid")
    return axes


def test_every_row_has_its_number_in_the_plot_and_its_name_in_the_list() -> None:
    rows: Any = [make_row("baseline", 40.0, 2.0), make_row(HOSTILE, 39.9, 2.0)]
    rows += [make_row(f"row {index}", 20.0 + index % 7, 2.0 + 0.3 * index) for index in range(48)]
    axes = drawn(rows)
    numbers = [number for text in axes.texts for number in text.get_text().split(", ")]
    assert sorted(numbers, key=int) == [str(number) for number in range(1, 51)]
    assert axes.texts[0].get_text() == "1, 2"
    listed = [text.get_text() for text in axes.get_legend().get_texts()]
    assert listed[:3] == ["1  baseline", f"2  {figures._short(HOSTILE)}", "3  row 0"]
    assert len(listed) == 51
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())


def test_long_names_keep_the_end_in_which_they_differ() -> None:
    assert figures._short("a b\nc") == "a b c"
    assert figures._short(f"flowturbo:{'x' * 50}@8", 12) == "flowt…xxxx@8"


def test_points_that_touch_share_a_text() -> None:
    assert figures._together([(0, 0), (10, 0), (3, 0), (6, 0), (40, 0)], near=5) == [[0, 1, 2, 3], [4]]
    assert figures._numbers([0, 2, 3, 5, 6, 7, 8]) == "1, 3, 4, 6-9"


@pytest.mark.parametrize("values", [(20.0, 0.02, 0.4), (2.0, 2.1, 2.2)], ids=["logarithmic", "linear"])
def test_an_error_bar_across_zero_is_cut_off_at_the_axes(values: tuple[float, ...], tmp_path: Path) -> None:
    rows: Any = [make_row(f"row {value}", 40.0 * value, value) for value in values]
    rows[2]["metrics"]["fid"]["stderr"] = 1e4
    axes = drawn(rows)
    assert axes.get_yscale() == ("log" if values[0] == 20 else "linear")
    low, high = axes.get_ylim()
    assert high - low < 100
    for bars in axes.collections:
        lowest = min(point[1] for segment in bars.get_segments() for point in segment)
        assert axes.get_yscale() == "linear" or lowest >= low**2 / high * 0.999
    ends = [point[1] for bars in axes.collections for segment in bars.get_segments() for point in segment]
    assert min(ends) < low  # it leaves the axes, which are what cuts it off
    assert max(ends) > high
    assert all(bars.get_clip_on() for bars in axes.collections)


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_grid(tmp_path: Path, channels: int) -> None:
    images = {"baseline": torch.zeros(4, channels, 8, 6, dtype=torch.uint8)}
    images["a row"] = images["baseline"] + 200
    figures.sample_grid(images, tmp_path / "grid.png", columns=3, scale=5)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height == 2 * (8 * 5 + 4) + 4
        assert image.getpixel((image.width - 10, 20)) == (0, 0, 0)
        assert image.getpixel((image.width - 10, 70)) == (200, 200, 200)


def test_sample_grid_with_captions(tmp_path: Path) -> None:
    images = {"baseline": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    captions = ["a circle", "a small striped red circle at the top left", "of a column that is not there " * 9]
    figures.sample_grid(images, tmp_path / "plain.png", columns=2)
    figures.sample_grid(images, tmp_path / "grid.png", columns=2, captions=captions)
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "grid.png") as grid:
        head = grid.height - plain.height
        assert 3 * 12 <= head <= 5 * 12  # 42 letters of about six pixels in a tile of 64
        assert grid.crop((0, head, *grid.size)).tobytes() == plain.tobytes()
        third_line = [grid.crop((grid.width - 68 * (2 - i), 24, grid.width - 68 * (1 - i), 36)) for i in range(2)]
        white = [set(part.tobytes()) == {255} for part in third_line]
        assert white == [True, False]  # the first caption has ended, the second goes on


def test_long_captions_are_cut() -> None:
    lines = figures._wrapped("word " * 40, 9, len)
    assert lines == ["word word"] * 5 + ["..."]
    assert figures._wrapped("", 9, len) == []


def test_small_samples_are_enlarged(tmp_path: Path) -> None:
    figures.sample_grid({"a": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height == 64 + 8


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "images is empty"),
        ({"a": torch.zeros(1, 1, 8, 8)}, r"images\['a'\] must be uint8"),
        ({"a": torch.zeros(1, 2, 8, 8, dtype=torch.uint8)}, r"images\['a'\] must be uint8 .* 2, 8, 8"),
        (
            {"a": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "b": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)},
            r"images\['b'\] has shape .*same sample ids",
        ),
    ],
)
def test_wrong_samples_are_explained(images: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        figures.sample_grid(images, tmp_path / "grid.png")


# --- HTML


def test_html_is_self_contained_and_escaped(results: Any, tmp_path: Path) -> None:
    results["protocol"]["dataset"] = "<img src=x onerror=alert(1)>"
    Image.new("RGB", (4, 4)).save(tmp_path / "plot.png")
    report.html_report(results, tmp_path / "report.html", {'"><b>caption': tmp_path / "plot.png"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(?:https?:)?//", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<img src=x" not in page
    assert '"><b>' not in page
    assert page.count("<img ") == 1
    for text in ("Frechet distance, zoo:small-features, n=200", "Environment", "Protocol", "speed-up", "Pareto"):
        assert text in page
    assert "-0.50 [-0.70, -0.30] better</strong>" in page


def test_html_refuses_what_is_no_picture(results: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.bmp")
    for name in ("a.png", "b.bmp", "absent.png"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            report.html_report(results, tmp_path / "report.html", {"plot": tmp_path / name})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("broken", ["pareto_png", "sample_grid", "html_report"])
def test_what_cannot_be_drawn_is_a_warning_and_costs_nothing_else(
    broken: str, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"pareto_png": "pareto.png", "sample_grid": "samples.png", "html_report": "report.html"}

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no ink")

    for name in names:
        monkeypatch.setattr(runner, name, lambda _, path, *__, **___: path.write_text("drawn"))
    monkeypatch.setattr(runner, broken, fail)
    (tmp_path / names[broken]).write_text("of an earlier call")
    images = {entry["recipe"]: torch.zeros(1, 1, 8, 8, dtype=torch.uint8) for entry in results["rows"]}
    with pytest.warns(UserWarning, match=rf"{names[broken]} could not be drawn \(ZeroDivisionError: no ink\)"):
        runner.write_figures(results, images, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names.values()) - {names[broken]}
