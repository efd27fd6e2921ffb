"""Builders of the zoo's text-to-image entries, from the data set `shapes`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flowaccel.data import shapes
from flowaccel.data.shapes import ATTRIBUTES, caption_words
from flowaccel.methods.flowturbo.accelerator import FOLDER, new_refiner
from flowaccel.methods.flowturbo.train import RefinerObjective
from flowaccel.models import ShapesClassifier
from flowaccel.training.features import AttributesObjective, ClipObjective
from flowaccel.training.loop import LoopConfig, Progress, train
from flowaccel.training.text_to_image import (
    ZERO_TOKENS,
    AutoencoderObjective,
    TextFlowObjective,
    TextToImage,
    encode_images,
    prompted_data,
    set_latent_scale,
    token_ids,
    word_tokenizer,
)

Step = tuple[str, Progress, int]

MAX_TOKENS = 16
AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (24, 48),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 64,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
_CLIP_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 64,
}
CLIP: dict[str, Any] = {
    "vision_config": {**_CLIP_TOWER, "image_size": 32, "patch_size": 4},
    "text_config": {**TEXT_ENCODER, **_CLIP_TOWER},
    "projection_dim": 64,
}
CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)
AUTOENCODER_LOOP = LoopConfig(
    steps=1600, learning_rate=2e-3, warmup=100, cosine=True, ema_decay=0.99, save_every=200, seed=0
)
TEXT_FLOW_LOOP = LoopConfig(
    steps=3300, learning_rate=1e-3, warmup=200, cosine=True, weight_decay=0.01, save_every=150, keep=(1650,), seed=0
)
FEATURES_LOOP = LoopConfig(
    steps=2000, learning_rate=2e-3, warmup=100, cosine=True, weight_decay=0.05, save_every=500, seed=0
)
REFINER_LOOP = LoopConfig(steps=800, learning_rate=2e-3, warmup=100, cosine=True, save_every=200, seed=0)
# Guided as the evaluator guides, for the step lengths of four to eight steps.
REFINER_OBJECTIVE: dict[str, Any] = {
    "batch_size": 48,
    "delta_min": 0.12,
    "delta_max": 0.26,
    "per_sample_delta": True,
    "inside": True,
    "guidance_scale": 3.0,
}
CLIP_LOOP = LoopConfig(
    steps=900, learning_rate=1e-3, warmup=100, cosine=True, weight_decay=0.1, ema_decay=0.99, save_every=100, seed=0
)


def build_shapes_features(out: Path) -> Iterator[Step]:
    """Build the attribute classifier that the evaluator takes features from; it sees all combinations."""
    torch.manual_seed(FEATURES_LOOP.seed)
    model = ShapesClassifier([len(values) for values in ATTRIBUTES.values()])
    objective = AttributesObjective(data=shapes("features"))
    for progress in train(model, objective, FEATURES_LOOP, out / "training"):
        yield "classifier", progress, FEATURES_LOOP.steps
    model.to(torch.bfloat16).save_pretrained(out)


def build_shapes_clip(out: Path) -> Iterator[Step]:
    """Build the CLIP of the evaluator, from pictures of its own; it sees all combinations."""
    torch.manual_seed(CLIP_LOOP.seed)
    tokenizer = shapes_tokenizer()
    config = {**CLIP, "text_config": {**CLIP["text_config"], "vocab_size": len(tokenizer)}}
    model = CLIPModel(CLIPConfig(**config))
    data = shapes("clip")
    objective = ClipObjective(
        data=data,
        input_ids=token_ids(tokenizer, data.captions),
        mean=torch.tensor(CLIP_MEAN),
        std=torch.tensor(CLIP_STD),
    )
    for progress in train(model, objective, CLIP_LOOP, out / "training"):
        yield "clip", progress, CLIP_LOOP.steps
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    normalisation = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"height": 32, "width": 32}}
    (out / "preprocessor_config.json").write_text(json.dumps(normalisation, indent=2) + "\n")


def build_t2i_shapes(out: Path) -> Iterator[Step]:
    """Build the text-to-image pipeline: autoencoder, then transformer and text encoders together."""
    autoencoder = new_autoencoder()
    yield from train_autoencoder(autoencoder, out, AUTOENCODER_LOOP)
    tokenizer = shapes_tokenizer()
    model = new_text_to_image(len(tokenizer))
    yield from train_text_to_image(model, tokenizer, autoencoder, out, TEXT_FLOW_LOOP)
    pipe = pipeline(model, tokenizer, autoencoder)
    for part in (pipe.transformer, pipe.vae):
        part.to(torch.bfloat16)
    pipe.save_pretrained(out)
    for part in (pipe.transformer, pipe.vae):
        part.float()
    yield from train_refiner(pipe, out, REFINER_LOOP)


def new_autoencoder() -> AutoencoderKL:
    """Create an untrained autoencoder from 32x32 pixels to 16x16 latents of 4 channels."""
    torch.manual_seed(AUTOENCODER_LOOP.seed)
    return AutoencoderKL(**AUTOENCODER)


def new_text_to_image(vocabulary: int) -> TextToImage:
    """Create an untrained transformer of 64 image tokens and its two text encoders."""
    torch.manual_seed(TEXT_FLOW_LOOP.seed)
    config = CLIPTextConfig(vocab_size=vocabulary, **TEXT_ENCODER)
    encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
    return TextToImage(SD3Transformer2DModel(**TRANSFORMER), *encoders)


def shapes_tokenizer() -> CLIPTokenizer:
    """Create a tokenizer with one token for every word of the captions."""
    return word_tokenizer(caption_words(), MAX_TOKENS)


def train_autoencoder(autoencoder: AutoencoderKL, out: Path, loop: LoopConfig) -> Iterator[Step]:
    """Train the autoencoder in place. It ends rounded to bfloat16, as it is shipped, and with its latent scale."""
    images = shapes("generator").images
    for progress in train(autoencoder, AutoencoderObjective(images=images), loop, out / "training-autoencoder"):
        yield "autoencoder", progress, loop.steps
    _round(autoencoder)
    set_latent_scale(autoencoder, images[:2000])


def train_text_to_image(
    model: TextToImage,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    out: Path,
    loop: LoopConfig,
) -> Iterator[Step]:
    """Train transformer and text encoders in place; the transformer ends rounded to bfloat16, as it is shipped."""
    data = shapes("generator")
    objective = TextFlowObjective(
        latents=encode_images(autoencoder, data.images),
        input_ids=token_ids(tokenizer, data.captions),
        null_ids=token_ids(tokenizer, [""])[0],
    )
    for progress in train(model, objective, loop, out / "training"):
        yield "generator", progress, loop.steps
    _round(model.transformer)


def pipeline(model: TextToImage, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Assemble the stock pipeline from the trained parts."""
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=_zero_t5(model.transformer.config.joint_attention_dim),
        tokenizer_3=_t5_tokenizer(),
    )


