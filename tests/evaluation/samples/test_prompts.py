"""Classes and prompts, assigned to sample ids in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowaccel.data import shape_captions
from flowaccel.evaluation import Classes, Prompts


def test_classes_in_turn() -> None:
    classes = Classes((3, 1, 4))
    assert classes.arguments(range(5)) == {"class_labels": [3, 1, 4, 3, 1]}
    assert classes.arguments([7, 0]) == {"class_labels": [1, 3]}
    assert torch.equal(classes.labels([7, 0]), torch.tensor([1, 3]))
    assert len(classes) == 3
    assert classes.name == "3 classes"
    assert json.loads(json.dumps(classes.describe())) == {"classes": [3, 1, 4]}


def test_prompts_in_turn() -> None:
    prompts = Prompts(("a cat", "a dog"), source="pets.txt")
    assert prompts.arguments([0, 1, 2]) == {"prompt": ["a cat", "a dog", "a cat"]}
    assert prompts.labels([0, 1]) is None
    assert len(prompts) == 2
    assert prompts.name == "pets.txt, 2 prompts"


def test_description_follows_the_prompts() -> None:
    described = Prompts(("a", "b")).describe()
    assert described["prompts"] == 2
    assert described == Prompts(("a", "b"), source="other.txt").describe()
    assert described["sha256"] != Prompts(("b", "a")).describe()["sha256"]
    assert described["sha256"] != Prompts(("a", "c")).describe()["sha256"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_file_with_one_prompt_a_line(ending: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes((mark + ending.join(["zwei Kühe", "", "   ", "  a red circle ", "日本"])).encode())
    prompts = Prompts.from_file(path)
    assert prompts.prompts == ("zwei Kühe", "a red circle", "日本")
    assert prompts.source == "prompts.txt"


@pytest.mark.parametrize("content", [b"", b"\n\n   \n"])
def test_empty_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt"):
        Prompts.from_file(path)


def test_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\nzwei Kühe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text \(.* at byte 12\)"):
        Prompts.from_file(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "prompts.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
            Prompts.from_file(path)


@pytest.mark.slow
def test_prompts_of_the_zoo() -> None:
    prompts = Prompts.from_zoo("zoo:shapes-held-out")
    assert prompts == Prompts.from_zoo("shapes-held-out")
    assert prompts.name == "zoo:shapes-held-out, 500 prompts"
    assert prompts.prompts == shape_captions("prompts", 500, "held_out")
    with pytest.raises(ValueError, match=r"unknown set of prompts 'zoo:digits'.*there are zoo:shapes, zoo:shapes-held"):
        Prompts.from_zoo("zoo:digits")


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: Classes(()), "classes must name at least one class"), (lambda: Prompts(()), "prompts holds no prompt")],
)
def test_nothing_to_sample_for(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1e"])
def test_a_prompt_ends_where_its_line_ends(letter: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a{letter}b\n\n# c\r\n  d  \re\ne".encode())
    assert Prompts.from_file(path).prompts == (f"a{letter}b", "# c", "d", "e", "e")
