"""What is on disk is shipped, and what is installed is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PYPROJECT["project"]["optional-dependencies"].items()
}
INSTALLED = [*map(Requirement, PYPROJECT["project"]["dependencies"]), *EXTRAS["test"], *EXTRAS["dev"]]

# Beside a CPU-only torch, or without torchvision, each breaks imports of transformers, diffusers or torchmetrics.
BREAKS_IMPORTS = {"torchvision", "timm", "lpips", "open-clip-torch", "torch-fidelity", "pytorch-fid", "piq"}


def test_no_folder_with_code_lacks_init() -> None:
    folders = {
        source.parent for folder in SETUPTOOLS["package-dir"].values() for source in (ROOT / folder).rglob("*.py")
    }
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_no_default_dependency_breaks_imports() -> None:
    assert {canonicalize_name(requirement.name) for requirement in INSTALLED} & BREAKS_IMPORTS == set()


@pytest.mark.parametrize("requirement", INSTALLED, ids=str)
def test_dependencies_are_pinned_within_their_range(requirement: Requirement) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, (li.split("#")[0] for li in lines)))
    }
    name = canonicalize_name(requirement.name)
    if name == PYPROJECT["project"]["name"]:  # an extra that includes another
        return
    assert name in pins, f"{requirement} has no pin in constraints.txt"
    (pin,) = pins[name].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_the_layout_in_contributing_is_the_tree() -> None:
    """Every folder that it names is there, and every package of two levels is named."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = text.split("## Where things are")[1].split("```")[1]
    named = set(re.findall(r"(?<![\w/])([a-z_]+)/", layout))
    folders = {
        path.name
        for pattern in ("*", "flowaccel/*", "flowaccel/methods/*", "flowaccel/caching/*", "evaluation/*")
        for path in ROOT.glob(pattern)
        if path.is_dir()
    } | {"conformance"}
    assert named - folders == set()
    packages = {
        init.parent.name
        for pattern in ("flowaccel/*/", "flowaccel/methods/*/", "flowaccel/caching/*/", "evaluation/*/")
        for init in ROOT.glob(f"{pattern}__init__.py")
    }
    assert packages - named == set()
