"""Who may import whom, read from the sources with `ast`.

Every import counts: inside functions, under `TYPE_CHECKING`, relative ones, `import_module("...")` with a literal name,
and `flowaccel.x` reached through `import flowaccel`. A layer is the first name below `flowaccel`; "flowaccel" itself
stands for its `__init__`.
"""

from __future__ import annotations

import ast
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_DIR = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]

EVERYONE_MAY = frozenset({"errors", "extras", "weights"})
LIBRARY = frozenset(
    {"compat", "gates", "predictors", "modules", "models", "hooks", "samplers", "accelerators", "recipe"}
) | {"pipelines", "data", "zoo", "calibration"}

# Layer -> the layers that it may import, beside itself and EVERYONE_MAY. A layer that is not here may not exist.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "extras": frozenset(),
    "weights": frozenset(),
    "video": frozenset(),
    "gates": frozenset(),
    "predictors": frozenset(),
    "compat": frozenset(),
    "modules": frozenset(),
    "models": frozenset({"modules", "compat"}),
    "hooks": frozenset({"compat"}),
    "samplers": frozenset({"compat"}),
    "accelerators": frozenset({"hooks", "gates", "predictors", "modules", "models", "samplers", "compat"}),
    "recipe": frozenset({"accelerators", "samplers", "hooks"}),
    "pipelines": frozenset({"recipe", "samplers", "models", "compat"}),
    "data": frozenset({"models"}),
    "zoo": frozenset({"models"}),
    # Not calibration: it imports evaluation, which imports the names that flowaccel exports.
    "flowaccel": LIBRARY - {"calibration"},
    "evaluation": frozenset({"flowaccel", "pipelines", "samplers", "data", "zoo"}),
    "calibration": frozenset({"recipe", "pipelines", "evaluation", "accelerators", "gates", "predictors", "hooks"})
    | {"samplers"},
    "training": LIBRARY | {"flowaccel", "evaluation"},
    "cli": LIBRARY | {"flowaccel", "evaluation", "training", "video"},
    "__main__": frozenset({"cli"}),
}

# `errors`, `extras` and `weights` lie at the bottom: of these, only the last two may use another (the errors).
MAY_USE_COMMON = {"errors": frozenset(), "extras": frozenset({"errors"}), "weights": frozenset({"errors"})}

PURE = {"gates": frozenset({"torch"}), "predictors": frozenset({"torch"})}  # beside the standard library

MAY_USE_PRIVATE_DIFFUSERS = frozenset({"hooks", "compat"})
PRIVATE_DIFFUSERS = ("diffusers.hooks", "diffusers.pipelines.pipeline_loading_utils")


def allowed(layer: str) -> frozenset[str]:
    """Return all layers that `layer` may import."""
    return MAY_IMPORT[layer] | MAY_USE_COMMON.get(layer, EVERYONE_MAY) | {layer}


@dataclass(frozen=True)
class Import:
    """One name that a module imports: `parent` is None for `import a.b`, and `a` for `from a import b`."""

    line: int
    target: str
    parent: str | None = None

    def layer(self) -> str | None:
        """Return the layer of flowaccel that is imported, None for other packages."""
        parts = self.target.split(".")
        if parts[0] != "flowaccel":
            return None
        if len(parts) == 1 or parts[1] == "*":
            return "flowaccel"
        if self.parent == "flowaccel" and parts[1] not in MAY_IMPORT and not is_module(parts[1]):
            return "flowaccel"  # `from flowaccel import X` with a name that __init__ exports
        return parts[1]


