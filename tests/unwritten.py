"""Tiny networks, what they are called with, and a pipeline that calls them in a loop; some have no pipeline here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import tiny
from flowaccel.hooks import family_of

ROWS = 2


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def text(tokens: int, width: int) -> Tensor:
    return noise(tokens, width, seed=1)


SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
COGVIDEO = SIZES | {
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "max_text_seq_length": 8,
}
FACES = {
    "cross_attn_interval": 1,
    "is_train_face": True,
    "cross_attn_dim_head": 1,
    "cross_attn_num_heads": 1,
    "LFE_id_dim": 2,
    "LFE_vit_dim": 2,
    "LFE_depth": 5,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 1,
    "LFE_output_dim": 10,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 1,
}
MOTION = {
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
JOINT = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}

RIGHT: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "Flux2Transformer2DModel": (
        JOINT | {"in_channels": 4, "attention_head_dim": 16, "joint_attention_dim": 16, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: {
            "hidden_states": noise(6, 4),
            "encoder_hidden_states": text(5, 16),
            "img_ids": torch.arange(24.0).view(1, 6, 4).expand(ROWS, -1, -1),
            "txt_ids": torch.zeros(ROWS, 5, 4),
            "guidance": torch.ones(ROWS),
        },
    ),
    "ChromaTransformer2DModel": (
        JOINT
        | {
            "in_channels": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 16,
            "axes_dims_rope": [4, 4, 8],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda: {
            "hidden_states": noise(6, 4),
            "encoder_hidden_states": text(5, 16),
            "img_ids": torch.arange(18.0).view(6, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "QwenImageTransformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": noise(16, 16),
            "encoder_hidden_states": text(5, 16),
            "encoder_hidden_states_mask": torch.ones(ROWS, 5, dtype=torch.long),
            "img_shapes": [[(1, 4, 4)]] * ROWS,
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        JOINT
        | {
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 10,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda: {
            "hidden_states": noise(4, 2, 4, 4),
            "encoder_hidden_states": text(5, 16),
            "pooled_projections": noise(8, seed=2),
            "encoder_attention_mask": torch.ones(ROWS, 5),
            "guidance": torch.full((ROWS,), 44.0),
        },
    ),
    "LTXVideoTransformer3DModel": (
        SIZES | {"out_channels": 4, "cross_attention_dim": 16, "num_layers": 3, "caption_channels": 16},
        lambda: {
            "hidden_states": noise(8, 4),
            "encoder_hidden_states": text(5, 16),
            "encoder_attention_mask": torch.ones(ROWS, 5, dtype=torch.bool),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        },
    ),
    "SanaTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 4,
        },
        lambda: {"hidden_states": noise(4, 4, 4), "encoder_hidden_states": text(5, 8)},
    ),
    "CogVideoXTransformer3DModel": (
        COGVIDEO | {"out_channels": 4},
        lambda: {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": text(8, 8)},
    ),
    "HunyuanDiT2DModel": (
        SIZES
        | {
            "sample_size": 4,
            "patch_size": 2,
            "num_layers": 6,
            "hidden_size": 16,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "text_len": 4,
            "text_len_t5": 4,
        },
        lambda: {
            "hidden_states": noise(4, 4, 4),
            "encoder_hidden_states": text(4, 8),
            "encoder_hidden_states_t5": text(4, 8),
            "text_embedding_mask": torch.ones(ROWS, 4),
            "text_embedding_mask_t5": torch.ones(ROWS, 4),
            "image_meta_size": torch.ones(ROWS, 6),
            "style": torch.zeros(ROWS, dtype=torch.long),
            "image_rotary_emb": (torch.ones(4, 8), torch.zeros(4, 8)),
        },
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 4,
            "hidden_size": 24,
            "in_channels": 4,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 8,
        },
        lambda: {
            "hidden_states": noise(4, 4, 4),
            "encoder_hidden_states": text(5, 8),
            "encoder_attention_mask": torch.ones(ROWS, 5, dtype=torch.bool),
        },
    ),
    "LTX2VideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 3,
            "caption_channels": 16,
            "rope_double_precision": False,
        },
        lambda: {
            "hidden_states": noise(8, 4),
            "audio_hidden_states": noise(6, 4, seed=2),
            "encoder_hidden_states": text(5, 16),
            "audio_encoder_hidden_states": text(5, 16),
            "num_frames": 2,
            "height": 2,
            "width": 2,
            "fps": 25.0,
            "audio_num_frames": 6,
        },
    ),
    "WanVACETransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 4,
            "rope_max_seq_len": 32,
            "vace_layers": [0, 2],
            "vace_in_channels": 8,
        },
        lambda: {
            "hidden_states": noise(4, 2, 4, 4),
            "encoder_hidden_states": text(5, 16),
            "control_hidden_states": noise(8, 2, 4, 4, seed=2),
            "control_hidden_states_scale": torch.ones(2),
        },
    ),
    "BriaFiboTransformer2DModel": (
        JOINT
        | {
            "in_channels": 4,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "axes_dims_rope": [2, 2, 4],
            "text_encoder_dim": 8,
        },
        lambda: {
            "hidden_states": noise(6, 4),
            "encoder_hidden_states": text(5, 16),
            "text_encoder_layers": [noise(5, 8, seed=10 + i) for i in range(4)],
            "img_ids": torch.arange(18.0).view(6, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "CogView3PlusTransformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": noise(4, 8, 8),
            "encoder_hidden_states": text(5, 8),
            "original_size": torch.tensor([[64, 64]] * ROWS),
            "target_size": torch.tensor([[64, 64]] * ROWS),
            "crop_coords": torch.tensor([[0, 0]] * ROWS),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": noise(6, 4),
            "encoder_hidden_states": noise(5, 2, 8, seed=1),
            "position_ids": torch.arange(33.0).view(11, 3),
        },
    ),
    "HunyuanImageTransformer2DModel": (
        JOINT
        | {
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        lambda: {
            "hidden_states": noise(4, 4, 4),
            "encoder_hidden_states": text(5, 16),
            "encoder_attention_mask": torch.ones(ROWS, 5),
        },
    ),
    "LongCatImageTransformer2DModel": (
        JOINT
        | {
            "in_channels": 4,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": [2, 2, 4],
        },
        lambda: {
            "hidden_states": noise(6, 4),
            "encoder_hidden_states": text(5, 16),
            "img_ids": torch.arange(18.0).view(6, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "OvisImageTransformer2DModel": (
        JOINT
        | {
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": noise(6, 4),
            "encoder_hidden_states": text(5, 16),
            "img_ids": torch.arange(18.0).view(6, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "ConsisIDTransformer3DModel": (
        COGVIDEO | FACES | {"out_channels": 4},
        lambda: {
            "hidden_states": noise(1, 4, 8, 8),
            "encoder_hidden_states": text(8, 8),
            "id_vit_hidden": [torch.ones(ROWS, 2, 2)],
            "id_cond": torch.ones(ROWS, 2),
        },
    ),
    "WanAnimateTransformer3DModel": (
        MOTION
        | {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 4,
            "image_dim": 16,
            "rope_max_seq_len": 32,
        },
        lambda: {
            "hidden_states": noise(12, 3, 4, 4),
            "encoder_hidden_states": text(12, 16),
            "encoder_hidden_states_image": text(12, 16),
            "pose_hidden_states": noise(4, 2, 4, 4),
            "face_pixel_values": noise(3, 5, 16, 16),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1, 0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": noise(4, 8, 8),
            "encoder_hidden_states_t5": text(5, 8),
            "encoder_hidden_states_llama3": noise(5, 4, seed=3).expand(2, -1, -1, -1).transpose(0, 1),
            "pooled_embeds": noise(8, seed=2),
        },
    ),
    "MochiTransformer3DModel": (
        SIZES
        | {
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
        },
        lambda: {
            "hidden_states": noise(4, 2, 4, 4),
            "encoder_hidden_states": text(16, 16),
            "encoder_attention_mask": torch.ones(ROWS, 16, dtype=torch.bool),
        },
    ),
}
"""Class names of networks whose blocks can be reused: their configuration and what they are called with."""

WRONG: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "LatteTransformer3DModel": (
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 4,
            "attention_bias": True,
            "num_embeds_ada_norm": 1000,
            "video_length": 3,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        lambda: {"hidden_states": noise(4, 3, 8, 8), "encoder_hidden_states": text(5, 8)},
    ),
}
"""The same of networks that have no row, and whose derived row does not hold."""


class Loop(DiffusionPipeline):
    """Calls its network at every step with the same arguments, but for the time and what is denoised.

    Args:
        transformer: the network.
        scheduler: of a flow.
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, arguments: dict[str, Any], steps: int = 4, still: bool = False) -> Tensor:
        """(steps, rows, ...) the outputs; `still` shows the network the same at every step."""
        self.scheduler.set_timesteps(steps)
        names = inspect.signature(self.transformer.forward).parameters
        name = next(name for name in names if name in ("timestep", "timesteps"))
        sample, made = arguments["hidden_states"], []
        for timestep in self.scheduler.timesteps:
            shown = arguments["hidden_states"] if still else sample
            time = torch.full((ROWS,), float(self.scheduler.timesteps[0] if still else timestep))
            time = family_of(self.transformer).argument_of(time, self.scheduler.config.num_train_timesteps)
            output = self.transformer(**arguments | {"hidden_states": shown, name: time}, return_dict=False)[0]
            made.append(output)
            if output.shape == sample.shape:
                sample = self.scheduler.step(output, timestep, sample, return_dict=False)[0]
            else:  # a network that also takes what stays as it is
                self.scheduler.step(output, timestep, output)
        return torch.stack(made)


def looped(name: str) -> tuple[Loop, dict[str, Any]]:
    """A pipeline of a network of `RIGHT` or `WRONG`, and the arguments for it."""
    config, arguments = (RIGHT | WRONG)[name]
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**config).eval()
    tiny.random_weights(network, 1, std=0.05)
    pipe = Loop(network, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments()
