"""Pipelines and networks small enough to run in milliseconds, with random weights; nothing in them was trained."""

from __future__ import annotations

import inspect
import itertools
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from flowaccel import Recipe, Sampler, SiTPipeline, SiTTransformer2DModel, VelocityRefiner
from flowaccel.data.shapes import ATTRIBUTES
from flowaccel.methods.flowturbo.accelerator import new_refiner
from flowaccel.models import ShapesClassifier
from flowaccel.samplers import FlowRungeKuttaScheduler
from flowaccel.training.text_to_image import TextToImage
from flowaccel.zoo_build import shapes as zoo_shapes

CONTEXT, POOLED, TOKENS = 16, 12, 5
"""Width of the text embeddings, of the pooled ones, and length of the text, of the text-to-image pipelines."""


def random_weights(module: nn.Module, seed: int, std: float = 0.08) -> None:
    """Add noise to every trainable parameter, so that layers which start at zero count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)


def sit_network(seed: int = 0, **config: Any) -> SiTTransformer2DModel:
    """A SiT for 8x8 grey images and 10 classes."""
    torch.manual_seed(seed)
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 10,
        "learn_sigma": False,
    }
    network = SiTTransformer2DModel(**{**sizes, **config}).eval()
    random_weights(network, seed)
    return network


def sit_pipeline(seed: int = 0, **config: Any) -> SiTPipeline:
    """A pipeline around `sit_network` with Heun's method; its images are noise, but each depends on class and seed."""
    return silent(SiTPipeline(sit_network(seed, **config), FlowRungeKuttaScheduler("heun")))


LATENTS: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "learn_sigma": True,
}
"""Sizes of a SiT of width 48 on 4x8x8 latents."""


def latent_sit(seed: int = 0, **config: Any) -> SiTTransformer2DModel:
    """A SiT of width 48 on 4x8x8 latents with 10 classes."""
    return sit_network(seed, **{**LATENTS, **config})


def latent_sit_pipeline(scheduler: Any = None, *, vae: Any = None, id2label: Any = None, **config: Any) -> SiTPipeline:
    """A pipeline around `latent_sit`, by default with Euler's method."""
    return silent(SiTPipeline(latent_sit(**config), scheduler or FlowRungeKuttaScheduler("euler"), vae, id2label))


def autoencoder(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """A decoder that doubles the size."""
    torch.manual_seed(5)
    sizes = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 2,
        "sample_size": 16,
        "scaling_factor": 1.5,
        "shift_factor": 0.06,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**{**sizes, **config}).eval()


def unet_pipeline(seed: int = 0, **config: Any) -> StableDiffusionPipeline:
    """A stock `StableDiffusionPipeline` without a text encoder: 16x16 images, with attention on 8x8 and 4x4 places."""
    torch.manual_seed(seed)
    sizes = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    unet = UNet2DConditionModel(**{**sizes, **config}).eval()
    random_weights(unet, seed)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return stock(
        StableDiffusionPipeline, vae=autoencoder(), unet=unet, scheduler=scheduler, requires_safety_checker=False
    )


def sdxl_pipeline(seed: int = 0, **config: Any) -> StableDiffusionXLPipeline:
    """A stock `StableDiffusionXLPipeline` without text encoders: 16x16 images; call it with `sdxl_arguments`."""
    torch.manual_seed(seed)
    sizes = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
        "use_linear_projection": True,
    }
    unet = UNet2DConditionModel(**{**sizes, **config}).eval()
    random_weights(unet, seed)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return stock(StableDiffusionXLPipeline, vae=autoencoder(), unet=unet, scheduler=scheduler)


def sdxl_arguments(batch: int = 1, steps: int = 5, scale: float = 4.0, seed: int = 3) -> dict[str, Any]:
    """Arguments of a call; image i depends on i and `seed` alone."""
    return sd3_arguments(batch, steps, scale, seed)


def unet_arguments(batch: int = 1, steps: int = 5, scale: float = 4.0, seed: int = 3) -> dict[str, Any]:
    """Arguments of a call; image i depends on i and `seed` alone."""
    return words(batch, seed) | drawing(batch, steps, seed, guidance_scale=scale)


