"""Images and their prompts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import tiny
from flowaccel.evaluation import Classes, FeatureNetwork, Prompts, load_features
from flowaccel.evaluation.metrics.clip_score import load_clip, text_match, warn_of_cut_prompts
from flowaccel.evaluation.samples.prompts import load_conditions

IMAGES = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> FeatureNetwork:
    return load_features(f"clip:{tiny.clip_folder(tmp_path_factory.mktemp('clip'))}")


def test_cosine_is_that_of_the_whole_model(clip: FeatureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder = clip.name.removeprefix("clip:")
    prompts = ("a cat", "dog", "a cat", "bird", "dog")
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(list(prompts), padding=True, return_tensors="pt")
    assert clip.preprocessing is not None
    with torch.no_grad():
        output = model(**tokens, pixel_values=clip.preprocessing(list(IMAGES)))
    expected = output.logits_per_image.diagonal() / model.logit_scale.exp()
    monkeypatch.setattr("flowaccel.evaluation.metrics.clip_score._BATCH", 2)
    match = text_match(clip, clip(IMAGES), prompts)
    torch.testing.assert_close(match.cosine.float(), expected)
    assert (match.network, match.prompts) == (clip.name, prompts)


def test_the_feature_network_serves_where_it_is_a_clip(clip: FeatureNetwork) -> None:
    assert load_clip(None, clip) is clip
    assert load_clip(clip.name, clip) is clip
    digits = load_features("zoo:digits-features")
    assert load_clip(clip.name, digits).fingerprint == clip.fingerprint
    with pytest.raises(ValueError, match=r"its text half and tokenizer, and zoo:digits-features has none; .*--clip"):
        load_clip(None, digits)


def test_prompts_longer_than_the_network_reads(clip: FeatureNetwork) -> None:
    assert clip.encode_text is not None and clip.encode_text.longest == 12
    fits, cut = "abcdefghij", "abcdefghijk"  # a token a letter, and start and end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cut_prompts(clip, [fits, fits])
    with pytest.warns(
        UserWarning, match=r"1 of 2 prompts are longer than the 12 tokens that clip:.* reads: clip_score"
    ):
        warn_of_cut_prompts(clip, [fits, cut, cut])
    half, whole = clip.encode_text([cut + "xyz", cut + "zzz"]), clip.encode_text([fits, fits[:-1]])
    assert torch.equal(half[0], half[1])  # the ends were cut off
    assert not torch.equal(whole[0], whole[1])


def test_texts_of_ids() -> None:
    assert Prompts(("a", "b")).texts([0, 1, 2]) == ("a", "b", "a")
    assert Classes((1, 2)).texts([0, 1]) is None


def test_conditions_are_read_again(tmp_path: Path) -> None:
    prompts = Prompts(("a\nb", "ç"), source="file.txt")
    prompts.save(tmp_path)
    assert load_conditions(prompts.describe(), tmp_path).texts(range(2)) == prompts.prompts
    with pytest.raises(ValueError, match="does not hold the prompts that the run used"):
        load_conditions(Prompts(("a", "c")).describe(), tmp_path)
    (tmp_path / "prompts.json").write_text("[1")
    with pytest.raises(ValueError, match=r"cannot be read from .*prompts.json"):
        load_conditions(prompts.describe(), tmp_path)
    Classes((4, 5)).save(tmp_path / "classes")
    assert not (tmp_path / "classes").exists()
    assert load_conditions(Classes((4, 5)).describe(), tmp_path) == Classes((4, 5))