def _zero_t5(width: int) -> T5EncoderModel:
    """Create a T5 that returns zeros, which is what the pipeline takes where it has none.

    diffusers saves a pipeline without its third text encoder, but does not load it unless told to do without.
    """
    config = T5Config(vocab_size=len(_t5_tokenizer()), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.eval()


def _t5_tokenizer() -> T5Tokenizer:
    """Create a T5 tokenizer with one token for every word of the captions.

    So no caption has more tokens than `max_sequence_length` 16 keeps.
    """
    special = ["<pad>", "</s>", "<unk>"]
    words = ["\u2581", *("\u2581" + word for word in caption_words())]
    return T5Tokenizer(
        vocab=[(piece, 0.0) for piece in special] + [(piece, -1.0) for piece in words],
        extra_ids=0,
        model_max_length=max(ZERO_TOKENS),
    )


def train_refiner(pipe: StableDiffusion3Pipeline, out: Path, loop: LoopConfig) -> Iterator[Step]:
    """Train FlowTurbo's refiner for the pipeline's transformer, and write it to `out/refiner` in bfloat16."""
    torch.manual_seed(loop.seed)
    data = prompted_data(pipe, shapes("generator"), MAX_TOKENS)
    refiner, teacher = data.wrap(new_refiner(pipe.transformer)), data.wrap(pipe.transformer)
    objective = RefinerObjective(teacher=teacher, data=data.latents, null_label=teacher.null_label, **REFINER_OBJECTIVE)
    for progress in train(refiner, objective, loop, out / "training-refiner"):
        yield "refiner", progress, loop.steps
    refiner.network.to(torch.bfloat16).save_pretrained(out / FOLDER)


def _round(module: nn.Module) -> None:
    """Round to numbers that bfloat16 has, in float32.

    What is trained on the module then sees the weights that are shipped.
    """
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(tensor.bfloat16())
    module.requires_grad_(False).eval()
