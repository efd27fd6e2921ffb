"""Check the wheel and the sdist in `dist/`: what they hold, and that the wheel works in an empty environment.

The wheel must hold every file of the packages and nothing else. It is then installed with constraints.txt into a
temporary environment and tried from another folder, where the checkout cannot help it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
IMPORTS = ("flowaccel", "flowaccel.samplers", "flowaccel.pipelines", "flowaccel.evaluation", "flowaccel.zoo")
NEVER_TOP_LEVEL = ("samplers", "pipelines", "evaluation", "tests", "benchmarks", "scripts", "examples", "docs")

PROBE = f"""
import importlib, importlib.resources, importlib.util, pathlib, sys
for name in {IMPORTS!r}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).resolve().is_relative_to(pathlib.Path(sys.prefix).resolve()), module.__file__
found = [name for name in {NEVER_TOP_LEVEL!r} if importlib.util.find_spec(name) is not None]
assert not found, f"installed as top-level packages: {{found}}"
assert importlib.resources.files("flowaccel").joinpath("py.typed").is_file(), "py.typed is missing"
print("imported", *{IMPORTS!r})
"""


def only(pattern: str) -> Path:
    """Return the one file in `dist/` that matches."""
    found = sorted(DIST.glob(pattern))
    if len(found) != 1:
        sys.exit(f"error: expected one {pattern} in dist/, found {[path.name for path in found]}; run `make wheel`")
    return found[0]


def package_files(mapping: dict[str, str]) -> dict[str, str]:
    """Map each file of the packages, by its path in the checkout, to its path in the wheel."""
    return {
        path.relative_to(ROOT).as_posix(): Path(*package.split("."), path.relative_to(ROOT / folder)).as_posix()
        for package, folder in mapping.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def check_contents(wheel: Path, sdist: Path, files: dict[str, str]) -> list[str]:
    """Compare both archives with the checkout and return what is wrong."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = set(files.values())
    info = {name for name in in_wheel if name.split("/")[0].endswith(".dist-info")}
    licences = {name.rpartition("/")[2] for name in info if "/licenses/" in name}
    problems = [f"not in the wheel: {name} (pyproject.toml: packages or package-data)" for name in wanted - in_wheel]
    problems += [f"in the wheel, but not in the checkout: {name}" for name in in_wheel - info - wanted]
    problems += [f"not in the sdist: {name}" for name in {*files, "pyproject.toml", "LICENSE"} - in_sdist]
    problems += [f"not among the wheel's licences: {name}" for name in {"LICENSE", "THIRD_PARTY.md"} - licences]
    return sorted(problems)


def try_install(wheel: Path) -> None:
    """Install the wheel into an empty environment and use it from an empty folder."""
    with tempfile.TemporaryDirectory(prefix="flowaccel-wheel-") as temporary:
        folder = Path(temporary)
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        environment["HF_HUB_OFFLINE"] = "1"

        def run(*command: str | Path) -> None:
            print("+", *(str(part).replace("\n", "; ")[:100] for part in command), flush=True)
            subprocess.run([str(part) for part in command], cwd=elsewhere, env=environment, check=True)

        python = binaries / "python"
        run(python, "-m", "pip", "install", "--quiet", "--no-input", "-c", ROOT / "constraints.txt", wheel)
        run(python, "-m", "pip", "check")
        run(python, "-c", PROBE)
        run(binaries / "flowaccel", "--help")
        run(python, "-m", "flowaccel", "--help")


def main() -> int:
    """Run both checks."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    wheel, sdist = only("flowaccel-*.whl"), only("flowaccel-*.tar.gz")
    files = package_files(mapping)
    problems = check_contents(wheel, sdist, files)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    print(f"{wheel.name} and {sdist.name} hold all {len(files)} files of the packages")
    try_install(wheel)
    print("the wheel works in an empty environment")
    return 0


if __name__ == "__main__":
    sys.exit(main())
