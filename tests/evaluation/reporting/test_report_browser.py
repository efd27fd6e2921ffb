"""The HTML report as a browser shows it, on a phone and on a desk; skipped where there is no Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flowaccel.evaluation import load_results, runner

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "flowturbo_sit-digits_cpu.json"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
)

# Headless windows are at least 500 pixels wide, so the page is shown in a frame of the wanted width.
PROBE = """<!doctype html><body style="margin:0"><pre id="found"></pre>
<iframe id="page" style="border:0;width:WIDTHpx;height:3000px" srcdoc="PAGE"></iframe>
<script>
onload = () => {
  const page = document.getElementById("page").contentDocument;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
  const size = element => [element.getBoundingClientRect().width, element.getBoundingClientRect().height];
  document.getElementById("found").textContent = JSON.stringify({
    width: page.defaultView.innerWidth,
    scroll: page.documentElement.scrollWidth,
    images: [...page.images].map(image => [image.alt, ...size(image), image.naturalWidth]),
    boxes: [...page.querySelectorAll(".scroll")].map(box => [box.clientWidth, box.scrollWidth]),
    names: [...page.querySelectorAll("tbody th")].map(name => [name.innerText, ...size(name)]),
    font: Math.min(...[...page.querySelectorAll("td, th, p, small, dd")].map(
      element => parseFloat(page.defaultView.getComputedStyle(element).fontSize))),
    requests: page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  });
};
</script>"""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.usefixtures("process"),
]


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded benchmark, the largest report there is, with noise for samples."""
    out = tmp_path_factory.mktemp("report")
    results = load_results(RESULTS)
    noise = torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    runner.write_figures(results, {row["recipe"]: noise for row in results["rows"]}, out)
    return out / "report.html"


def probe(report: Path, width: int, folder: Path) -> tuple[dict[str, Any], str]:
    """What the page measures at that width, and the browser's log."""
    text = PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(report.read_text(encoding="utf-8")))
    (folder / "probe.html").write_text(text, encoding="utf-8")
    done = browse(folder / "probe.html", folder, "--dump-dom", f"--window-size={max(width, 1400)},3200")
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found.group(1))), done.stderr


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_is_readable(width: int, report: Path, tmp_path: Path) -> None:
    found, log = probe(report, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= width  # wide tables and figures scroll inside their own boxes
    assert all(box <= width for box, _ in found["boxes"])
    assert [name for name, *_ in found["images"]] == [
        "Quality against time",
        "The first samples: the same noise in every column",
    ]
    for _, wide, high, natural in found["images"]:
        assert natural > 0  # decoded
        assert min(wide, 4 * high) >= 600
    assert found["font"] >= 11
    results = [name for name, *_ in found["names"]]
    assert any(name.startswith("flowturbo-H1P1R1") for name in results)
    assert max(wide for _, wide, _ in found["names"][:25]) < 0.45 * width  # a name leaves room for its numbers
    assert found["requests"] == []
    assert "CONSOLE" not in log, log


def test_the_probe_would_notice(report: Path, tmp_path: Path) -> None:
    """A page with a wide block, a missing picture and an error in the console."""
    broken = tmp_path / "broken.html"
    text = report.read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv=.*?>", text)
    assert policy is not None
    text = text.replace(policy.group(), "").replace(
        "<h1>",
        '<div style="width:2000px">wide</div><img alt="" src="http://127.0.0.1:9/nowhere.png"><script>console.error("x")</script><h1>',
    )
    broken.write_text(text, encoding="utf-8")
    found, log = probe(broken, 390, tmp_path)
    assert found["scroll"] >= 2000
    assert found["images"][0][3] == 0
    assert any(name.endswith("nowhere.png") for name in found["requests"])
    assert "CONSOLE" in log


def test_a_dark_page_is_dark(report: Path, tmp_path: Path) -> None:
    from PIL import Image

    corners = {}
    for scheme, setting in (("dark", "0"), ("light", "1")):
        shot = tmp_path / f"{scheme}.png"
        browse(
            report, tmp_path, f"--screenshot={shot}", "--window-size=1280,800",
            f"--blink-settings=preferredColorScheme={setting}",
        )  # fmt: skip
        with Image.open(shot) as image:
            corners[scheme] = image.convert("L").getpixel((3, 3))
    assert corners["dark"] < 60
    assert corners["light"] > 200
