"""docs/extending.md: its code is run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from flowaccel import FeatureCache, Recipe, accelerated, report
from flowaccel.evaluation import RowSamples, metrics
from flowaccel.evaluation.metrics.metric import Case
from flowaccel.evaluation.metrics.table import metrics_of_the_folder
from flowaccel.hooks.families import FAMILIES, register_family
from flowaccel.recipe import PRESETS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """All blocks of the page, run in one module one after the other."""
    module = ModuleType("the_page")
    sys.modules[module.__name__] = module  # where dataclasses look for the names in their annotations
    for block in blocks():
        exec("from __future__ import annotations\n" + block, module.__dict__)
    yield module
    module.remove()
    del sys.modules[module.__name__]


def images(pipe: Any) -> torch.Tensor:
    return pipe([1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent").images


def test_the_cache(page: Any) -> None:
    pipe = tiny.sit_pipeline()
    with accelerated(pipe, page.cache):
        images(pipe)
        assert [call.what for call in report(pipe).calls].count("reused") > 1


def test_the_gate(page: Any) -> None:
    pipe = tiny.sit_pipeline()
    with accelerated(pipe, FeatureCache(page.Moved(10.0))):
        images(pipe)
        assert report(pipe).hit_rate > 0.3
    with accelerated(pipe, FeatureCache(page.Moved(0.0))):
        images(pipe)
        assert report(pipe).hit_rate == 0


def test_the_method(page: Any, tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    untouched = images(pipe)
    with accelerated(pipe, "heun+dim:factor=0.5"):
        assert not torch.equal(images(pipe), untouched)
        assert "dimmed to 50%" in str(report(pipe))
    Recipe([page.Dim(0.9)]).save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path).accelerators == (page.Dim(0.9),)
    assert "dim" not in PRESETS, "the table is that of the installed methods"


def test_the_family(page: Any) -> None:
    assert register_family(page.row) is page.row
    del FAMILIES[page.row.name]


def test_the_metric(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [one for one in blocks() if "METRICS = {" in one]
    (tmp_path / "brightness.py").write_text("from __future__ import annotations\n" + block)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    metric = metrics_of_the_folder()["brightness"]
    shades = torch.arange(4, dtype=torch.uint8).mul(80).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    row = RowSamples(name="row", features=torch.zeros(4, 2), labels=None, predicted=None, images=shades)
    found = metric.estimate(Case(row=row, baseline=None, reference=None, seed=0, resamples=7))  # type: ignore[arg-type]
    assert found.value == pytest.approx(120 / 255) and found.replicates.shape == (7,)
