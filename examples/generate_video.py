"""Write a short video with a stock WanPipeline, small and with random weights: the video is noise, the way is real.

python examples/generate_video.py

With trained weights replace `tiny_wan()` by `WanPipeline.from_pretrained(...)` and the embeddings by `prompt=`.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

import flowaccel
from flowaccel.cli.video import save_video, video_suffix

TEXT_WIDTH = 16


def tiny_wan() -> WanPipeline:
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=64,
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


pipe = tiny_wan()
pipe.set_progress_bar_config(disable=True)
words = torch.randn(2, 1, 8, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
arguments = {
    "prompt_embeds": words[0],
    "negative_prompt_embeds": words[1],
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "output_type": "pil",
}
with flowaccel.accelerated(pipe, "ab2@8"):
    frames = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames[0]
path = f"video{video_suffix()}"
save_video(frames, path, fps=8)
print(f"wrote {path}: {len(frames)} frames of noise, for the weights are random")