def is_module(name: str) -> bool:
    """Whether `flowaccel.<name>` is a module on disk."""
    core = ROOT / PACKAGE_DIR["flowaccel"]
    return f"flowaccel.{name}" in PACKAGE_DIR or (core / name).is_dir() or (core / f"{name}.py").is_file()


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Yield everything that a module imports."""
    package = module if is_package else module.rpartition(".")[0]
    bound: dict[str, str] = {}  # local name -> module, from `import a.b` and `import a.b as c`
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                assert above, f"{module}:{node.lineno}: relative import beyond the top-level package"
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}", parent=base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                name = node.args[0].value
                yield Import(node.lineno, package + name if name.startswith(".") else name)
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):  # outer attributes come before the inner ones of their chain
        if not isinstance(node, ast.Attribute) or node in inner:
            continue
        chain: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            chain.insert(0, root.attr)
            root = root.value
            inner.add(root)
        if isinstance(root, ast.Name) and root.id in bound:
            yield Import(node.lineno, ".".join([bound[root.id], *chain]), parent=bound[root.id])


def is_private_diffusers(target: str) -> bool:
    """Whether a dotted name of diffusers is not public."""
    parts = target.split(".")
    if parts[0] != "diffusers":
        return False
    underscored = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return underscored or any(target == name or target.startswith(f"{name}.") for name in PRIVATE_DIFFUSERS)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what a module imports and should not, one line each."""
    layer = module.split(".")[1] if "." in module else "flowaccel"
    if layer not in MAY_IMPORT:
        return [f"{module}: the layer {layer!r} has no row in MAY_IMPORT of tests/test_imports.py"]
    found = []
    for item in imports(ast.parse(source), module, is_package):
        place = f"{module}:{item.line}"
        imported = item.layer()
        if imported is not None and imported not in allowed(layer):
            found.append(f"{place}: {layer} may not import {imported} ({item.target})")
        if layer not in MAY_USE_PRIVATE_DIFFUSERS and is_private_diffusers(item.target):
            found.append(f"{place}: only hooks and compat may import what diffusers keeps private ({item.target})")
        top = item.target.split(".")[0]
        if layer in PURE and top != "flowaccel" and top not in PURE[layer] | sys.stdlib_module_names:
            found.append(f"{place}: {layer} may use {', '.join(PURE[layer])} only ({item.target})")
    return list(dict.fromkeys(found))


def sources(root: Path) -> Iterator[tuple[Path, str, bool]]:
    """Yield path, module name and whether it is a package, for every source file. Missing folders are skipped."""
    for package, folder in PACKAGE_DIR.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            yield path, ".".join(parts[:-1] if is_package else parts), is_package


def violations_below(root: Path) -> list[str]:
    """Return the violations of all source files."""
    return [
        line
        for path, module, is_package in sources(root)
        for line in violations(path.read_text(encoding="utf-8"), module, is_package)
    ]


def test_imports_follow_the_table() -> None:
    assert violations_below(ROOT) == []


def test_layers_have_no_cycle() -> None:
    """The sources stay within the table, so it is enough that the table has none."""
    graph = {layer: allowed(layer) - {layer} for layer in MAY_IMPORT}
    assert set().union(*graph.values()) <= set(MAY_IMPORT)
    graphlib.TopologicalSorter(graph).prepare()


def test_nothing_imports_the_command_line() -> None:
    assert {layer for layer in MAY_IMPORT if "cli" in allowed(layer)} == {"cli", "__main__"}


