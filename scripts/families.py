"""Write docs/families.md: which networks of the installed diffusers have their blocks reused, and how that is known.

    python scripts/families.py            # print it
    python scripts/families.py --write    # write docs/families.md

The evidence is that of the tests: the tiny pipelines of tests/families.py and the tiny networks of tests/unwritten.py.
A network with neither is "not run", whatever its row says.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from flowaccel.hooks import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
REFUSED = {
    "LatteTransformer3DModel": "refused: two lists of blocks take turns, with frames and with places as rows",
    "ErnieImageTransformer2DModel": "refused: its blocks take tokens before rows",
}
"""Networks whose blocks are known not to fit a row, and why."""
PARTS = ("transformer", "transformer_2", "unet", "prior", "decoder")
HEAD = """# Families

Which networks of diffusers {version} have their blocks reused (scopes `stack` and `range`, presets such as `fbcache`),
and how that is known. Scope `output` (`ab_cache`, `easycache`) and samplers need no row. Written by
`scripts/families.py` from the tests; a test compares.

* **pipeline**: stock pipelines ([which](hooks.md#families)) with a tiny network of random weights go through the
  conformance tests: nothing skipped is bit for bit the untouched run, what is reused is right, a batch is as its images
  alone, the branches of guidance are told apart.
* **network**: the tiny network alone, in a loop: nothing skipped is bit for bit the untouched run, reuse is right.
* **derived**: no row is written; the first network call shows one, or block scopes are refused with the row to correct.
* **not run**: nobody tried it here; without a row it is derived, so it is right or refused.

| network | blocks | pipelines of diffusers |
|---|---|---|
"""


def pipelines() -> dict[str, list[str]]:
    """Return the pipeline classes of diffusers by the class of the network that they denoise with."""
    found: dict[str, list[str]] = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline) or kind is DiffusionPipeline:
            continue
        parameters = inspect.signature(kind.__init__).parameters
        for network in {one for part in PARTS if part in parameters for one in _classes(parameters[part].annotation)}:
            found.setdefault(network, []).append(name)
    return found


def _classes(annotation: Any) -> list[str]:
    if isinstance(annotation, type):
        return [annotation.__name__]
    return [name.rpartition(".")[2] for name in re.split(r"\s*\|\s*", str(annotation)) if name not in ("None", "")]


def verdict(network: str, run: dict[str, str]) -> str:
    """Return what is known of a network's blocks."""
    rows = [family for family in FAMILIES.values() if network in family.networks]
    row = f"row `{rows[0].name}`" if rows else "derived"
    if network in REFUSED:
        return REFUSED[network]
    return f"{row}; {run.get(network, 'not run')}"


def evidence() -> dict[str, str]:
    """Return by network class whether a pipeline or the network alone was run by the tests."""
    sys.path[:0] = [str(ROOT / "tests")]
    import families
    import unwritten
    from flowaccel.hooks import networks

    run = dict.fromkeys(unwritten.RIGHT, "network")
    for case in families.CASES.values():
        run |= {type(network).__name__: "pipeline" for network in networks(case.make()).values()}
    return run


def page() -> str:
    """Return the page."""
    run, known = evidence(), pipelines()
    lines = []
    for network in sorted(known, key=lambda name: (run.get(name, "z"), name)):
        names = known[network]
        listed = ", ".join(f"`{name}`" for name in names[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
        lines.append(f"| `{network}` | {verdict(network, run)} | {listed} |\n")
    return HEAD.format(version=diffusers.__version__) + "".join(lines)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
