"""Every public name says what it is."""

from __future__ import annotations

import importlib
import inspect

import pytest

MODULES = ("flowaccel", "flowaccel.samplers", "flowaccel.pipelines", "flowaccel.evaluation")


def has_docstring(value: object) -> bool:
    """Whether a class, function or module documents itself; constants cannot, and pass."""
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        return True
    text = (value.__doc__ or "").strip()
    written_by_dataclass = inspect.isclass(value) and text.startswith(f"{value.__name__}(")
    return bool(text) and not written_by_dataclass


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert has_docstring(module)
    assert module.__all__, f"{name} exports nothing"
    assert len(set(module.__all__)) == len(module.__all__)
    assert [public for public in module.__all__ if not has_docstring(getattr(module, public))] == []
