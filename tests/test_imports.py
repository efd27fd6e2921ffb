"""Who may import whom, read from the sources with `ast`.

Every import counts: inside functions, under `TYPE_CHECKING`, relative ones, `import_module("...")` with a literal name,
and `flowaccel.x` reached through `import flowaccel`. A unit is a folder below `flowaccel`, every method
one of its own; "flowaccel" itself stands for its `__init__`.
"""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_DIR = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]

LEVELS = {
    "errors": 1,
    "checks": 1,
    "extras": 2,
    "compat": 2,
    "hooks": 3,
    "samplers": 3,
    "data": 3,
    "models": 4,
    "zoo": 5,
    "recipe": 6,
    "caching": 7,
    "methods": 8,
    "pipelines": 9,
    "flowaccel": 10,  # its __init__
    "evaluation": 11,
    "training": 12,
    "fit": 13,  # every `train` and `fit` of caching and methods
    "zoo_build": 14,
    "cli": 15,
    "commands": 16,  # every module of a method that is a command
    "__main__": 17,
}
"""A module imports from its own unit and from those of lower levels; what lies above is reached by the registry's
strings. Every method is a unit of its own."""

BESIDES = {"methods.policy": {"methods.sparse_attention"}}
"""The one pair of methods of which one is made of the other: RAPID3's sparse head."""

MAY_USE_PRIVATE_DIFFUSERS = frozenset({"hooks", "compat"})
PRIVATE_DIFFUSERS = ("diffusers.hooks", "diffusers.pipelines.pipeline_loading_utils")


def unit_of(module: str) -> str:
    """Return the unit that a module of flowaccel belongs to: a key of `LEVELS`, or one of these with a method."""
    parts = module.split(".")[1:]
    if not parts:
        return "flowaccel"
    if parts[0] == "methods" and len(parts) > 1:
        if len(parts) > 2 and parts[2] in ("train", "fit"):
            return f"fit.{parts[1]}"
        if len(parts) > 2 and parts[2].endswith("_command"):
            return f"commands.{parts[1]}"
        return f"methods.{parts[1]}"
    return "fit.caching" if parts[:2] == ["caching", "fit"] else parts[0]


def level_of(unit: str) -> int | None:
    """Return the level of a unit, None for one that has none."""
    return LEVELS.get(unit.split(".")[0])


def may_import(importer: str, imported: str) -> bool:
    """Whether one unit may import another."""
    if imported == importer or imported in BESIDES.get(importer, ()):
        return True
    above, below = level_of(importer), level_of(imported)
    return above is not None and below is not None and below < above


@dataclass(frozen=True)
class Import:
    """One name that a module imports: `parent` is None for `import a.b`, and `a` for `from a import b`."""

    line: int
    target: str
    parent: str | None = None

    def unit(self) -> str | None:
        """Return the unit of flowaccel that is imported, None for other packages."""
        parts = self.target.split(".")
        if parts[0] != "flowaccel":
            return None
        while len(parts) > 1 and not is_module(".".join(parts)):
            parts.pop()  # a name in a module
        return unit_of(".".join(parts))


def is_module(name: str) -> bool:
    """Whether a dotted name below flowaccel is a module on disk."""
    for package in sorted(PACKAGE_DIR, key=len, reverse=True):
        if name == package or name.startswith(f"{package}."):
            path = ROOT.joinpath(PACKAGE_DIR[package], *name[len(package) :].split(".")[1:])
            return path.is_dir() or path.with_name(f"{path.name}.py").is_file()
    return False


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
    unit = unit_of(module)
    if level_of(unit) is None:
        return [f"{module}: {unit!r} has no level in LEVELS of tests/test_imports.py"]
    found = []
    for item in imports(ast.parse(source), module, is_package):
        place = f"{module}:{item.line}"
        imported = item.unit()
        if imported is not None and not may_import(unit, imported):
            found.append(f"{place}: {unit} may not import {imported} ({item.target})")
        if unit not in MAY_USE_PRIVATE_DIFFUSERS and is_private_diffusers(item.target):
            found.append(f"{place}: only hooks and compat may import what diffusers keeps private ({item.target})")
    return list(dict.fromkeys(found))


def sources(root: Path) -> Iterator[tuple[Path, str, bool]]:
    """Yield path, module name and whether it is a package, for every source file. Missing folders are skipped."""
    for package, folder in PACKAGE_DIR.items():
        for path in sorted([*(root / folder).rglob("*.py"), *(root / folder).rglob("*.pyi")]):
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


def test_modules_have_no_cycle() -> None:
    """Of the imports that run when a module is imported."""
    graph: dict[str, set[str]] = {}
    for path, module, is_package in sources(ROOT):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.suffix == ".pyi":  # names that are imported when they are used
            continue
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = graph.setdefault(module, set())
        for item in imports(tree, module, is_package):
            parts = item.target.split(".")
            while len(parts) > 1 and not is_module(".".join(parts)):
                parts.pop()
            if parts[0] == "flowaccel" and len(parts) > 1 and ".".join(parts) != module:
                found.add(".".join(parts))
    graphlib.TopologicalSorter(graph).prepare()


