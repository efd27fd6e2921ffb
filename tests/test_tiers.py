"""The tiers of the tests: nothing is forgotten, and the default one stays small."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiers
from families import Case
from flowaccel.hooks import FAMILIES
from flowaccel.recipe import PRESETS


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def item(name: str, folder: str = "conformance", marks: tuple[str, ...] = (), fixtures: Any = (), **values: Any) -> Any:
    return Item(
        name=name,
        nodeid=f"{folder}/{name}[{values}]",
        path=Path("tests", folder, "test_x.py"),
        fixturenames=fixtures,
        config=SimpleNamespace(getoption=lambda _: "default"),
        callspec=SimpleNamespace(params=values),
        get_closest_marker=lambda mark: mark in marks,
    )


def test_the_default_tier_holds_every_value_of_a_product_and_not_every_pair() -> None:
    product = [item("test", case=case, preset=preset) for case in range(7) for preset in "abc"]
    found = tiers.sort_into_tiers(product)
    assert {each.callspec.params["case"] for each in found["default"]} == set(range(7))
    assert {each.callspec.params["preset"] for each in found["default"]} == set("abc")
    assert len(found["default"]) == 7
    assert len(found["full"]) == 14


def test_a_single_argument_is_met_by_a_third_of_its_values_and_by_all_in_three_tests() -> None:
    found = tiers.sort_into_tiers([item(name, case=case) for name in ("one", "two", "three") for case in range(10)])
    counts = Counter(each.name for each in found["default"])
    assert counts == {"one": 4, "two": 3, "three": 3}
    assert {each.callspec.params["case"] for each in found["default"]} == set(range(10))


def test_outside_of_conformance_everything_is_in_the_default_tier_but_what_costs() -> None:
    cheap = [item("cheap", "models", value=value) for value in range(5)]
    costly = [item("starts", "models", fixtures=("process",)), item("waits", "models", marks=("slow",))]
    killing = [item("kills", "models", marks=("soak",), fixtures=("process",))]
    shown = [item("shows", "models", marks=("quick",), fixtures=("process",))]
    found = tiers.sort_into_tiers([*cheap, *costly, *killing, *shown])
    assert found == {"default": cheap + shown, "full": costly, "soak": killing}


def test_few_tests_that_start_a_process_are_in_the_default_tier() -> None:
    shown = [item(f"shows{i}", marks=("quick",), fixtures=("process",)) for i in range(tiers.MOST_QUICK + 1)]
    tiers.sort_into_tiers(shown[1:])
    with pytest.raises(pytest.UsageError, match="at most 6 tests"):
        tiers.sort_into_tiers(shown)


@pytest.mark.parametrize(("fixtures", "noticed"), [((), True), (("process",), False), (("compiler",), False)])
def test_a_process_that_no_fixture_tells_of_is_noticed(
    fixtures: tuple[str, ...], noticed: bool, process: tiers.Process
) -> None:
    def start() -> None:
        with tiers.nothing_costly(item("test", fixtures=fixtures)):
            process("-c", "")

    if noticed:
        with pytest.raises(pytest.fail.Exception, match=r"starts .*python"):
            start()
    else:
        start()


def test_every_family_and_every_preset_is_in_the_default_tier(request: pytest.FixtureRequest) -> None:
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("only some of the tests were collected")
    values = [value for test in request.config.stash[tiers.DEFAULT] for value in _values(test)]
    run = {value.family for value in values if isinstance(value, Case)}
    names = {value for value in values if isinstance(value, str)}
    alone = {family for family, row in FAMILIES.items() if names & set(row.networks)}  # without a pipeline
    assert set(FAMILIES) - run - alone == set()
    assert set(PRESETS) - names == set()


def _values(test: pytest.Item) -> list[Any]:
    callspec = getattr(test, "callspec", None)
    return [] if callspec is None else list(callspec.params.values())
