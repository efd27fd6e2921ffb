"""One tiny pipeline of random weights for every model family that the hooks know, through its real pipeline class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor

import tiny
from flowaccel.evaluation import Conditions
from flowaccel.hooks import FAMILIES, networks, session_of

STEPS = 4
EVALUATIONS = 10
CLOSE = 1e-4
"""Of the largest value."""
TEXT, WIDTH = tiny.TOKENS, tiny.CONTEXT


@dataclass(frozen=True)
class Case:
    """A pipeline and how to call it."""

    name: str
    family: str
    make: Callable[..., Any]
    """`make(seed=0)` -> a fresh pipeline."""
    arguments: Callable[..., dict[str, Any]]
    """`arguments(batch=1, steps=STEPS, seed=3, guided=True)`; image i of a batch depends on i + seed alone."""
    branches: tuple[tuple[str, ...], ...]
    """The branches of the network calls of one guided step."""
    networks: tuple[str, ...] = ("transformer",)
    begins_at: int = 0
    """Steps of the scheduler's grid that are left out."""
    counted: bool = True
    """Whether multiply-adds can be counted without data: the network looks at no values of its arguments."""

    def __call__(self, pipe: Any, **options: Any) -> Tensor:
        """The images or frames of one call, as one tensor with a leading batch axis."""
        output = pipe(**self.arguments(**options))
        made = output.frames if hasattr(output, "frames") else output.images
        return torch.as_tensor(made)


class Embedded(Conditions):
    """Prompts of the tiny pipelines, which have no text encoder: their arguments as they are."""

    def __init__(self, case: Case) -> None:
        self.case = case

    name = "embedded"

    def __len__(self) -> int:
        return 2

    def describe(self) -> dict[str, Any]:
        return {}

    def arguments(self, ids: Any) -> dict[str, Any]:
        ours = ("generator", "num_inference_steps", "output_type", "guidance_scale")
        given = self.case.arguments(batch=len(ids))
        return {name: value for name, value in given.items() if name not in ours}


def prepared(network: Any, seed: int) -> Any:
    tiny.random_weights(network, seed, std=0.05)
    return network.eval()


def sit_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    labels, scale = [(seed + i) % 10 for i in range(batch)], 3.0 if guided else 1.0
    return tiny.drawing(batch, steps, seed, size=None, class_labels=labels, guidance_scale=scale)


def euler_sit(seed: int = 0) -> Any:
    pipe = tiny.sit_pipeline(seed)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipe


def dit_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    )
    return tiny.silent(DiTPipeline(prepared(transformer, seed), tiny.autoencoder(), DDIMScheduler()))


def dit_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    labels, scale = [seed + i for i in range(batch)], 3.0 if guided else 1.0
    return tiny.drawing(batch, steps, seed, size=None, class_labels=labels, guidance_scale=scale, output_type="np")


def sd3_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    return tiny.sd3_arguments(batch, steps, scale=4.0 if guided else 1.0, seed=seed)


def flux_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    return tiny.flux_arguments(batch, steps, true_scale=2.0 if guided else 1.0, seed=seed)


def flux_img2img(seed: int = 0) -> Any:
    pipe = tiny.flux_pipeline(seed)
    return tiny.silent(FluxImg2ImgPipeline(**pipe.components))


def flux_img2img_arguments(batch: int = 1, steps: int = 2 * STEPS, **options: Any) -> dict[str, Any]:
    seed = options.get("seed", 3)
    image = torch.stack(
        [torch.rand(3, 16, 16, generator=one) for one in tiny.generators(*range(100 + seed, 100 + seed + batch))]
    )
    return flux_arguments(batch, steps, **options) | {"image": image, "strength": 0.5}


def pixart_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return tiny.stock(
        PixArtSigmaPipeline,
        vae=tiny.autoencoder(),
        transformer=prepared(transformer, seed),
        scheduler=DDIMScheduler(),
    )


def pixart_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[:, -2:] = 0
    masks = {"prompt": None, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    others = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 4.0 if guided else 1.0}
    return tiny.words(batch, seed) | masks | tiny.drawing(batch, steps, seed, **others)


def wan_network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return prepared(network, seed)


