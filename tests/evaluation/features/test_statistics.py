"""Reference statistics in files: ours and those of others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from flowaccel.evaluation import (
    FeatureNetwork,
    ReferenceSet,
    RowSamples,
    frechet_distance,
    load_features,
    load_reference,
    measure,
    save_statistics,
)
from flowaccel.evaluation.features.extractors import check_reference

ME = Path(__file__).stem


class Corners(nn.Module):
    """Four features of images of any size; it does not resize."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> Tensor:
        values = images.float().mean(1)
        return self.scale * torch.stack([values[:, i, j] for i in (0, -1) for j in (0, -1)], dim=1)


def scaled() -> Corners:
    return Corners(2.0)


@pytest.fixture
def network() -> FeatureNetwork:
    return load_features(f"{ME}:Corners")


@pytest.fixture
def inception(tmp_path: Path) -> FeatureNetwork:
    return load_features(f"inception:{tiny.inception_file(tmp_path / 'network.pt')}")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tiny.photos(tmp_path / "photos", count=9)


def written(photos: Path, network: FeatureNetwork, path: Path, **options: Any) -> ReferenceSet:
    reference = load_reference(str(photos), network)
    save_statistics(reference, network, path, **options)
    return reference


def row(network: FeatureNetwork) -> RowSamples:
    images = torch.randint(256, (8, 3, 14, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return RowSamples(name="baseline", features=network(images), labels=None, predicted=None, images=images)


def test_statistics_say_what_the_images_say(photos: Path, network: FeatureNetwork, tmp_path: Path) -> None:
    path = tmp_path / "ref.safetensors"
    images = written(photos, network, path)
    found = load_reference(str(path), network, (3, 14, 20))
    assert found.name == str(path)
    assert found.features is None
    assert found.moments.count == 9
    assert torch.equal(found.moments.mean, images.moments.mean)
    assert torch.equal(found.moments.scatter, images.moments.scatter)
    rows = [row(network)]
    values = [measure(rows, given, ["fid"], features_name="net", resamples=3) for given in (found, images)]
    assert values[0]["baseline"]["fid"]["value"] == values[1]["baseline"]["fid"]["value"]
    with pytest.raises(
        ValueError, match=r"'kid' needs the features .*ref.safetensors' has only moments; .*--with-features"
    ):
        measure(rows, found, ["kid"], features_name="net")


def test_statistics_file_says_who_made_it(photos: Path, network: FeatureNetwork, tmp_path: Path) -> None:
    written(photos, network, tmp_path / "ref.safetensors")
    with safe_open(tmp_path / "ref.safetensors", "pt") as file:
        said = file.metadata()
        assert sorted(file.keys()) == ["count", "mean", "scatter"]
        assert file.get_tensor("scatter").dtype == torch.float64
    assert said["features"] == f"{ME}:Corners"
    assert said["fingerprint"] == network.fingerprint
    assert said["source"] == str(photos)
    assert said["n"] == "9"
    assert json.loads(said["image_shape"]) == [3, 14, 20]


def test_statistics_with_features_serve_every_metric(photos: Path, network: FeatureNetwork, tmp_path: Path) -> None:
    path = tmp_path / "ref.safetensors"
    images = written(photos, network, path, with_features=True)
    metrics = ["fid", "kid", "precision", "recall"]
    found, expected = (
        measure([row(network)], reference, metrics, features_name="net", resamples=5)["baseline"]
        for reference in (load_reference(str(path), network), images)
    )
    assert [found[name]["value"] for name in metrics] == [expected[name]["value"] for name in metrics]


def test_statistics_of_another_network_are_refused(photos: Path, network: FeatureNetwork, tmp_path: Path) -> None:
    path = tmp_path / "ref.safetensors"
    written(photos, network, path)
    other = load_features(f"{ME}:scaled")
    message = (
        rf"ref.safetensors were made with {ME}:Corners, fingerprint {network.fingerprint}, but the feature network is "
        rf"{ME}:scaled, fingerprint {other.fingerprint}"
    )
    with pytest.raises(ValueError, match=message):
        load_reference(str(path), other)


def test_statistics_of_another_size_are_refused_unless_the_network_resizes(
    photos: Path, network: FeatureNetwork, inception: FeatureNetwork, tmp_path: Path
) -> None:
    written(photos, network, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"images of shape \(3, 14, 20\) .*samples \(3, 8, 8\); both must agree"):
        load_reference(str(tmp_path / "plain.safetensors"), network, (3, 8, 8))
    written(photos, inception, tmp_path / "resized.safetensors")
    assert load_reference(str(tmp_path / "resized.safetensors"), inception, (3, 8, 8)).moments.count == 9


def test_damaged_and_foreign_statistics(photos: Path, network: FeatureNetwork, tmp_path: Path) -> None:
    whole = tmp_path / "ref.safetensors"
    written(photos, network, whole, with_features=True)
    with safe_open(whole, "pt") as file:
        said = file.metadata()
    tensors = load_file(whole)

    def fails(message: str, changed: dict[str, Tensor] | None = None, **header: str) -> None:
        path = tmp_path / "bad.safetensors"
        if changed is not None or header:
            save_file({**tensors, **(changed or {})}, path, {**said, **header})
        with pytest.raises(ValueError, match=message):
            load_reference(str(path), network)

    (tmp_path / "bad.safetensors").write_bytes(whole.read_bytes()[:-40])
    fails("bad.safetensors are damaged")
    save_file({"weight": torch.zeros(3)}, tmp_path / "bad.safetensors")
    fails("is no statistics file of this flowaccel; make one with `flowaccel stats`")
    fails("is no statistics file of this flowaccel", format="flowaccel-statistics-9")
    fails("damaged .*must be finite", {"mean": tensors["mean"] * torch.nan})
    fails(r"damaged .*mean must have shape", {"mean": tensors["mean"][:2].clone()})
    fails(r"damaged .*features must have shape", {"features": tensors["features"][:, :2].clone()})
    fails(r"damaged .*at least 2 samples", {"count": torch.tensor(1)})
    fails("damaged", image_shape="(3,")
    fails("damaged", {"count": torch.zeros(2)})


def test_what_cannot_be_saved(photos: Path, network: FeatureNetwork, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written to a .safetensors file, got .*ref.npz"):
        written(photos, network, tmp_path / "ref.npz")
    save_npz(tmp_path / "ref.npz", *mean_and_covariance())
    imported = load_reference(str(tmp_path / "ref.npz"), network)
    with pytest.raises(ValueError, match="is not a set of images"):
        save_statistics(imported, network, tmp_path / "ref.safetensors")
    written(photos, network, tmp_path / "bare.safetensors")
    bare = load_reference(str(tmp_path / "bare.safetensors"), network)
    with pytest.raises(ValueError, match="is not a set of images"):
        save_statistics(bare, network, tmp_path / "ref.safetensors", with_features=True)


# npz files of others


def mean_and_covariance(width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    samples = np.random.default_rng(0).normal(size=(30, width))
    return samples.mean(0), np.cov(samples, rowvar=False)


def save_npz(path: Path, mu: Any, sigma: Any, **more: Any) -> Path:
    np.savez(path, mu=mu, sigma=sigma, **more)
    return path


def test_npz_gives_frechet_distances_only(network: FeatureNetwork, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    path = save_npz(tmp_path / "ref.npz", samples.mean(0), np.cov(samples, rowvar=False), mu_s=np.zeros(3))
    reference = load_reference(str(path), network, (3, 8, 8))
    assert reference.name == f"{path} (no fingerprint)"
    assert (reference.features, reference.moments.count) == (None, None)
    rows = [row(network)]
    found = measure(rows, reference, ["fid"], features_name="net", resamples=3)["baseline"]["fid"]
    difference = rows[0].features.double() - rows[0].features.double().mean(0)
    a, b = (difference.T @ difference / 7).numpy(), np.cov(samples, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()
    mean = ((rows[0].features.mean(0).numpy() - samples.mean(0)) ** 2).sum()
    assert found["value"] == pytest.approx(mean + np.trace(a) + np.trace(b) - 2 * roots, rel=1e-5)
    assert found["reference"].endswith("(no fingerprint)")
    with pytest.raises(ValueError, match=r"metric 'kid' needs the features of the reference samples"):
        measure(rows, reference, ["kid"], features_name="net")


def test_npz_of_another_width(inception: FeatureNetwork, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "ref.npz", *mean_and_covariance())
    with pytest.raises(ValueError, match=r"are of 4 features, inception:\S+ has 6; .*another network"):
        load_reference(str(path), inception)


class Hostile:
    """What `allow_pickle=True` would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_wrong_npz(network: FeatureNetwork, tmp_path: Path) -> None:
    mean, covariance = mean_and_covariance()
    path = tmp_path / "ref.npz"

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=rf"ref.npz cannot be read as statistics \(.*{message}.*npz file with mu"):
            load_reference(str(path), network)

    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    fails("no mu and no sigma, only arr_0")
    save_npz(path, covariance, mean)
    fails("swapped")
    save_npz(path, mean * np.nan, covariance)
    fails("finite")
    save_npz(path, np.array(["a"] * 4), covariance)
    fails("mu must be real numbers")
    save_npz(path, np.array([Hostile(tmp_path / "trap")], dtype=object), covariance)
    fails("allow_pickle=False")
    assert not (tmp_path / "trap").exists()
    np.savez_compressed(path, mu=mean, sigma=covariance)
    path.write_bytes(path.read_bytes()[:200])
    fails("")
    with path.open("wb") as file:
        np.save(file, mean)
    fails("")


# names and folders


@pytest.mark.parametrize("name", ["ref.safetensors", "ref.npz"])
def test_absent_statistics(name: str, network: FeatureNetwork) -> None:
    for check in (check_reference, lambda name: load_reference(name, network)):
        with pytest.raises(ValueError, match=rf"there is no reference file /nowhere/{name}; `flowaccel stats` makes"):
            check(f"/nowhere/{name}")


def test_folders_of_mixed_sizes(network: FeatureNetwork, inception: FeatureNetwork, tmp_path: Path) -> None:
    folder = str(tiny.photos(tmp_path / "mixed", sizes=((20, 14), (9, 30))))
    with pytest.raises(ValueError, match=r"different shapes: .*only inception, clip and dinov2 resize"):
        load_reference(folder, network)
    reference = load_reference(folder, inception, (3, 8, 8))
    path = tmp_path / "ref.safetensors"
    save_statistics(reference, inception, path)
    again = load_reference(str(path), inception, (3, 8, 8))
    assert again.image_shape is None
    assert frechet_distance(again.moments, reference.moments) == pytest.approx(0, abs=1e-9)


def test_grey_palette_and_transparent_images(inception: FeatureNetwork, tmp_path: Path) -> None:
    colour = Image.open(tiny.photos(tmp_path / "one", count=1) / "0.png")
    for i, mode in enumerate(("L", "P", "RGBA")):
        folder = tmp_path / mode
        folder.mkdir()
        changed = colour.convert(mode)
        changed.save(folder / "a.png")
        changed.save(folder / "b.png")
        expected = torch.from_numpy(np.array(changed.convert("RGB"))).permute(2, 0, 1)
        found = load_reference(str(folder), inception).features
        assert found is not None
        torch.testing.assert_close(found[:1], inception([expected]), msg=f"{i}: {mode}")


def test_images_of_sixteen_bits_are_refused(inception: FeatureNetwork, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep" / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png has mode 'I;16'; allowed are images of 8 bits"):
        load_reference(str(tmp_path / "deep"), inception)