def sd3_pipeline(seed: int = 0, **config: Any) -> StableDiffusion3Pipeline:
    """A stock `StableDiffusion3Pipeline` without text encoders: 16x16 images; call it with `sd3_arguments`."""
    torch.manual_seed(seed)
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": CONTEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
    }
    transformer = SD3Transformer2DModel(**{**sizes, **config}).eval()
    random_weights(transformer, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return stock(StableDiffusion3Pipeline, transformer=transformer, scheduler=scheduler, vae=autoencoder())


def sd3_arguments(batch: int = 1, steps: int = 5, scale: float = 4.0, seed: int = 3) -> dict[str, Any]:
    """Arguments of a call; image i depends on i and `seed` alone."""
    pooled = {
        "pooled_prompt_embeds": torch.stack([embedding(1, POOLED, 70 + seed + i)[0] for i in range(batch)]),
        "negative_pooled_prompt_embeds": embedding(1, POOLED, 41).expand(batch, -1),
    }
    return words(batch, seed) | pooled | drawing(batch, steps, seed, guidance_scale=scale)


def shapes_zoo(root: Path) -> Path:
    """Untrained networks of the classes and with the words of the zoo's entries of `shapes`, as the zoo holds them."""
    tokenizer = zoo_shapes.shapes_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {**zoo_shapes.TEXT_ENCODER, **small, "vocab_size": len(tokenizer), "projection_dim": POOLED // 2}
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        **zoo_shapes.TRANSFORMER
        | {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
        | {"joint_attention_dim": 32, "pooled_projection_dim": POOLED, "qk_norm": None}
    )
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**words)) for _ in range(2)]
    vae = AutoencoderKL(**zoo_shapes.AUTOENCODER | {"block_out_channels": (8, 8), "shift_factor": 0.0})
    random_weights(transformer, 1)
    model = TextToImage(transformer, *encoders)
    zoo_shapes.pipeline(model, tokenizer, vae).save_pretrained(root / "t2i-shapes")
    classifier = ShapesClassifier([len(values) for values in ATTRIBUTES.values()], num_features=6, channels=4)
    classifier.save_pretrained(root / "shapes-features")
    towers = {"vision_config": small | {"image_size": 32, "patch_size": 16}, "text_config": words}
    CLIPModel(CLIPConfig(**towers, projection_dim=4)).save_pretrained(root / "shapes-clip")
    tokenizer.save_pretrained(root / "shapes-clip")
    return root