def wan_pipeline(seed: int = 0, both: bool = False) -> Any:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return tiny.stock(
        WanPipeline,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=wan_network(seed),
        transformer_2=wan_network(seed + 1) if both else None,
        boundary_ratio=0.875 if both else None,
    )


def wan_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    scale = 3.0 if guided else 1.0
    return tiny.words(batch, seed) | tiny.drawing(batch, steps, seed, guidance_scale=scale, num_frames=5)


def cogview4_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(4, 4),
    )
    return tiny.stock(
        CogView4Pipeline,
        vae=tiny.autoencoder(),
        transformer=prepared(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )


def cogview4_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    scale = 4.0 if guided else 1.0
    return tiny.words(batch, seed) | tiny.drawing(batch, steps, seed, guidance_scale=scale)


def auraflow_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return tiny.stock(
        AuraFlowPipeline,
        vae=tiny.autoencoder(),
        transformer=prepared(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def auraflow_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    masks = {"negative_prompt": None, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return tiny.words(batch, seed) | masks | tiny.drawing(batch, steps, seed, guidance_scale=4.0 if guided else 1.0)


def cogvideox_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    return tiny.silent(CogVideoXPipeline(None, None, vae, prepared(transformer, seed), CogVideoXDDIMScheduler()))


def cogvideox_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    scale = 6.0 if guided else 1.0
    return tiny.words(batch, seed) | tiny.drawing(batch, steps, seed, guidance_scale=scale, size=32, num_frames=9)


def z_image_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    transformer = prepared(transformer, seed)
    return tiny.stock(ZImagePipeline, vae=tiny.autoencoder(), transformer=transformer, scheduler=scheduler)


def z_image_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    embedded = {name: list(tensors) for name, tensors in tiny.words(batch, seed).items()}
    return embedded | tiny.drawing(batch, steps, seed, guidance_scale=4.0 if guided else 0.0)


def flux2_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return tiny.stock(Flux2KleinPipeline, vae=vae, transformer=prepared(transformer, seed), scheduler=scheduler)


def guided_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    return tiny.words(batch, seed) | tiny.drawing(batch, steps, seed, guidance_scale=4.0 if guided else 1.0)


def masked_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return guided_arguments(batch, steps, seed, guided) | masks


def chroma_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    transformer = prepared(transformer, seed)
    return tiny.stock(ChromaPipeline, vae=tiny.autoencoder(), transformer=transformer, scheduler=scheduler)


def qwen_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return tiny.stock(QwenImagePipeline, vae=vae, transformer=prepared(transformer, seed), scheduler=scheduler)


def qwen_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    scale = 4.0 if guided else 1.0
    return tiny.words(batch, seed) | masks | tiny.drawing(batch, steps, seed, true_cfg_scale=scale)


def ltx_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return tiny.stock(LTXPipeline, vae=vae, transformer=prepared(transformer, seed), scheduler=scheduler)


def ltx_arguments(**options: Any) -> dict[str, Any]:
    return masked_arguments(**options) | {"num_frames": 5, "height": 32, "width": 32}


def hunyuan_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=tiny.POOLED,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return tiny.stock(HunyuanVideoPipeline, vae=vae, transformer=prepared(transformer, seed), scheduler=scheduler)


def hunyuan_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    pooled = {name: value for name, value in tiny.sd3_arguments(batch, seed=seed).items() if "pooled" in name}
    ours = masked_arguments(batch, steps, seed) | pooled
    return ours | {"num_frames": 5, "guidance_scale": 6.0, "true_cfg_scale": 3.0 if guided else 1.0}


def lumina2_pipeline(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=WIDTH,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    transformer = prepared(transformer, seed)
    return tiny.stock(Lumina2Pipeline, vae=tiny.autoencoder(), transformer=transformer, scheduler=scheduler)


def sd15_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    return tiny.unet_arguments(batch, steps, scale=4.0 if guided else 1.0, seed=seed)


def sdxl_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, guided: bool = True) -> dict[str, Any]:
    return tiny.sdxl_arguments(batch, steps, scale=4.0 if guided else 1.0, seed=seed)


COND_UNCOND = (("cond", "uncond"),)
UNCOND_COND = (("uncond", "cond"),)
SPLIT = (("cond",), ("uncond",))

CASES = {
    case.name: case
    for case in (
        Case("sit", "sit", euler_sit, sit_arguments, COND_UNCOND),
        Case("dit", "dit", dit_pipeline, dit_arguments, COND_UNCOND),
        Case("sd3", "sd3", tiny.sd3_pipeline, sd3_arguments, UNCOND_COND),
        Case("flux", "flux", tiny.flux_pipeline, flux_arguments, SPLIT),
        Case("flux_img2img", "flux", flux_img2img, flux_img2img_arguments, SPLIT, begins_at=STEPS),
        Case("pixart", "pixart", pixart_pipeline, pixart_arguments, UNCOND_COND),
        Case("wan21", "wan", wan_pipeline, wan_arguments, SPLIT),
        Case(
            "wan22",
            "wan",
            lambda seed=0: wan_pipeline(seed, both=True),
            wan_arguments,
            SPLIT,
            networks=("transformer", "transformer_2"),
        ),
        Case("cogvideox", "cogvideox", cogvideox_pipeline, cogvideox_arguments, UNCOND_COND),
        Case("cogview4", "cogview4", cogview4_pipeline, cogview4_arguments, SPLIT),
        Case("z_image", "z_image", z_image_pipeline, z_image_arguments, COND_UNCOND),
        Case("flux2", "flux2", flux2_pipeline, guided_arguments, SPLIT),
        Case("chroma", "chroma", chroma_pipeline, masked_arguments, SPLIT),
        Case("qwen_image", "qwen_image", qwen_pipeline, qwen_arguments, SPLIT),
        Case("ltx", "ltx", ltx_pipeline, ltx_arguments, UNCOND_COND),
        Case("hunyuan_video", "hunyuan_video", hunyuan_pipeline, hunyuan_arguments, SPLIT),
        Case("lumina2", "lumina2", lumina2_pipeline, masked_arguments, SPLIT, counted=False),
        Case("sd15", "unet", tiny.unet_pipeline, sd15_arguments, UNCOND_COND, networks=("unet",)),
        Case("sdxl", "unet", tiny.sdxl_pipeline, sdxl_arguments, UNCOND_COND, networks=("unet",)),
        Case("auraflow", "auraflow", auraflow_pipeline, auraflow_arguments, UNCOND_COND),
    )
}
BATCHED = [case for case in CASES.values() if len(case.branches[0]) == 2]


def made(case: Case, pipe: Any, evaluations: int = EVALUATIONS, **options: Any) -> Tensor:
    """The latents of one call; where the pipeline hands out only images, these."""
    steps = 2 * evaluations if case.begins_at else evaluations
    arguments = case.arguments(steps=steps, **options)
    if case.name not in ("sit", "dit"):
        arguments["output_type"] = "latent"
    output = pipe(**arguments)
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = CLOSE * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def split_guidance(pipe: Any) -> None:
    """From here on every batch of both branches comes to the network as two calls, the conditional one first."""
    for network in networks(pipe).values():
        inner, signature = network.forward, inspect.signature(network.forward)

        @functools.wraps(inner)
        def forward(*args: Any, inner: Any = inner, signature: Any = signature, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            rows = len(next(iter(bound.values())))
            halves = [_half(bound, rows, part) for part in (0, 1)]
            order = (0, 1) if FAMILIES[session_of(pipe).families[0]].guidance == "cond_uncond" else (1, 0)
            outputs = {part: inner(**halves[part]) for part in order}
            if isinstance(outputs[0], tuple):
                first, second = outputs[0][0], outputs[1][0]
                return (first + second if isinstance(first, list) else torch.cat([first, second]),)
            return type(outputs[0])(sample=torch.cat([outputs[0].sample, outputs[1].sample]))

        network.forward = forward


def _half(value: Any, rows: int, part: int) -> Any:
    if isinstance(value, list) and len(value) == rows:
        return value[part * rows // 2 : (part + 1) * rows // 2]
    if isinstance(value, dict):
        return {key: _half(entry, rows, part) for key, entry in value.items()}
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
        return value[part * rows // 2 : (part + 1) * rows // 2]
    return value
