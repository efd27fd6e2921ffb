"""FLUX's single-stream block on a subset of the image tokens, as specified in DyDiT++ (arXiv 2504.06803).

An image token that is left out skips the feed-forward and the joint output projection, so that its update is 0.

What the attention returns for such a token is thrown away, so its query need not be made: queries are those of the text
and the kept image tokens, keys and values those of all tokens. This changes nothing in the result.

Shapes: B rows, T text tokens, N image tokens, D width, M computed image tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxSingleTransformerBlock
from torch import Tensor, nn

from flowaccel.methods.dynamic_width.tokens import TokenChoice, put_tokens, take_tokens

_HALF_MAX = 65504.0


class TokenSingleBlock(TokenChoice, FluxSingleTransformerBlock):
    """Single-stream block that computes a subset of the image tokens and leaves the others unchanged.

    Every `FluxSingleTransformerBlock` can become one (`take_over`): parameters, hooks and names stay.
    """

    @staticmethod
    def take_over(module: nn.Module) -> TokenSingleBlock:
        """Convert `module` to a `TokenSingleBlock` in place.

        Raises:
            TypeError: it is no `FluxSingleTransformerBlock`.
        """
        if type(module) is not FluxSingleTransformerBlock and not isinstance(module, TokenSingleBlock):
            raise TypeError(f"fused blocks are FluxSingleTransformerBlocks, got a {type(module).__name__}")
        module.__class__ = TokenSingleBlock
        assert isinstance(module, TokenSingleBlock)
        return module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block to image tokens (B, N, D) and text tokens (B, T, D), and return text and image tokens.

        `temb` is the conditioning (B, D), `image_rotary_emb` the cosines and sines (T + N, head width) of the rotary
        embedding.
        """
        keep, text = self.keep, encoder_hidden_states.shape[1]
        if keep is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        attend_with = joint_attention_kwargs or {}
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(joined, emb=temb)
        gate = gate.unsqueeze(1)
        if self.dense or not _plain(self.attn, attend_with):
            attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **attend_with)
            joined = joined + gate * self._projected(attended, normed) * _with_text(keep, text).to(joined.dtype)
        else:
            places, kept = self.places()
            places = torch.cat([torch.arange(text, device=places.device).expand(len(places), -1), places + text], dim=1)
            chosen = take_tokens(normed, places)
            attended = _attend(self.attn, chosen, normed, image_rotary_emb, places)
            update = gate * self._projected(attended, chosen) * _with_text(kept, text)
            joined = put_tokens(joined, places, update)
        if joined.dtype == torch.float16:
            joined = joined.clip(-_HALF_MAX, _HALF_MAX)
        return joined[:, :text], joined[:, text:]

    def _projected(self, attended: Tensor, normed: Tensor) -> Tensor:
        output: Tensor = self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=2))
        return output


def _with_text(keep: Tensor, text: int) -> Tensor:
    """Prepend the text tokens, which are always kept, to a mask: (B, M, 1) -> (B, T + M, 1)."""
    return torch.cat([keep.new_ones(len(keep), text, 1), keep], dim=1)


def _plain(attention: Any, arguments: dict[str, Any]) -> bool:
    """Whether `_attend` computes what the attention module would: nothing wraps or replaces it."""
    processor = attention.processor
    return (
        type(processor) is FluxAttnProcessor
        and processor._parallel_config is None
        and arguments.get("attention_mask") is None
        and not ("forward" in vars(attention) or attention._forward_hooks or attention._forward_pre_hooks)
    )


def _attend(
    attention: Any, chosen: Tensor, tokens: Tensor, rotary: tuple[Tensor, Tensor] | None, places: Tensor
) -> Tensor:
    """Attend from `chosen` (B, T + M, D), located at `places` of `tokens` (B, T + N, D), to all tokens."""
    heads = (-1, attention.head_dim)
    query = attention.norm_q(attention.to_q(chosen).unflatten(-1, heads))
    key = attention.norm_k(attention.to_k(tokens).unflatten(-1, heads))
    value = attention.to_v(tokens).unflatten(-1, heads)
    if rotary is not None:
        key = apply_rotary_emb(key, rotary, sequence_dim=1)
        # rows have their own places, but an embedding has no rows: all queries stand in one
        cosines, sines = (part.to(places.device)[places.flatten()] for part in rotary)
        query = apply_rotary_emb(query.flatten(0, 1)[None], (cosines, sines), sequence_dim=1).view_as(query)
    output = dispatch_attention_fn(query, key, value, backend=attention.processor._attention_backend)
    return output.flatten(2, 3).to(query.dtype)