def flux_pipeline(seed: int = 0, **config: Any) -> FluxPipeline:
    """A stock `FluxPipeline` without text encoders: 16x16 images; call it with `flux_arguments`."""
    torch.manual_seed(seed)
    sizes = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": CONTEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    transformer = FluxTransformer2DModel(**{**sizes, **config}).eval()
    random_weights(transformer, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return stock(FluxPipeline, transformer=transformer, scheduler=scheduler, vae=autoencoder())


def flux_arguments(batch: int = 1, steps: int = 5, true_scale: float = 1.0, seed: int = 3) -> dict[str, Any]:
    """Arguments of a call; `true_scale` above 1 adds a second, negative network call per evaluation."""
    arguments = sd3_arguments(batch, steps, seed=seed) | {"guidance_scale": 3.5, "true_cfg_scale": true_scale}
    if true_scale == 1:
        del arguments["negative_prompt_embeds"], arguments["negative_pooled_prompt_embeds"]
    return arguments


def embedding(rows: int, width: int, seed: int) -> Tensor:
    """(rows, width) of noise."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def words(batch: int, seed: int, negative: bool = True) -> dict[str, Tensor]:
    """The embeddings of prompts, each of its own, and of a negative prompt for all."""
    made = {"prompt_embeds": torch.stack([embedding(TOKENS, CONTEXT, seed + i) for i in range(batch)])}
    nothing = embedding(TOKENS, CONTEXT, 40).expand(batch, -1, -1)
    return made | {"negative_prompt_embeds": nothing} if negative else made


def generators(*seeds: int) -> list[torch.Generator]:
    """One generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawing(batch: int, steps: int, seed: int, size: int | None = 16, **others: Any) -> dict[str, Any]:
    """Arguments that all calls have; image i depends on i and `seed` alone."""
    sizes = {} if size is None else {"height": size, "width": size}
    noise = generators(*range(seed, seed + batch))
    return {"num_inference_steps": steps, **sizes, "generator": noise, "output_type": "pt", **others}


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(kind: Any, **components: Any) -> Any:
    """A pipeline of a stock class with these components; the others, such as text encoders, are None."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    required = {p.name: None for p in parameters if p.name != "self" and p.default is p.empty}
    return silent(kind(**{**required, **components}))


def random_refiner(network: nn.Module, seed: int = 11) -> nn.Module:
    """An untrained refiner for `network` whose offsets are small but not zero."""
    torch.manual_seed(seed)
    refiner = new_refiner(network).eval()
    random_weights(refiner, seed)
    return refiner


def flowturbo(refiner: Any, blocks: str = "H1P2R2", **options: Any) -> Recipe:
    """FlowTurbo with a refiner."""
    name = f"flowturbo-{blocks}"
    return Recipe([Sampler("flowturbo", {"blocks": blocks, **options}), VelocityRefiner(refiner)], name=name)


def save_sit_pipeline(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write `sit_pipeline` and, beside its components, a refiner for it."""
    pipe = sit_pipeline(seed, **config)
    pipe.save_pretrained(folder)
    random_refiner(pipe.transformer).save_pretrained(folder / "refiner")
    return folder


def snapshot(pipe: Any) -> dict[str, Any]:
    """What `restore` must bring back: the keys of `vars` of the pipeline and of every module, and the scheduler."""
    keys = {
        f"{name}.{path}": sorted(vars(module))
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
        for path, module in component.named_modules()
    }
    return {
        "pipe": sorted(vars(pipe)),
        "modules": keys,
        "scheduler": id(pipe.scheduler),
        "scheduler vars": sorted(vars(pipe.scheduler)),
        "config": dict(pipe.config),
    }


# --- feature networks of the real classes


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A `CLIPModel` for 16x16 images with 4 features, and a tokenizer that knows letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 4,
    }
    words = {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**tower, **words}, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=4
    )
    torch.manual_seed(seed)
    network = CLIPModel(config)
    random_weights(network, seed)
    network.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    return folder


def dinov2_folder(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A `Dinov2Model` with 4 features; `options` go to `save_pretrained`."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    network = Dinov2Model(Dinov2Config(**sizes))
    random_weights(network, seed)
    network.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return folder


class InceptionLayers(nn.Module):
    """What `.layers` of the Inception file is called like: normalised 299x299 images -> (N, width, 1, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(48, width)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)
        return self.linear(pooled).tanh()[:, :, None, None]


class InceptionScript(nn.Module):
    """The file's outer module, which has a resize of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = InceptionLayers(width)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return self.layers((images.float() - 128) / 128)


def inception_file(path: Path, seed: int = 0, width: int = 6) -> Path:
    """A TorchScript file that is laid out as `inception-2015-12-05.pt`."""
    torch.manual_seed(seed)
    torch.jit.save(torch.jit.script(InceptionScript(width).eval()), str(path))
    return path


def photos(folder: Path, count: int = 6, sizes: tuple[tuple[int, int], ...] = ((20, 14),), mode: str = "RGB") -> Path:
    """PNG files of noise; image i has the size (width, height) `sizes[i % len(sizes)]`."""
    folder.mkdir(parents=True)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        channels = (height, width) if mode == "L" else (height, width, 3)
        pixels = torch.randint(256, channels, dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every letter and digit, and one for the end."""
    letters = dict(zip(("<pad>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits), itertools.count()))
    words = Tokenizer(WordLevel(letters, unk_token="<unk>"))
    words.pre_tokenizer = Split("", "isolated")
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", letters["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def wan_pipeline(seed: int = 0) -> WanPipeline:
    """A stock `WanPipeline` with a tokenizer of single letters: videos of noise, but each depends on prompt and seed.

    Sizes are multiples of 16 pixels and 4 n + 1 frames.
    """
    tokenizer = letter_tokenizer()
    torch.manual_seed(seed)
    text = UMT5Config(vocab_size=len(tokenizer), d_model=CONTEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=CONTEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    random_weights(transformer, seed)
    return silent(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(text).eval(),
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer.eval(),
        )
    )
