"""Feature networks and reference sets by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flowaccel.data import digits
from flowaccel.evaluation import load_features, load_reference
from flowaccel.evaluation.features.extractors import check_reference, fingerprint, quantise


class Moments(nn.Module):
    """A feature network of one's own: mean and spread of each quarter."""

    def forward(self, images: Tensor) -> Tensor:
        quarters = images.float().unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)
        return torch.cat([quarters.mean(-1), quarters.std(-1)], dim=1)


class Classifier(Moments):
    """The same with classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)


def text() -> str:
    return "no network"


def needs_an_argument(size: int) -> Moments:
    return Moments()


VALUE = 3
IMAGES = torch.randint(256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
ME = Path(__file__).stem


def test_zoo_features() -> None:
    network = load_features("zoo:digits-features")
    features = network(IMAGES)
    assert features.shape == (7, 32)
    assert features.dtype is torch.float32
    assert not features.requires_grad
    assert network.name == "zoo:digits-features"
    assert network.classify is not None
    assert network.classify(features).shape == (7,)
    assert not network.module.training


def test_zoo_features_know_digits() -> None:
    """Trained on other images than these, it names most of them."""
    network = load_features("zoo:digits-features")
    held_out = digits("reference")
    assert network.classify is not None
    found = network.classify(network(quantise(held_out)))
    assert found.eq(held_out.labels).float().mean() > 0.95


def test_many_images_go_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_features(f"{ME}:Moments")
    whole = network(IMAGES)
    monkeypatch.setattr("flowaccel.evaluation.features.network._BATCH", 3)
    torch.testing.assert_close(network(IMAGES), whole)


def test_features_of_ones_own() -> None:
    network = load_features(f"{ME}:Moments")
    assert network(IMAGES).shape == (7, 8)
    assert network.classify is None
    with_classes = load_features(f"{ME}:Classifier")
    assert with_classes.classify is not None
    classes = with_classes.classify(with_classes(IMAGES))
    assert classes.shape == (7,)
    assert not classes.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inceptoin", "features must be inception, clip or dinov2 .*zoo:NAME or MODULE:ATTRIBUTE, got 'inceptoin'"),
        ("zoo:digit-features", "unknown zoo entry .*did you mean 'zoo:digits-features'"),
        ("zoo:sit-digits", "zoo:sit-digits is a pipeline, not a feature network; there are zoo:digits-features"),
        ("no_such_module:Network", "'no_such_module:Network' cannot be made: No module named 'no_such_module'"),
        (f"{ME}:Nothing", "cannot be made: .* no attribute 'Nothing'"),
        (f"{ME}:text", "must return an nn.Module, got str"),
        (f"{ME}:needs_an_argument", "cannot be made: .*size"),
        (f"{ME}:VALUE", "cannot be made: .*not callable"),
        (":Network", "features must be .*MODULE:ATTRIBUTE, got ':Network'"),
    ],
)
def test_wrong_features(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_features(name)


def test_fingerprint_is_of_class_names_and_weights() -> None:
    torch.manual_seed(0)
    classifier = Classifier()
    first = fingerprint(classifier)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert fingerprint(classifier) == first
    assert fingerprint(nn.Sequential(nn.Linear(8, 10))) != first
    with torch.no_grad():
        classifier.head.bias[0] += 1e-3
    assert fingerprint(classifier) != first


def test_embedded_reference() -> None:
    network = load_features("zoo:digits-features")
    reference = load_reference("zoo:digits", network, (1, 8, 8))
    assert reference.name == "zoo:digits"
    assert reference.features is not None
    assert reference.features.shape == (497, 32)
    assert reference.moments.count == 497


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_reference_folder(mode: str, tmp_path: Path) -> None:
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    arrays = [np.random.default_rng(i).integers(256, size=shape, dtype=np.uint8) for i in range(5)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{9 - i}.png")
    network = load_features(f"{ME}:Moments")
    reference = load_reference(str(tmp_path), network, (1 if mode == "L" else 3, 8, 8))
    stacked = torch.from_numpy(np.stack(arrays[::-1]))
    expected = network(stacked.unsqueeze(1) if mode == "L" else stacked.permute(0, 3, 1, 2))
    assert reference.features is not None
    torch.testing.assert_close(reference.features, expected)


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 8, 8)])
def test_reference_of_another_size(size: tuple[int, int, int]) -> None:
    network = load_features("zoo:digits-features")
    with pytest.raises(ValueError, match=r"'zoo:digits' has images of shape \(1, 8, 8\) .*samples \(.*must agree"):
        load_reference("zoo:digits", network, size)


def test_wrong_references(tmp_path: Path) -> None:
    network = load_features(f"{ME}:Moments")
    (tmp_path / "notes.txt").write_text("no image")
    for name, message in {
        "zoo:digit": "unknown reference 'zoo:digit': did you mean 'zoo:digits'.*there are ",
        str(tmp_path): "reference must be zoo:SET, a folder with images, or .*; .* has no images",
        str(tmp_path / "nowhere"): "reference must be zoo:SET, a folder with images, or .*; .* has no images",
    }.items():
        for check in (check_reference, lambda name: load_reference(name, network)):
            with pytest.raises(ValueError, match=message):
                check(name)


def test_reference_images_of_different_shapes(tmp_path: Path) -> None:
    for i, size in enumerate(((8, 8), (8, 9))):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"have different shapes: \[\(1, 8, 8\), \(1, 9, 8\)\]"):
        load_reference(str(tmp_path), load_features(f"{ME}:Moments"))


def test_damaged_reference_image(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"reference image .*1\.png is damaged"):
        load_reference(str(tmp_path), load_features(f"{ME}:Moments"))


def test_sub_folders_are_used_and_everything_is_counted(tmp_path: Path) -> None:
    network = load_features("zoo:digits-features")
    for name in ("a.png", "b.BMP", "seven/c.png", "seven/deep/d.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path, lossless=True)
    plain = tmp_path / "seven"
    with (
        pytest.warns(UserWarning, match=r"seven: 2 images, 1 of them in sub-folders$"),
        pytest.raises(ValueError, match="different shapes"),  # WebP knows no grey
    ):
        load_reference(str(plain), network)
    (plain / "deep/d.webp").unlink()
    for name in ("notes.txt", "more.txt", "seven/e.tiff", "LICENSE"):
        (tmp_path / name).write_text("x")
    left_out = r"4 other files left out, which are no PNG, JPEG, WebP or BMP: .*\.txt \(2\)"
    with pytest.warns(UserWarning, match=rf"3 images, 1 of them in sub-folders, {left_out}"):
        assert load_reference(str(tmp_path), network).moments.count == 3


def test_animations_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a\.png is animated"):
        load_reference(str(tmp_path), load_features("zoo:digits-features"))
