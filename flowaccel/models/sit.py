"""SiT: the class-conditional diffusion transformer of "Scalable Interpolant Transformers" (arXiv 2401.08740).

Shapes: B rows, C channels, S input size, p patch size, L = (S / p)**2 tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from flowaccel.compat import register_block, register_components
from flowaccel.models import official
from flowaccel.models.time import SIT, FlowConvention

register_components()

NORM_EPS = 1e-6
TIME_FREQUENCIES = 256


class SiTAttnProcessor:
    """Plain self-attention through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """Map `hidden_states` (B, L, D) to (B, L, D), before the output projection."""
        if attn.fused_projections:
            projections = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projections = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (projection.unflatten(-1, (-1, attn.head_dim)) for projection in projections)
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attended.flatten(2, 3).to(query.dtype)


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases, no query or key normalisation."""

    _default_processor_cls = SiTAttnProcessor
    _available_processors: ClassVar[list[type]] = [SiTAttnProcessor]
    processor: Any

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim: int = dim // heads
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q: nn.Linear = nn.Linear(dim, dim)
        self.to_k: nn.Linear = nn.Linear(dim, dim)
        self.to_v: nn.Linear = nn.Linear(dim, dim)
        self.to_out: nn.ModuleList = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.processor = SiTAttnProcessor()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply self-attention, (B, L, D) -> (B, L, D)."""
        attended: Tensor = self.processor(self, hidden_states)
        return self.to_out[0](attended)


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulate `hidden_states` (B, L, D): `hidden_states` * (1 + `scale`) + `shift`, both (B, D)."""
    return hidden_states * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SiTBlock(nn.Module):
    """One adaLN-Zero transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1: nn.LayerNorm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn: SiTAttention = SiTAttention(dim, heads)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.ff: FeedForward = FeedForward(dim, inner_dim=round(dim * mlp_ratio), activation_fn="gelu-approximate")
        self.modulation: nn.Linear = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Map `hidden_states` (B, L, D) to (B, L, D); `temb` (B, D) is the SiLU of time plus label."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(temb).chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift1, scale1))
        hidden_states = hidden_states + gate1.unsqueeze(1) * attended
        transformed = self.ff(modulate(self.norm2(hidden_states), shift2, scale2))
        return hidden_states + gate2.unsqueeze(1) * transformed


register_block(SiTBlock)


class SiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Velocity network of SiT (arXiv 2401.08740). At depth 1 with doubled input channels it is FlowTurbo's refiner.

    It uses SiT's own convention (`flow_convention`): time t in [0, 1] with t = 1 data, output data - noise.
    `SiTPipeline` translates for diffusers' schedulers.

    Args:
        sample_size: height and width S of the (latent) image; a multiple of `patch_size`.
        patch_size: side p of a square patch.
        in_channels: input channels C.
        out_channels: returned channels; `None` means `in_channels`.
        num_layers: number of blocks.
        num_attention_heads: heads per block.
        attention_head_dim: width of a head; D = heads * head_dim must be a multiple of 4.
        mlp_ratio: hidden width of the feed-forward as a multiple of D.
        num_classes: classes 0 .. num_classes - 1; index `num_classes` is the null label where there is one.
        null_class: whether the label table has a row for the null label, which classifier-free guidance needs.
        learn_sigma: the last layer computes twice `out_channels` and the second half is dropped (a DiT inheritance
            that the released SiT-XL/2 has).

    Raises:
        ValueError: sizes that do not fit each other.
    """

    flow_convention: ClassVar[FlowConvention] = SIT
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["SiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if sample_size % patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size, got {sample_size} and {patch_size}")
        if dim % 4:
            raise ValueError(f"num_attention_heads * attention_head_dim must be a multiple of 4, got {dim}")
        self.out_channels: int = in_channels if out_channels is None else out_channels
        self.computed_channels: int = 2 * self.out_channels if learn_sigma else self.out_channels
        self.grid_size: int = sample_size // patch_size

        self.patch_embed: nn.Conv2d = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        # A frozen parameter, not a buffer: the official checkpoints store it, and resized ones store another table.
        self.pos_embed: nn.Parameter = nn.Parameter(self._position_table(dim), requires_grad=False)
        self.time_proj: Timesteps = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed: TimestepEmbedding = TimestepEmbedding(TIME_FREQUENCIES, dim)
        self.label_embed: nn.Embedding = nn.Embedding(num_classes + null_class, dim)
        self.transformer_blocks: nn.ModuleList = nn.ModuleList(
            SiTBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.norm_out: nn.LayerNorm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.modulation_out: nn.Linear = nn.Linear(dim, 2 * dim)
        self.proj_out: nn.Linear = nn.Linear(dim, patch_size**2 * self.computed_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def _position_table(self, dim: int) -> Tensor:
        # diffusers would scale every grid to 16 positions; SiT counts tokens
        table = get_2d_sincos_pos_embed(dim, self.grid_size, base_size=self.grid_size, output_type="pt")
        return table.to(torch.get_default_dtype()).unsqueeze(0)  # which diffusers sets while loading

    def reset_parameters(self) -> None:
        """Initialise as SiT does: xavier everywhere, zero gates and zero output, so that a fresh network returns 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.patch_embed.weight.shape[0], -1))
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)
        for weight in (self.label_embed.weight, self.time_embed.linear_1.weight, self.time_embed.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        blocks: Any = self.transformer_blocks
        for linear in [*(block.modulation for block in blocks), self.modulation_out, self.proj_out]:
            nn.init.zeros_(linear.weight)

    @property
    def null_label(self) -> int:
        """Label of "no class" in classifier-free guidance."""
        return self.config.num_classes

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity (data - noise) at `hidden_states`.

        Args:
            hidden_states: (B, in_channels, S, S).
            timestep: t in [0, 1] (0 noise, 1 data; slightly beyond is allowed), a scalar or (B,).
            class_labels: (B,) integers in 0 .. num_classes, the last being the null label.
            return_dict: return a `Transformer2DModelOutput` rather than a 1-tuple.

        Returns:
            `sample` of shape (B, out_channels, S, S).

        Raises:
            ValueError: an input of another shape.
        """
        self._check_input(hidden_states)
        batch = hidden_states.shape[0]
        temb = self._condition(timestep, class_labels, batch, hidden_states)
        hidden_states = self.patch_embed(hidden_states).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb)
            else:
                hidden_states = block(hidden_states, temb)
        shift, scale = self.modulation_out(temb).chunk(2, dim=-1)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        sample = self._unpatchify(hidden_states)[:, : self.out_channels]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_input(self, hidden_states: Tensor) -> None:
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(f"hidden_states must have shape (batch, {', '.join(map(str, expected))}), "
                             f"got {tuple(hidden_states.shape)}")  # fmt: skip

    def _condition(self, timestep: Tensor | float, class_labels: Tensor, batch: int, like: Tensor) -> Tensor:
        timestep = torch.as_tensor(timestep, device=like.device).expand(batch)
        frequencies = self.time_proj(timestep).to(like.dtype)
        return nn.functional.silu(self.time_embed(frequencies) + self.label_embed(class_labels))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        patch, grid = self.config.patch_size, self.grid_size
        tokens = tokens.unflatten(2, (patch, patch, self.computed_channels)).unflatten(1, (grid, grid))
        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Build a freshly initialised network of a published size.

        Args:
            name: `"SiT-S/2"`, `"SiT-B/4"`, `"SiT-XL/2"` and so on: S, B, L or XL with patch size 2, 4 or 8.
            overrides: any constructor argument.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        return cls(**{**official.preset_config(name), **overrides})

    @classmethod
    def from_official(
        cls, path_or_state_dict: str | Path | dict[str, Tensor], which: str | None = None, **overrides: Any
    ) -> Self:
        """Load a checkpoint in the layout of the official SiT and DiT repositories.

        Args:
            path_or_state_dict: a `.pt` or `.safetensors` file, or a state dict. `.pt` files are read by torch's
                restricted loader; of a training checkpoint `ema` is taken, else `model`, else the flat dictionary.
            which: take this entry of a training checkpoint instead.
            overrides: constructor arguments that the weights do not determine, above all `num_attention_heads` for a
                width that no published size has, and `out_channels` for a refiner.

        Raises:
            CheckpointError: a truncated, foreign or hostile file, or weights that do not fit; nothing is changed.
        """
        state = official.load_official_state(path_or_state_dict, which=which)
        config = official.infer_sit_config(state, overrides)
        model = cls(**config)
        official.load_converted(model, official.sit_from_official(state))
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """Return this network's weights under the official key names, as a new dict.

        Tensors are shared where they are unchanged.
        """
        return official.sit_to_official(self.state_dict())