PLANTED = [
    ("flowaccel.gates.interval", "import flowaccel.hooks", "gates may not import hooks"),
    ("flowaccel.gates.interval", "import numpy as np", "gates may use torch only"),
    ("flowaccel.predictors.newton", "from flowaccel.gates import Gate", "predictors may not import gates"),
    ("flowaccel.models.sit", "from flowaccel.samplers.paths import LINEAR", "models may not import samplers"),
    ("flowaccel.models.sit", "def f():\n    from flowaccel.recipe import Recipe", "models may not import recipe"),
    ("flowaccel.models.sit", "if TYPE_CHECKING:\n    from flowaccel import zoo", "models may not import zoo"),
    ("flowaccel.models.sit", "from flowaccel import Recipe", "models may not import flowaccel"),
    ("flowaccel.models.sit", "from ..data import digits", "models may not import data"),
    ("flowaccel.models.sit", "from .. import data", "models may not import data"),
    ("flowaccel.models.sit", "from ..data.digits import digits", "models may not import data"),
    ("flowaccel.samplers.ode", "from ..evaluation import moments", "samplers may not import evaluation"),
    ("flowaccel.evaluation.run", "import flowaccel\nflowaccel.training.flow.f()", "evaluation may not import training"),
    ("flowaccel.evaluation.run", "import flowaccel as fa\nfa.training.flow.f()", "evaluation may not import training"),
    ("flowaccel.samplers.ode", "import_module('flowaccel.zoo')", "samplers may not import zoo"),
    ("flowaccel.samplers.ode", "importlib.import_module('flowaccel.zoo')", "samplers may not import zoo"),
    ("flowaccel.evaluation.runner", "from flowaccel.models import SiT", "evaluation may not import models"),
    ("flowaccel.evaluation.runner", "from flowaccel.accelerators import X", "evaluation may not import accelerators"),
    ("flowaccel.evaluation.runner", "from flowaccel import cli", "evaluation may not import cli"),
    ("flowaccel.training.flow", "from flowaccel.cli import main", "training may not import cli"),
    ("flowaccel.errors", "from flowaccel.extras import require", "errors may not import extras"),
    ("flowaccel", "from flowaccel.evaluation import evaluate", "flowaccel may not import evaluation"),
    ("flowaccel", "from .training import train", "flowaccel may not import training"),
    ("flowaccel", "import flowaccel.cli", "flowaccel may not import cli"),
    ("flowaccel.novelty", "", "has no row in MAY_IMPORT"),
    ("flowaccel.models.sit", "from diffusers.hooks import ModelHook", "only hooks and compat"),
    ("flowaccel.models.sit", "from diffusers.hooks.hooks import ModelHook", "only hooks and compat"),
    ("flowaccel.models.sit", "from diffusers import hooks", "only hooks and compat"),
    ("flowaccel.models.sit", "import diffusers\ndiffusers.hooks.HookRegistry", "only hooks and compat"),
    (
        "flowaccel.models.sit",
        "import diffusers\ndiffusers.pipelines.pipeline_loading_utils.f()",
        "only hooks and compat",
    ),
    ("flowaccel.pipelines.any", "from diffusers.pipelines import pipeline_loading_utils as u", "only hooks and compat"),
    ("flowaccel.samplers.ode", "from diffusers.utils import _private", "only hooks and compat"),
    ("flowaccel.samplers.ode", "import diffusers._modules.x", "only hooks and compat"),
]


@pytest.mark.parametrize(("module", "source", "message"), PLANTED)
def test_planted_violation_is_found(module: str, source: str, message: str) -> None:
    (found,) = violations(source, module, is_package=module == "flowaccel")
    assert message in found


PERMITTED = [
    ("flowaccel.gates.interval", "import math\nfrom torch import Tensor\nfrom flowaccel.gates.base import Gate"),
    (
        "flowaccel.models.sit",
        "from . import official\nfrom .convention import SIT\nfrom ..errors import CheckpointError",
    ),
    (
        "flowaccel.models.sit",
        "from diffusers.models.attention import FeedForward\nimport diffusers\ndiffusers.__version__",
    ),
    ("flowaccel.hooks.root", "from diffusers.hooks import ModelHook\nfrom diffusers.utils import _private"),
    ("flowaccel.compat", "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES"),
    ("flowaccel.evaluation.runner", "import flowaccel\nfrom flowaccel import Recipe, pipelines\nflowaccel.accelerate"),
    ("flowaccel.extras", "from flowaccel.errors import MissingExtraError"),
    ("flowaccel.training.flow", "from flowaccel.evaluation import fid\nfrom flowaccel.models import SiT"),
    ("flowaccel.cli", "from flowaccel.training import flow\nfrom flowaccel.cli.demo import demo"),
    ("flowaccel.__main__", "from flowaccel.cli import main"),
]


@pytest.mark.parametrize(("module", "source"), PERMITTED)
def test_permitted_import_is_not_reported(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_files_are_found_under_their_installed_names(tmp_path: Path) -> None:
    """A file in `samplers/` is `flowaccel.samplers.*`, and its relative imports are resolved from there."""
    (tmp_path / "samplers" / "inner").mkdir(parents=True)
    (tmp_path / "samplers" / "__init__.py").write_text("from .ode import Euler\n")
    (tmp_path / "samplers" / "ode.py").write_text("from ..cli import main\n")
    (tmp_path / "samplers" / "inner" / "deep.py").write_text("from ...pipelines import X\n")
    assert violations_below(tmp_path) == [
        "flowaccel.samplers.inner.deep:1: samplers may not import pipelines (flowaccel.pipelines.X)",
        "flowaccel.samplers.ode:1: samplers may not import cli (flowaccel.cli.main)",
    ]
