"""The text-to-image training: what is trained is what the stock pipeline runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

import flowaccel
from flowaccel import Recipe, Sampler, VelocityRefiner
from flowaccel.data import shapes
from flowaccel.data.shapes import SPLITS, shape_captions
from flowaccel.methods.flowturbo.accelerator import new_refiner
from flowaccel.methods.flowturbo.train import RefinerObjective
from flowaccel.training.text_to_image import (
    AutoencoderObjective,
    TextFlowObjective,
    TextToImage,
    encode_images,
    prompted_data,
    set_latent_scale,
    token_ids,
    word_tokenizer,
)
from flowaccel.zoo_build import shapes as zoo_shapes

CAPTIONS = ["a small red circle", "a large blue circle", ""]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """The shipped architecture, smaller, with random weights everywhere."""
    patch = pytest.MonkeyPatch()
    small = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    patch.setattr(zoo_shapes, "TRANSFORMER", zoo_shapes.TRANSFORMER | small)
    tokenizer = word_tokenizer([word for caption in CAPTIONS for word in caption.split()], 8)
    patch.setattr(zoo_shapes, "TEXT_ENCODER", zoo_shapes.TEXT_ENCODER | {"max_position_embeddings": 8})
    model = zoo_shapes.new_text_to_image(len(tokenizer))
    patch.undo()
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    autoencoder = zoo_shapes.new_autoencoder()
    set_latent_scale(autoencoder, shapes("generator", 20).images)
    made = zoo_shapes.pipeline(model.eval(), tokenizer, autoencoder.eval())
    made.set_progress_bar_config(disable=True)
    return made


def parts(pipe: StableDiffusion3Pipeline) -> TextToImage:
    return TextToImage(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)


# tokens


def test_every_word_is_one_token_and_everything_else_is_bytes() -> None:
    words = sorted({word for caption in shape_captions(count=300) for word in caption.split()})
    tokenizer = word_tokenizer(words, 16)
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, word
    strange = tokenizer("Ünïcode, 3 cats!").input_ids[1:-1]
    assert tokenizer.unk_token_id not in strange
    assert tokenizer.decode(strange).replace(" ", "") == "ünïcode,3cats!"
    assert tokenizer.get_vocab() == word_tokenizer(reversed(words), 16).get_vocab()
    assert tokenizer.model_max_length == 16


def test_words_that_share_their_beginnings_and_ends() -> None:
    tokenizer = word_tokenizer(["green", "red", "tree", "greens", "e"], 8)
    assert [len(tokenizer(word).input_ids) for word in ("green", "red", "tree", "greens", "e")] == [3] * 5


# what is trained is what runs


@pytest.mark.parametrize("count", [1, 256])
@torch.no_grad()
def test_training_computes_what_the_pipeline_does(pipe: StableDiffusion3Pipeline, count: int) -> None:
    """One weighted token stands for all the zero tokens that the pipeline puts where it has no T5."""
    tokens, _, pooled, _ = pipe.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=count
    )
    sample = torch.randn(3, 4, 16, 16, generator=seeded())
    sigma = torch.tensor([0.2, 0.5, 0.9])
    expected = pipe.transformer(sample, tokens, pooled, 1000 * sigma, return_dict=False)[0]
    model = parts(pipe)
    ids = token_ids(pipe.tokenizer, CAPTIONS)
    ours = model(sample, sigma, ids, torch.full((3,), float(count)))
    assert torch.allclose(ours, expected, atol=1e-5)
    other = model(sample, sigma, ids, torch.full((3,), 257.0 - count))
    assert not torch.allclose(other, expected, atol=1e-3)  # the number matters to an untrained network
    unchanged = pipe.transformer(sample, tokens, pooled, 1000 * sigma, return_dict=False)[0]
    assert torch.equal(unchanged, expected)  # the attention processors are the pipeline's own again


class _Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: tuple[Tensor, ...] = ()

    def forward(self, *seen: Tensor) -> Tensor:
        self.seen = seen
        return self.weight.expand_as(seen[0])


def test_flow_objective_noises_drops_and_weighs() -> None:
    latents = torch.zeros(5, 4, 16, 16)
    objective = TextFlowObjective(
        latents=latents, input_ids=torch.ones(5, 8, dtype=torch.int64), null_ids=torch.zeros(8, dtype=torch.int64)
    )
    model = _Recording()
    loss = replace(objective, batch_size=2000)(model, seeded())
    sample, sigma, ids, zero_tokens = model.seen
    deviation = sample.flatten(1).std(dim=1)
    assert (deviation / sigma - 1).abs().max() < 0.12  # latents are 0: the state is sigma * noise
    assert 0.9 < loss.item() < 1.1  # the target is the noise, the output 0
    assert 0.07 < (ids == 0).all(dim=1).float().mean() < 0.13
    assert set(zero_tokens.tolist()) == {1.0, 256.0}
    assert 0.45 < sigma.mean() < 0.55 and sigma.min() > 0 and sigma.max() < 1


def test_text_encoders_learn(pipe: StableDiffusion3Pipeline) -> None:
    model = parts(pipe).requires_grad_(True)
    ids = token_ids(pipe.tokenizer, CAPTIONS)
    objective = TextFlowObjective(latents=torch.randn(3, 4, 16, 16), input_ids=ids, null_ids=ids[2], batch_size=4)
    objective(model, seeded()).backward()
    for encoder in (model.text_encoder, model.text_encoder_2):
        gradient = encoder.text_model.embeddings.token_embedding.weight.grad
        assert gradient is not None and gradient.abs().sum() > 0
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


# the autoencoder


def test_latent_scale(pipe: StableDiffusion3Pipeline) -> None:
    latents = encode_images(pipe.vae, shapes("generator", 20).images)
    assert latents.shape == (20, 4, 16, 16)
    assert abs(float(latents.mean())) < 1e-4
    assert abs(float(latents.std()) - 1) < 1e-4


@pytest.mark.slow
def test_autoencoder_objective_learns(pipe: StableDiffusion3Pipeline) -> None:
    autoencoder = zoo_shapes.new_autoencoder()
    objective = AutoencoderObjective(images=shapes("generator", 50).images, batch_size=8)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        loss = objective(autoencoder, seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# the refiner


def test_refiner_is_trained_on_what_the_accelerator_feeds_it(pipe: StableDiffusion3Pipeline) -> None:
    """The objective's loss, in SiT's terms, is that of the stock networks called as the pipeline calls them."""
    captions = shapes("generator", 6)
    data = prompted_data(pipe, captions, 1)
    refiner = new_refiner(pipe.transformer)
    torch.manual_seed(3)
    for parameter in refiner.parameters():
        nn.init.normal_(parameter, std=0.1)
    teacher = data.wrap(pipe.transformer)
    objective = RefinerObjective(
        teacher=teacher, data=data.latents, null_label=teacher.null_label, batch_size=2, label_drop=0.0, inside=True
    )
    with torch.no_grad():
        loss = objective(data.wrap(refiner), seeded())
        index, noise, t, delta = _draws(objective, seeded())
        latents = encode_images(pipe.vae, captions.images[index])
        tokens, _, pooled, _ = pipe.encode_prompt(
            [captions.captions[i] for i in index], None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        sigma, level = 1 - t, (1 - t).reshape(-1, 1, 1, 1)
        state = (1 - level) * latents + level * noise
        velocity = pipe.transformer(state, tokens, pooled, 1000 * sigma, return_dict=False)[0]
        state, sigma = state - delta * velocity, sigma - delta
        target = pipe.transformer(state, tokens, pooled, 1000 * sigma, return_dict=False)[0]
        fed = torch.cat([state, velocity], dim=1)
        offset = refiner(fed, tokens, pooled, 1000 * sigma, return_dict=False)[0]
    assert torch.allclose(loss, (velocity + offset - target).square().mean(), rtol=1e-4)


def _draws(objective: RefinerObjective, generator: torch.Generator) -> tuple[Any, Tensor, Tensor, Tensor]:
    """What the objective draws, in its order."""
    index = torch.randint(len(objective.data), (objective.batch_size,), generator=generator)
    noise = torch.randn((objective.batch_size, 4, 16, 16), generator=generator)
    t = torch.rand(objective.batch_size, generator=generator)
    delta = objective.delta_min + torch.rand(1, generator=generator) * (objective.delta_max - objective.delta_min)
    return index, noise, t * (1 - delta), delta


# the whole


@pytest.mark.slow
def test_a_short_build_loads_as_a_stock_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("generator", "features", "clip"):
        monkeypatch.setitem(SPLITS, split, 40)
    for name in ("AUTOENCODER_LOOP", "TEXT_FLOW_LOOP", "REFINER_LOOP"):
        loop = getattr(zoo_shapes, name)
        monkeypatch.setattr(zoo_shapes, name, replace(loop, steps=1, save_every=1, keep=()))
    stages = [stage for stage, _, _ in zoo_shapes.build_t2i_shapes(tmp_path)]
    assert stages == ["autoencoder", "generator", "refiner"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusion3Pipeline
    recipe = Recipe([Sampler("flowturbo", {"blocks": "H1P1R1"}), VelocityRefiner(tmp_path / "refiner")])
    with flowaccel.accelerated(pipe, recipe):
        images = pipe("a small solid red circle in the middle", num_inference_steps=3).images
    assert images[0].size == (32, 32)
