"""The captioned pictures: what is drawn is what the captions say, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from flowaccel.data import shape_captions, shapes
from flowaccel.data.shapes import (
    ATTRIBUTES,
    COLOURS,
    HELD_OUT,
    NOT_STATED,
    PLACES,
    SHAPES,
    attributes_of,
    caption_words,
    holds_held_out,
)


def stated(caption: str) -> dict[str, str]:
    row = attributes_of([caption])[0].tolist()
    return {
        name: values[index]
        for (name, values), index in zip(ATTRIBUTES.items(), row, strict=True)
        if index != NOT_STATED
    }


def test_same_split_same_pictures_and_prefixes() -> None:
    few, more = shapes("features", 20), shapes("features", 30)
    assert few.captions == more.captions[:20]
    assert torch.equal(few.images, more.images[:20])
    assert torch.equal(few.attributes, attributes_of(few.captions))
    assert few.images.shape == (20, 3, 32, 32)
    assert few.images.abs().max() <= 1


def test_splits_differ() -> None:
    assert len({shapes(split, 5).captions for split in ("generator", "features", "clip", "reference")}) == 4


def test_caption_words_are_those_of_the_captions() -> None:
    found = {word for caption in shape_captions(count=2000, combinations="all") for word in caption.split()}
    assert tuple(sorted(found)) == caption_words()


def test_captions_are_those_of_the_pictures() -> None:
    assert shape_captions("reference", 40) == shapes("reference", 40).captions


def test_every_value_of_every_attribute_occurs_and_all_kinds_of_picture() -> None:
    found = shapes("clip", 600).attributes
    for column, values in zip(found.unbind(1), ATTRIBUTES.values(), strict=True):
        wanted = set(range(len(values))) | {NOT_STATED}
        if values == ATTRIBUTES["arrangement"] or values is ATTRIBUTES["colour"]:
            wanted -= {NOT_STATED}
        assert wanted - {NOT_STATED} <= set(column.tolist())
    assert (found[:, list(ATTRIBUTES).index("second shape")] == NOT_STATED).any()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "a small striped red circle at the top left",
            {"size": "small", "texture": "striped", "colour": "red", "shape": "circle", "count": "a"}
            | {"arrangement": "at the top left"},
        ),
        (
            "three hollow white crosses",
            {"count": "three", "arrangement": "several", "texture": "hollow", "colour": "white", "shape": "cross"},
        ),
        (
            "a solid blue square right of a hollow green circle",
            {"arrangement": "beside", "texture": "hollow", "colour": "green", "shape": "circle"}
            | {"second texture": "solid", "second colour": "blue", "second shape": "square"},
        ),
        (
            "A solid blue square above a hollow green circle ",
            {"arrangement": "stacked", "texture": "solid", "colour": "blue", "shape": "square"}
            | {"second texture": "hollow", "second colour": "green", "second shape": "circle"},
        ),
    ],
)
def test_captions_are_read(caption: str, expected: dict[str, str]) -> None:
    assert stated(caption) == expected


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a small striped orange circle at the top left", "'orange'"),
        ("red circle", "its captions read"),
        ("", "its captions read"),
        ("one solid red circle", "'one'"),
    ],
)
def test_foreign_captions_are_refused(caption: str, said: str) -> None:
    with pytest.raises(ValueError, match="none of the data set shapes") as refused:
        attributes_of([caption])
    assert said in str(refused.value)


@pytest.mark.slow
def test_held_out_combinations() -> None:
    trained = shape_captions("generator", 3000)
    assert not any(map(holds_held_out, trained))
    assert all(map(holds_held_out, shape_captions("prompts", 200, "held_out")))
    mixed = [holds_held_out(caption) for caption in shape_captions("clip", 500)]
    assert 0 < sum(mixed) < 500
    assert holds_held_out("two solid white squares") and not holds_held_out("two solid white circles")
    # conditioning took nothing else away: each colour and each shape of a held-out pair is still seen
    words = {word for caption in trained for word in caption.split()}
    assert {word for pair in HELD_OUT for word in pair} <= words


def test_a_solid_shape_is_where_and_what_the_caption_says() -> None:
    """The pixel at the stated place has the stated colour, the corner opposite the background."""
    pictures = shapes("generator", 1500)
    checked = 0
    for image, caption in zip(pictures.images, pictures.captions, strict=True):
        facts = stated(caption)
        if facts["arrangement"] not in PLACES or facts["texture"] != "solid":
            continue
        x, y = PLACES[facts["arrangement"]]
        pixel = image[:, int(y), int(x)] / 2 + 0.5
        nearest = min(COLOURS, key=lambda name: float((pixel - torch.tensor(COLOURS[name])).square().sum()))
        assert nearest == facts["colour"], caption
        assert image[:, int(31.9 - y) if y != 16 else 0, int(31.9 - x) if x != 16 else 0].std() < 1e-6  # grey
        checked += 1
    assert checked > 100


def test_sizes_and_counts_are_told_apart_by_how_much_is_covered() -> None:
    pictures = shapes("features", 3000)
    covered = (pictures.images - pictures.images[:, :, :1, 31:]).abs().amax(dim=1).gt(0.2).flatten(1).sum(dim=1)
    rows = [stated(caption) for caption in pictures.captions]

    def mean(**wanted: str) -> float:
        chosen = [i for i, facts in enumerate(rows) if wanted.items() <= facts.items()]
        assert len(chosen) > 10
        return float(covered[chosen].float().mean())

    for shape in SHAPES:
        assert mean(size="large", shape=shape, texture="solid") > 1.8 * mean(size="small", shape=shape, texture="solid")
    assert mean(count="four", texture="solid") > 1.5 * mean(count="two", texture="solid")


@pytest.mark.parametrize(("split", "count", "said"), [("test", 1, "split must be one of"), ("clip", 0, "at least 1")])
def test_bad_arguments(split: str, count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shapes(split, count)
