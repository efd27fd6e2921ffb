"""Samples on disk: made once, whatever interrupts the making."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowaccel.evaluation.samples.store import SampleStore, folder_name, generate, sample_generator, sample_seed

IDS = list(range(10))
MANIFEST = {"steps": 5, "conditions": {"classes": [0, 1]}, "seed": 0}


def draw(ids: list[int]) -> Tensor:
    """What a pipeline whose images do not depend on the batch makes of sample ids."""
    return torch.stack(
        [
            torch.randint(256, (1, 6, 6), dtype=torch.uint8, generator=sample_generator(0, sample_id))
            for sample_id in ids
        ]
    )


def make_all(store: SampleStore, batch_size: int = 4, make: Callable[[list[int]], Tensor] = draw) -> list[int]:
    return list(generate(store, IDS, batch_size, make))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def whole(tmp_path: Path) -> SampleStore:
    """The store of a run that nothing interrupted."""
    store = SampleStore(tmp_path / "whole")
    store.open(MANIFEST)
    make_all(store)
    return store


def test_every_sample_is_made_once(tmp_path: Path) -> None:
    store, asked = SampleStore(tmp_path), []

    def make(ids: list[int]) -> Tensor:
        asked.append(ids)
        return draw(ids)

    assert store.missing(IDS) == IDS
    assert make_all(store, 4, make) == [4, 4, 2]
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert store.missing(IDS) == []
    assert make_all(store, 4, make) == []
    assert len(asked) == 3
    assert torch.equal(store.read(IDS), draw(IDS))


def test_more_samples_keep_those_there_are(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    list(generate(store, IDS[:3], 2, draw))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    asked: list[int] = []

    def make(ids: list[int]) -> Tensor:
        asked.extend(ids)
        return draw(ids)

    make_all(store, 4, make)
    assert asked == IDS[3:]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_holes_are_filled(whole: SampleStore) -> None:
    digest = whole.digest(IDS)
    for sample_id in (2, 7):
        whole._path(sample_id).unlink()
    assert whole.missing(IDS) == [2, 7]
    assert make_all(whole) == [2]
    assert whole.digest(IDS) == digest


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("other_batch", [1, 3, 10])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_and_resumed_is_the_same_to_the_byte(
    at: int, other_batch: int, tmp_path: Path, whole: SampleStore
) -> None:
    store, batches = SampleStore(tmp_path / "interrupted"), []
    store.open(MANIFEST)

    def make(ids: list[int]) -> Tensor:
        if len(batches) == at:
            raise Interruption
        batches.append(ids)
        return draw(ids)

    with pytest.raises(Interruption):
        make_all(store, 4, make)
    assert store.missing(IDS) == IDS[4 * at :]
    store.open(MANIFEST)
    make_all(store, other_batch)
    assert contents(store.folder) == contents(whole.folder)


@pytest.mark.parametrize("nth", [1, 3, 6])
def test_full_disk_leaves_nothing_half_and_resumes(
    nth: int, tmp_path: Path, whole: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, written = SampleStore(tmp_path / "full"), []
    store.open(MANIFEST)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == nth:
            write_bytes(path, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            make_all(store)
    assert len(store.missing(IDS)) == len(IDS) - nth + 1
    assert [path.name for path in store.folder.rglob("*") if path.name.endswith(".tmp")] == []
    make_all(store, 3)
    assert contents(store.folder) == contents(whole.folder)


def test_a_batch_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        make_all(SampleStore(tmp_path), 4, lambda ids: draw(ids)[:-1])


def test_the_same_manifest_may_come_again(whole: SampleStore) -> None:
    before = contents(whole.folder)
    whole.open(json.loads(json.dumps(MANIFEST)))
    whole.open(MANIFEST | {"conditions": {"classes": (0, 1)}})  # as JSON it is the same
    assert contents(whole.folder) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 6}, ["steps: there 5, now 6"]),
        ({"seed": 1, "steps": None}, ["seed: there 0, now 1", "steps: there 5, now None"]),
        ({"weights": {"network": "abc"}}, ["weights: there None, now {'network': 'abc'}"]),
        ({"conditions": {"classes": [1, 0]}}, ["conditions: there {'classes': [0, 1]}, now {'classes': [1, 0]}"]),
    ],
)
def test_another_manifest_is_refused_by_its_keys(changes: dict[str, Any], named: list[str], whole: SampleStore) -> None:
    before = contents(whole.folder)
    with pytest.raises(ValueError, match="holds samples made differently") as caught:
        whole.open(MANIFEST | changes)
    message = str(caught.value)
    assert str(whole.folder) in message
    assert "choose another --out or delete it" in message
    for change in named:
        assert change in message
    assert sum(f"{key}: there" in message for key in MANIFEST) <= len(named)
    assert contents(whole.folder) == before


def test_a_key_that_went_away_is_a_difference(whole: SampleStore) -> None:
    with pytest.raises(ValueError, match="seed: there 0, now None"):
        whole.open({key: value for key, value in MANIFEST.items() if key != "seed"})


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_exactly(channels: int, tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    image = torch.arange(channels * 5 * 7).reshape(channels, 5, 7).mul(5).to(torch.uint8)
    store.write(0, image)
    store.write(1, 255 - image)
    assert torch.equal(store.read([1, 0]), torch.stack([255 - image, image]))
    with Image.open(tmp_path / "samples" / "000000.png") as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "L" if channels == 1 else "RGB", (7, 5))


def test_no_sample_says_which(whole: SampleStore) -> None:
    with pytest.raises(ValueError, match=r"000010\.png is missing or damaged .*delete it and run again"):
        whole.read([*IDS, 10])


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_damaged_sample_says_which(damage: str, whole: SampleStore) -> None:
    path = whole._path(3)
    content = {"truncated": path.read_bytes()[:40], "empty": b"", "foreign": b"GIF89a and no more"}[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"000003\.png is missing or damaged .*delete it and run again"):
        whole.read(IDS)
    path.unlink()
    make_all(whole)
    assert torch.equal(whole.read(IDS), draw(IDS))


def test_no_flipped_byte_becomes_another_image(whole: SampleStore) -> None:
    path = whole._path(0)
    image, content = draw([0]), path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(bytes([*content[:position], content[position] ^ 0x81, *content[position + 1 :]]))
        try:
            found = whole.read([0])
        except ValueError as error:
            assert "is missing or damaged" in str(error)
        else:
            assert torch.equal(found, image)


def test_seeds_are_stable_and_differ() -> None:
    # written down, because another rule would make other samples of an old run
    assert (sample_seed(0, 0), sample_seed(7, 123)) == (7689419447139100721, 2107909234125892846)
    seeds = [sample_seed(run, sample) for run in range(30) for sample in range(30)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(
        torch.randn(3, generator=sample_generator(4, 2)), torch.randn(3, generator=sample_generator(4, 2))
    )
    assert sample_generator(4, 2).device.type == "cpu"


@pytest.mark.parametrize("name", ["baseline", "baseline@10", "flowturbo-H2P4R2", "a_b.c+d"])
def test_plain_row_names_are_folder_names(name: str) -> None:
    assert folder_name(name) == name


def test_other_row_names_become_safe_and_stay_apart() -> None:
    names = ["a/b", "a_b", "a b", "../up", "..", ".", "", "a:b", "ä/b", "a\\b"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all(Path(folder).name == folder and not folder.startswith(".") for folder in folders)
