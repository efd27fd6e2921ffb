"""Self-contained HTML page of a results dict."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from flowaccel.evaluation.reporting.tables import GLOSSARY, METRIC_GLOSSARY, cells, metric_displays
from flowaccel.evaluation.results import Results


def html_report(results: Results, path: str | os.PathLike[str], images: Mapping[str, str | os.PathLike[str]]) -> None:
    """Write a self-contained HTML file: no network, no scripts, images inside.

    Args:
        results: as checked by `flowaccel.evaluation.results.check_results`.
        path: the HTML file.
        images: caption to image file (PNG, JPEG or WebP), in the order shown.

    Raises:
        ValueError: an image is missing, broken or of another type.
    """
    from jinja2 import Environment, StrictUndefined

    header, body = cells(results)
    template = resources.files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(template).render(
        header=header,
        body=body,
        images=[{"caption": caption, **_embedded(Path(file))} for caption, file in images.items()],
        glossary=_glossary(results),
        protocol=results["protocol"],
        environment=results["environment"],
        schema=results["schema"],
    )
    Path(path).write_text(text, encoding="utf-8")


def _glossary(results: Results) -> dict[str, str]:
    """Return every term of this report.

    A metric goes by its display name, because small feature networks are not Inception.
    """
    terms = dict(GLOSSARY)
    for name, metric in metric_displays(results["rows"]).items():
        terms[metric["display"]] = f"{METRIC_GLOSSARY.get(name, '')} (results.json: {name}, n = {metric['n']})".strip()
    return terms | {entry["recipe"]: entry["remark"] for entry in results["rows"] if "remark" in entry}


def _embedded(file: Path) -> dict[str, str | int]:
    """Return the image as a data URI, and its width in pixels."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            kind, width = image.get_format_mimetype(), image.width
    except OSError as error:  # missing, or nothing that Pillow knows
        raise ValueError(f"images: {file} must be an existing PNG, JPEG or WebP file ({error})") from error
    if kind not in ("image/png", "image/jpeg", "image/webp"):
        raise ValueError(f"images: {file} must be a PNG, JPEG or WebP file, got {kind}: convert it")
    return {"uri": f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}", "width": width}
