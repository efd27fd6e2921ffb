"""Inception, CLIP and DINOv2 by name: random weights in the real classes."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import tiny
from flowaccel import CheckpointError, WeightsNotFoundError
from flowaccel.evaluation import Moments, frechet_distance, load_features, load_reference
from flowaccel.evaluation.features.preprocessing import resize

IMAGES = torch.randint(256, (5, 3, 20, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.dinov2_folder(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.inception_file(tmp_path_factory.mktemp("inception") / "network.pt")


def pixels(images: Tensor, size: int, normalisation: Any) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation)
    return (torch.stack([resize(image, size) for image in images]) / 255 - mean) / std


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder with other tensors."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


# what they compute


def test_inception_gets_the_clean_resize_and_nothing_else(inception: Path) -> None:
    network = load_features(f"inception:{inception}")
    resized = torch.stack([resize(image, 299) for image in IMAGES])
    expected = torch.jit.load(str(inception)).layers((resized - 128) / 128).flatten(1)
    torch.testing.assert_close(network(IMAGES), expected)
    assert network.classify is None and network.encode_text is None


def test_inception_of_the_published_width(tmp_path: Path) -> None:
    network = load_features(f"inception:{tiny.inception_file(tmp_path / 'wide.pt', width=2048)}")
    assert network(IMAGES[:2]).shape == (2, 2048)


class AsTorchmetricsWants(nn.Module):
    """The same network and resize as one module."""

    num_features = 6

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layers = torch.jit.load(str(path)).layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((torch.stack([resize(image, 299) for image in images]) - 128) / 128).flatten(1)


def test_frechet_distance_of_inception_is_that_of_torchmetrics(inception: Path, tmp_path: Path) -> None:
    network = load_features(f"inception:{inception}")
    real, fake = (
        torch.randint(low, 256, (40, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(low))
        for low in (0, 60)
    )
    theirs = FrechetInceptionDistance(feature=AsTorchmetricsWants(inception))
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(Moments.of(network(fake)), Moments.of(network(real)))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert ours > 0.01


def test_clip_gives_projected_embeddings(clip: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    network = load_features(f"clip:{clip}")
    theirs = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = theirs(pixels(IMAGES, 16, OPENAI)).image_embeds
    torch.testing.assert_close(network(IMAGES), expected)
    assert expected.std(dim=0).min() > 1e-4  # another image, other features


def test_clip_of_the_image_half_alone(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection.from_pretrained(clip).save_pretrained(tmp_path)
    half = load_features(f"clip:{tmp_path}")
    torch.testing.assert_close(half(IMAGES), load_features(f"clip:{clip}")(IMAGES))
    assert half.encode_text is None


def test_clip_encodes_texts(clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    encode = load_features(f"clip:{clip}").encode_text
    assert encode is not None
    texts = ["a cat", "dog"]
    tokens = CLIPTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip).eval().get_text_features(**tokens).pooler_output
    torch.testing.assert_close(encode(texts), expected)
    torch.testing.assert_close(encode(["dog"]), expected[1:])  # whatever it is padded to
    long, longer = encode(["abcdefghijklmnop", "abcdefghijklmnopq"])  # of twelve tokens, two are begin and end
    torch.testing.assert_close(long, longer)


def test_dinov2_gives_the_class_token(dinov2: Path) -> None:
    from transformers import Dinov2Model

    network = load_features(f"dinov2:{dinov2}")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2).eval()(pixels(IMAGES, 224, IMAGENET)).last_hidden_state[:, 0]
    torch.testing.assert_close(network(IMAGES), expected)
    assert network.encode_text is None


def test_half_precision_weights_are_used_in_float32(tmp_path: Path) -> None:
    network = load_features(f"dinov2:{tiny.dinov2_folder(tmp_path, dtype=torch.float16)}")
    assert {parameter.dtype for parameter in network.module.parameters()} == {torch.float32}


def test_a_folder_says_how_images_are_normalised(clip: Path, tmp_path: Path) -> None:
    other = rewritten(clip, tmp_path / "other", lambda tensors: None)
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (other / "preprocessor_config.json").write_text(json.dumps(said))
    network, published = load_features(f"clip:{other}"), load_features(f"clip:{clip}")
    with torch.no_grad():
        expected = published.module(pixels(IMAGES, 16, (said["image_mean"], said["image_std"])))
    torch.testing.assert_close(network(IMAGES), expected)
    assert network.fingerprint != published.fingerprint
    (other / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(CheckpointError, match="must give three numbers"):
        load_features(f"clip:{other}")


def test_images_of_different_sizes_go_in_batches(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_features(f"clip:{clip}")
    images = [IMAGES[0], IMAGES[1, :, :7], IMAGES[2, :1]]
    monkeypatch.setattr("flowaccel.evaluation.features.network._BATCH_RESIZED", 2)
    found = network(iter(images))
    torch.testing.assert_close(found, torch.cat([network([image]) for image in images]))


# what identifies them


def test_fingerprint_is_of_weights_and_preprocessing(clip: Path, dinov2: Path, inception: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["text_projection.weight"][0, 0] += 1e-3

    names = [f"clip:{clip}", f"dinov2:{dinov2}", f"inception:{inception}"]
    names += [f"clip:{rewritten(clip, tmp_path / 'clip', change)}"]
    names += [f"inception:{tiny.inception_file(tmp_path / 'other.pt', seed=1)}"]
    found = [load_features(name).fingerprint for name in names]
    assert len(set(found)) == len(found)
    assert found == [load_features(name).fingerprint for name in names]
    elsewhere = rewritten(clip, tmp_path / "elsewhere", lambda tensors: None)
    assert load_features(f"clip:{elsewhere}").fingerprint == found[0]


# where they come from


@pytest.mark.parametrize(
    ("kind", "hub_id"), [("clip", "openai/clip-vit-large-patch14"), ("dinov2", "facebook/dinov2-large")]
)
def test_bare_names_are_hub_ids(
    kind: str, hub_id: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options.get("local_files_only")))
        return str(request.getfixturevalue(kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_features(kind).name == f"{kind}:{hub_id}"
    assert asked == [(hub_id, True)]  # the cache alone


def test_an_incomplete_cache_is_downloaded(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    folders = {True: tmp_path, None: clip}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, **options: str(folders[options.get("local_files_only")])
    )
    assert load_features("clip:some/one").name == "clip:some/one"
    folders[None] = tmp_path
    with pytest.raises(WeightsNotFoundError, match=r"clip:some/one \(it has no config.json or no model\*"):
        load_features("clip:some/one")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", r"cannot load clip:openai/\S+ \(.*hf download openai/clip-vit-large-patch14 --local-dir PATH"),
        ("dinov2:some/one", r"as dinov2:PATH; on a machine with network: hf download some/one --local-dir"),
        ("dinov2:/no/where", r"dinov2:/no/where \(there is no such folder\).*hf download facebook/dinov2-large"),
        (
            "inception:/no/where.pt",
            r"no Inception network at /no/where.pt\. .*inception:PATH; .*inception-2015-12-05.pt",
        ),
    ],
)
def test_absent_weights_say_how_to_get_them(name: str, message: str) -> None:
    with pytest.raises(WeightsNotFoundError, match=message):
        load_features(name)


def test_bare_inception_is_the_published_file_only(
    inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    expected = tmp_path / "checkpoints" / "inception-2015-12-05.pt"
    with pytest.raises(WeightsNotFoundError, match=rf"curl --create-dirs -o {expected} https://"):
        load_features("inception")
    expected.parent.mkdir()
    expected.write_bytes(inception.read_bytes())
    with pytest.raises(CheckpointError, match=r"is not the published .*expected f58cb9b6.*TorchScript is code"):
        load_features("inception")
    digest = load_features(f"inception:{expected}").fingerprint
    monkeypatch.setattr("flowaccel.evaluation.features.pretrained.INCEPTION_SHA256", _sha256(expected))
    assert load_features("inception").fingerprint == digest


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


# what is refused


def test_networks_of_another_kind(clip: Path, dinov2: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a model of type 'dinov2'; allowed are clip, clip_vision_model"):
        load_features(f"clip:{dinov2}")
    with pytest.raises(CheckpointError, match=r"holds a model of type 'clip'; allowed are dinov2"):
        load_features(f"dinov2:{clip}")


def test_weights_that_are_not_whole(clip: Path, tmp_path: Path) -> None:
    lacking = rewritten(clip, tmp_path / "lacking", lambda tensors: tensors.pop("visual_projection.weight"))
    with pytest.raises(CheckpointError, match="lack 1 tensors"):
        load_features(f"clip:{lacking}")
    cut = rewritten(clip, tmp_path / "cut", lambda tensors: None)
    (cut / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be loaded from"):
        load_features(f"clip:{cut}")
    (cut / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        load_features(f"clip:{cut}")


def test_pickled_weights_are_not_read(clip: Path, tmp_path: Path) -> None:
    folder = rewritten(clip, tmp_path / "pickled", lambda tensors: None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"no model\*.safetensors; pickled weights are not read"):
        load_features(f"clip:{folder}")


def test_without_tokenizer_files_there_are_no_texts(clip: Path, tmp_path: Path) -> None:
    folder = rewritten(clip, tmp_path / "mute", lambda tensors: None)
    (folder / "tokenizer.json").unlink()
    assert load_features(f"clip:{folder}").encode_text is None


class Hostile:
    """What a Python unpickler would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_inception_files_that_are_none(inception: Path, tmp_path: Path) -> None:
    whole = inception.read_bytes()
    torch.jit.save(torch.jit.script(tiny.InceptionLayers(4)), str(tmp_path / "other.pt"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("nothing")
    for name in ("other.pt", "state.pt", "cut.pt", "text.pt"):
        with pytest.raises(CheckpointError, match=rf"{name} is damaged, or no TorchScript Inception with `layers`"):
            load_features(f"inception:{tmp_path / name}")


def test_a_pickle_in_a_torchscript_file_is_not_executed(inception: Path, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "hostile.pt"
    with zipfile.ZipFile(inception) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            hostile = entry.endswith(("data.pkl", "constants.pkl"))
            target.writestr(entry, pickle.dumps(Hostile(trap), protocol=2) if hostile else source.read(entry))
    with pytest.raises(CheckpointError, match="is damaged, or no TorchScript"):
        load_features(f"inception:{path}")
    assert not trap.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["inception", "clip", "dinov2"])
def test_features_on_a_gpu(kind: str, request: pytest.FixtureRequest) -> None:
    name = f"{kind}:{request.getfixturevalue(kind)}"
    network = load_features(name, "cuda")
    torch.testing.assert_close(network(IMAGES), load_features(name)(IMAGES), atol=1e-2, rtol=1e-2)  # TF32
    assert {parameter.device.type for parameter in network.module.parameters()} == {"cpu"}


# with references


def test_reference_folder_of_any_sizes(clip: Path, tmp_path: Path) -> None:
    folder = tiny.photos(tmp_path / "photos", sizes=((20, 14), (9, 30)))
    network = load_features(f"clip:{clip}")
    reference = load_reference(str(folder), network, (3, 16, 16))
    assert reference.moments.count == 6
    assert reference.image_shape is None
    assert load_reference(str(folder), network).features is not None
