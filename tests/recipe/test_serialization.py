"""The JSON scheme of accelerators, with accelerators and components that exist only here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from flowaccel import Accelerator, CheckpointError, Recipe, WeightsNotFoundError
from flowaccel.recipe import FILE_NAME, Method, registry
from flowaccel.recipe.serialization import Source, component, learned


class Head(ModelMixin, ConfigMixin):
    """A learned part."""

    @register_to_config
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


@dataclass(frozen=True)
class FirstBlock:
    name: ClassVar[str] = "first_block"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in 0 .. 1, got {self.threshold!r}")


@dataclass(frozen=True)
class Policy:
    name: ClassVar[str] = "policy"
    head: nn.Module | str | Path | None = learned("policy", lambda folder: load_head(folder), default=None)
    inner: Any = component({"first_block": FirstBlock}, default=None)


GATES: dict[str, type] = {"first_block": FirstBlock, "policy": Policy}


@dataclass(frozen=True)
class Cache(Accelerator):
    name: ClassVar[str] = "cache"
    gate: Any = component(GATES, default=FirstBlock())
    guards: Any = component(GATES, default=())
    head: nn.Module | str | Path | None = learned("policy", lambda folder: load_head(folder), default=None)
    blocks: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int], ...] | None = None
    pair: tuple[int, str] = (1, "a")
    names: Sequence[str] = ()
    table: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def attach(self, pipe: Any) -> Any:
        return lambda: None


def load_head(folder: Path) -> nn.Module:
    try:
        return Head.from_pretrained(folder, use_safetensors=True)
    except OSError as error:
        raise CheckpointError(f"no head in {folder}") from error


@pytest.fixture(autouse=True)
def registered() -> Iterator[Callable[[], None]]:
    remove = registry.register(Method(accelerators={"cache": Cache}))
    yield remove
    if "cache" in registry.ACCELERATORS:
        remove()


def read(folder: Path, **fields: Any) -> Recipe:
    data = {"schema": 1, "name": "x", "accelerators": [{"name": "cache", **fields}]}
    (folder / FILE_NAME).write_text(json.dumps(data))
    return Recipe.from_pretrained(folder)


def test_nested_form_is_what_a_reader_expects() -> None:
    assert Cache(gate=FirstBlock(0.08), blocks=(1, 2)).to_dict() == {
        "gate": {"name": "first_block", "threshold": 0.08},
        "guards": [],
        "head": None,
        "blocks": [1, 2],
        "ranges": None,
        "pair": [1, "a"],
        "names": [],
        "table": None,
        "options": {},
    }


@pytest.mark.parametrize(
    "cache",
    [
        Cache(),
        Cache(gate=None, guards=(FirstBlock(0.2), Policy(inner=FirstBlock(0.3)))),
        Cache(blocks=(3, 1), ranges=((0, 4), (5, 9)), pair=(2, "b"), names=("x", "y")),
        Cache(table=Path("tables/a.json"), options={"deep": {"list": [1, 2.5, None, True, "t"]}}),
    ],
    ids=["default", "components", "tuples", "plain"],
)
def test_round_trip(cache: Cache, tmp_path: Path) -> None:
    recipe = Recipe([cache], "mine")
    recipe.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    if cache.table is not None:  # relative paths count from the recipe's folder
        assert again.accelerators[0].table == tmp_path / cache.table
        again = Recipe([Cache(**{**vars(again.accelerators[0]), "table": cache.table})], "mine")
    assert again == recipe
    hash(again.accelerators[0].ranges)


def test_defaults_fill_what_a_file_leaves_out(tmp_path: Path) -> None:
    assert read(tmp_path, gate={"name": "first_block"}).accelerators[0] == Cache(gate=FirstBlock(0.1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"gate": {"name": "first_block", "treshold": 0.1}},
            r"accelerators\[0\]\.gate\.treshold: unknown; did you mean 'threshold'\? allowed: name, threshold$",
        ),
        (
            {"guards": [{"name": "policy", "inner": {"name": "first_block", "x": 1}}]},
            r"accelerators\[0\]\.guards\[0\]\.inner\.x: unknown; allowed: name, threshold$",
        ),
        (
            {"gate": {"name": "first_blok"}},
            r"accelerators\[0\]\.gate\.name: unknown 'first_blok'; did you mean 'first_block'\? allowed: first_bl",
        ),
        (
            {"gate": {"name": "first_block", "threshold": 7}},
            r"accelerators\[0\]\.gate: threshold must lie in 0 \.\. 1, got 7",
        ),
        ({"gate": {"name": "first_block", "threshold": "x"}}, r"accelerators\[0\]\.gate: '<=' not supported"),
        ({"gate": "first_block"}, r"accelerators\[0\]\.gate: must look like \{\"name\": \.\.\.,"),
        ({"gate": {"name": "policy", "inner": {"name": "policy"}}}, r"gate\.inner\.name: unknown 'policy'; allowed: f"),
        (
            {"head": ["policy"]},
            r"accelerators\[0\]\.head: must be the name of a folder beside the recipe, or null, got",
        ),
        ({"attach": 1}, r"accelerators\[0\]\.attach: unknown"),
    ],
)
def test_errors_say_where(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **fields)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Cache(options={"x": torch.zeros(1)}), r"accelerators\[0\]\.options\.x: a Tensor cannot be written"),
        (Cache(options={"x": [0, {1: 2}]}), r"accelerators\[0\]\.options\.x\[1\]: a dict cannot be written"),
        (Cache(options={"x": math.inf}), r"accelerators\[0\]\.options\.x: inf cannot be written to JSON"),
        (Cache(gate="first_block"), r"accelerators\[0\]\.gate: must hold a frozen dataclass .*, got 'first_block'"),
        (Cache(table=Path("../a.json")), r"accelerators\[0\]\.table: '\.\./a\.json' leads out of the recipe's folder"),
        (Cache(head=nn.Linear(2, 2)), "the learned part 'policy' is a Linear, which has no save_pretrained"),
        (Cache(head="nowhere"), "no head in nowhere"),
    ],
)
def test_what_cannot_be_read_again_is_not_written(cache: Cache, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe([cache]).save_pretrained(tmp_path / "recipe")
    assert list(tmp_path.iterdir()) == []


def test_an_accelerator_that_is_not_registered_is_not_written(registered: Callable[[], None], tmp_path: Path) -> None:
    registered()
    with pytest.raises(ValueError, match=r"accelerators\[0\]\.name: unknown 'cache'"):
        Recipe([Cache()]).save_pretrained(tmp_path / "recipe")
    assert list(tmp_path.iterdir()) == []


def test_learned_parts_get_folders_of_their_own(tmp_path: Path) -> None:
    heads = [Head(width) for width in (2, 3, 4)]
    cache = Cache(gate=Policy(heads[0]), guards=(Policy(heads[1]),), head=heads[2])
    assert {name: part.value for name, part in cache.parts.items()} == {
        "policy": heads[0],
        "policy-2": heads[1],
        "policy-3": heads[2],
    }
    Recipe([cache]).save_pretrained(tmp_path)
    (read_back,) = Recipe.from_pretrained(tmp_path).accelerators
    assert read_back.gate.head == tmp_path / "policy"
    loaded = read_back.loaded(None)
    found = [loaded.gate.head, loaded.guards[0].head, loaded.head]
    for head, again in zip(heads, found, strict=True):
        assert torch.equal(head.linear.weight, again.linear.weight)
    assert list(loaded.networks) == ["policy", "policy-2", "policy-3"]
    assert loaded.loaded(None) is loaded


def test_parts_that_lie_on_disk_are_copied(tmp_path: Path) -> None:
    head = Head()
    head.save_pretrained(tmp_path / "elsewhere")
    Recipe([Cache(head=tmp_path / "elsewhere")]).save_pretrained(tmp_path / "recipe")
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    (cache,) = Recipe.from_pretrained(tmp_path / "recipe").accelerators
    assert torch.equal(cache.loaded(None).head.linear.weight, head.linear.weight)


def test_missing_part(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsNotFoundError,
        match=r"accelerators\[0\]\.head: the learned part 'policy' is missing, .*policy\. Copy it there",
    ):
        read(tmp_path, head="policy")


@pytest.mark.parametrize("text", ["../out", "/out", "a/../../out", "\\\\host\\out", "C:\\out", "..\\out", "link", ""])
def test_a_folder_cannot_point_elsewhere(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    Head().save_pretrained(tmp_path / "out")
    (tmp_path / "recipe" / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ValueError, match=r"accelerators\[0\]\.head: .* leads out of the recipe's folder"):
        read(tmp_path / "recipe", head=text)


def test_a_file_that_the_user_named_can_point_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    Head().save_pretrained(tmp_path / "out")
    for text in ("../out", str(tmp_path / "out")):
        with pytest.raises(ValueError, match="leads out"):
            read(tmp_path / "recipe", head=text)
        (cache,) = Recipe.from_pretrained(tmp_path / "recipe" / FILE_NAME).accelerators
        assert cache.head.resolve() == tmp_path / "out"


def test_linked_files_within_a_part_are_read(tmp_path: Path) -> None:
    """As the Hub's cache has them."""
    Head().save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot" / "policy").mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / "policy" / file.name).symlink_to(file)
    assert Source(tmp_path / "snapshot").part("policy", "x").is_dir()
    (cache,) = read(tmp_path / "snapshot", head="policy").accelerators
    assert isinstance(cache.loaded(None).head, Head)


def test_accelerators_stay_frozen(tmp_path: Path) -> None:
    (cache,) = read(tmp_path).accelerators
    with pytest.raises(FrozenInstanceError):
        cache.gate = None
