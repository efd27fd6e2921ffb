"""Optional dependencies: what a missing or broken one says."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowaccel import FlowaccelError, MissingExtraError
from flowaccel.extras import EXTRAS, require

PYPROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
BROKEN = "operator torchvision::nms does not exist"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of every other package, with none of the optional ones imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in EXTRAS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def package(shelf: Path, name: str, code: str) -> None:
    (shelf / name).mkdir()
    (shelf / name / "__init__.py").write_text(code)


@pytest.fixture
def forget() -> Iterator[None]:
    """Imports of fake packages are not seen by the tests that follow."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in EXTRAS]:
        del sys.modules[name]


def test_every_extra_exists() -> None:
    assert set(EXTRAS.values()) <= set(PYPROJECT["project"]["optional-dependencies"])


def test_every_extra_installs_what_it_is_named_for() -> None:
    distributions = {"cleanfid": "clean-fid", "cache_dit": "cache-dit", "imageio_ffmpeg": "imageio-ffmpeg"}
    for module, extra in EXTRAS.items():
        required = PYPROJECT["project"]["optional-dependencies"][extra]
        assert any(line.startswith(distributions.get(module, module)) for line in required), module


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_missing_module_names_its_extra(
    module: str, shelf: Path, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    monkeypatch.setattr(sys, "path", [str(shelf)])
    with pytest.raises(
        MissingExtraError, match=rf"^{module} is not installed; .*pip install 'flowaccel\[{EXTRAS[module]}\]'$"
    ):
        require(module)
    with pytest.raises(MissingExtraError, match=rf"flowaccel\[{EXTRAS[module]}\]"):
        require(f"{module}.ops")


def test_the_error_is_an_import_error_and_ours() -> None:
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(MissingExtraError, FlowaccelError)


def test_present_module_is_returned(shelf: Path, forget: None) -> None:
    package(shelf, "imageio", "version = 3")
    (shelf / "imageio" / "v3.py").write_text("value = 4")
    assert require("imageio").version == 3
    assert require("imageio.v3").value == 4


@pytest.mark.parametrize("kind", ["RuntimeError", "OSError", "ImportError"])
def test_broken_torchvision_says_what_to_do(kind: str, shelf: Path, forget: None) -> None:
    package(shelf, "torchvision", f'raise {kind}("{BROKEN}\\nand a trace of forty lines")')
    with pytest.raises(MissingExtraError) as caught:
        require("torchvision")
    message = str(caught.value)
    assert BROKEN in message
    assert "installed but cannot be imported" in message
    assert r"pip install 'flowaccel[clean-fid]'" in message
    assert "pip uninstall torchvision" in message
    assert "\n" not in message
    assert type(caught.value.__cause__).__name__ == kind


def test_broken_below_an_optional_module(shelf: Path, forget: None) -> None:
    """What clean-fid says where torchvision does not fit: the hint follows the reason, not the name."""
    package(shelf, "torchvision", f'raise RuntimeError("{BROKEN}")')
    package(shelf, "cleanfid", "import torchvision")
    with pytest.raises(MissingExtraError, match=r"cleanfid is installed but .*pip uninstall torchvision"):
        require("cleanfid")


def test_broken_module_of_another_kind_has_no_torchvision_hint(shelf: Path, forget: None) -> None:
    package(shelf, "xformers", 'raise OSError("undefined symbol: _ZN3c10")')
    with pytest.raises(MissingExtraError) as caught:
        require("xformers")
    assert "undefined symbol" in str(caught.value)
    assert "torchvision" not in str(caught.value)


def test_missing_below_an_optional_module_names_what_is_missing(shelf: Path, forget: None) -> None:
    package(shelf, "cache_dit", "import surely_not_there")
    with pytest.raises(MissingExtraError, match=r"^surely_not_there is not installed; .*flowaccel\[cache-dit\]"):
        require("cache_dit")


def test_a_mistake_inside_a_module_is_not_hidden(shelf: Path, forget: None) -> None:
    package(shelf, "imageio", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        require("imageio")