def test_nothing_imports_the_command_line() -> None:
    assert {unit for unit in LEVELS if may_import(unit, "cli")} == {"cli", "commands", "__main__"}


PLANTED = [
    (
        "flowaccel.models.sit",
        "from flowaccel.samplers.paths import LINEAR\nimport flowaccel.zoo",
        "models may not import zoo",
    ),
    ("flowaccel.models.sit", "def f():\n    from flowaccel.recipe import Recipe", "models may not import recipe"),
    ("flowaccel.models.sit", "if TYPE_CHECKING:\n    from flowaccel import zoo", "models may not import zoo"),
    ("flowaccel.models.sit", "from flowaccel import Recipe", "models may not import flowaccel"),
    ("flowaccel.samplers.ode", "from ..data import digits", "samplers may not import data"),
    ("flowaccel.samplers.ode", "from .. import data", "samplers may not import data"),
    ("flowaccel.samplers.ode", "from ..data.digits import digits", "samplers may not import data"),
    ("flowaccel.samplers.ode", "from ..evaluation import metrics", "samplers may not import evaluation"),
    ("flowaccel.recipe.report", "from flowaccel.caching.gates import Easy", "recipe may not import caching"),
    ("flowaccel.caching.runtime", "from flowaccel.methods.moe import networks", "caching may not import methods.moe"),
    ("flowaccel.caching.runtime", "import flowaccel.caching.fit.search", "caching may not import fit.caching"),
    ("flowaccel.methods.moe.networks", "from flowaccel.methods.policy import heads", "may not import methods.policy"),
    ("flowaccel.methods.moe.networks", "from flowaccel.methods.moe import train", "may not import fit.moe"),
    ("flowaccel.methods.moe.train", "from flowaccel.methods.moe import train_command", "may not import commands.moe"),
    ("flowaccel.methods.sparse_attention.x", "import flowaccel.methods.policy", "may not import methods.policy"),
    ("flowaccel.training.loop", "from flowaccel.methods.moe import train", "training may not import fit.moe"),
    ("flowaccel.evaluation.run", "import flowaccel\nflowaccel.training.flow.f()", "evaluation may not import training"),
    ("flowaccel.evaluation.run", "import flowaccel as fa\nfa.training.flow.f()", "evaluation may not import training"),
    ("flowaccel.samplers.ode", "import_module('flowaccel.zoo')", "samplers may not import zoo"),
    ("flowaccel.samplers.ode", "importlib.import_module('flowaccel.zoo')", "samplers may not import zoo"),
    ("flowaccel.evaluation.runner", "from flowaccel import cli", "evaluation may not import cli"),
    ("flowaccel.training.flow", "from flowaccel.cli import main", "training may not import cli"),
    ("flowaccel.errors", "from flowaccel.extras import require", "errors may not import extras"),
    ("flowaccel", "from flowaccel.evaluation import evaluate", "flowaccel may not import evaluation"),
    ("flowaccel", "from .training import train", "flowaccel may not import training"),
    ("flowaccel", "import flowaccel.cli", "flowaccel may not import cli"),
    ("flowaccel.novelty", "", "has no level in LEVELS"),
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
    (
        "flowaccel.caching.gates.easy",
        "import math\nfrom torch import Tensor\nfrom flowaccel.caching.gates.base import Gate",
    ),
    (
        "flowaccel.models.sit",
        "from . import official\nfrom .time import SIT\nfrom ..errors import CheckpointError",
    ),
    (
        "flowaccel.models.sit",
        "from diffusers.models.attention import FeedForward\nimport diffusers\ndiffusers.__version__",
    ),
    ("flowaccel.hooks.root", "from diffusers.hooks import ModelHook\nfrom diffusers.utils import _private"),
    ("flowaccel.compat", "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES"),
    ("flowaccel.evaluation.runner", "import flowaccel\nfrom flowaccel import Recipe, pipelines\nflowaccel.accelerate"),
    ("flowaccel.extras", "from flowaccel.errors import MissingExtraError"),
    ("flowaccel.methods.policy.runtime", "from flowaccel.methods.sparse_attention.accelerator import SparseAttention"),
    ("flowaccel.methods.moe.train", "from flowaccel.training import flow\nfrom flowaccel.methods.moe import networks"),
    (
        "flowaccel.methods.moe.train_command",
        "from flowaccel.methods.moe import train\nfrom flowaccel.cli import common",
    ),
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


def test_a_class_name_means_one_thing() -> None:
    """No public class of the product has the name of another one."""
    found: dict[str, list[str]] = {}
    for path, module, _ in sources(ROOT):
        if path.suffix == ".pyi":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert len(found) > 200
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
