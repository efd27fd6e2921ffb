"""Training of a small text-to-image flow pipeline: tokenizer, autoencoder, text encoders, transformer.

All parts are of stock classes.

The conventions are those of `StableDiffusion3Pipeline` (arXiv 2403.03206): sigma = 1 is noise, timestep = 1000 sigma,
the transformer returns noise - data, and the tokens of its two CLIP text encoders stand side by side in one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from flowaccel.data import CaptionedSet, ImageSet
from flowaccel.hooks import Pipeline
from flowaccel.models.time import DIFFUSERS, SIT

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# What the pipeline puts in place of a T5 that it does not have: `max_sequence_length` zero tokens, 256 if not told.
ZERO_TOKENS = (1, 256)


def word_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """Create a CLIP tokenizer with one token for each of `words`, and bytes for everything else.

    Args:
        words: words of letters only.
        max_length: tokens of a padded text, with its start and end.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [_START, _END, *alphabet, *(letter + _WORD_END for letter in alphabet)]
    merges = _merges(sorted(set(words)))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens + ["".join(pair) for pair in merges]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges until every word is one token.

    They are ordered by count, then by the alphabet, so that no run differs.
    """
    split = [(*word[:-1], word[-1] + _WORD_END) for word in words]
    merges = []
    while any(len(parts) > 1 for parts in split):
        counts = Counter(pair for parts in split for pair in pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merged(parts, best) for parts in split]
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokenize texts with the pipeline's padding: (N, model_max_length) int64."""
    padded = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return padded.input_ids


@dataclass(frozen=True, kw_only=True)
class AutoencoderObjective:
    """Training objective: `objective(autoencoder, generator)` -> mean absolute error plus the weighted KL term."""

    images: Tensor
    """(N, C, H, W) in [-1, 1]."""
    batch_size: int = 32
    kl_weight: float = 1e-4
    """Weight of the KL term's mean over the latents' elements."""

    def __call__(self, autoencoder: Any, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar; all randomness comes from `generator`."""
        index = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        images = self.images[index].to(autoencoder.device)
        posterior = autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return (decoded - images).abs().mean() + self.kl_weight * divergence


@torch.no_grad()
def set_latent_scale(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Set the shift and scale in the autoencoder's configuration that give latents mean 0 and deviation 1."""
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in images.split(100)])
    autoencoder.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))


@torch.no_grad()
def encode_images(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (N, C, H, W) in [-1, 1] as the latents that the transformer works on."""
    latents = torch.cat(
        [autoencoder.encode(part.to(autoencoder.device)).latent_dist.mean for part in images.split(100)]
    )
    return (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


class TextToImage(nn.Module):
    """Transformer with its two text encoders, trained together.

    `StableDiffusion3Pipeline` without a T5 fills that encoder's place with `max_sequence_length` zero tokens. They have
    no position, so n of them equal one whose attention score is larger by log n: `zero_tokens` is an exact stand-in.
    """

    def __init__(self, transformer: Any, text_encoder: Any, text_encoder_2: Any) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids (B, L) as tokens (B, L + 1, joint_attention_dim) and pooled (B, D).

        The last token is zero.
        """
        encoded = [
            encoder(input_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        tokens = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        width = self.transformer.config.joint_attention_dim
        tokens = nn.functional.pad(tokens, (0, width - tokens.shape[-1], 0, 1))
        return tokens, torch.cat([output.text_embeds for output in encoded], dim=-1)

    def forward(self, sample: Tensor, sigma: Tensor, input_ids: Tensor, zero_tokens: Tensor) -> Tensor:
        """Return the velocity noise - data, (B, C, H, W), with `zero_tokens` (B,) tokens in place of T5's."""
        tokens, pooled = self.encode(input_ids)
        own = self.transformer.attn_processors
        self.transformer.set_attn_processor(_LastTokenCounts(zero_tokens))
        try:
            return self.transformer(sample, tokens, pooled, 1000 * sigma, return_dict=False)[0]
        finally:
            self.transformer.set_attn_processor(own)


class _LastTokenCounts:
    """Joint attention of SD3's blocks in which the last text token counts as several."""

    def __init__(self, count: Tensor) -> None:
        self.bias = count.log()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        image = self._heads(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        text = self._heads(
            attn,
            encoder_hidden_states,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            (attn.norm_added_q, attn.norm_added_k),
        )
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(image, text, strict=True))
        mask = query.new_zeros(len(query), 1, 1, key.shape[2])
        mask[..., -1] = self.bias.to(mask).reshape(-1, 1, 1)
        joint = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joint = joint.transpose(1, 2).flatten(2)
        hidden, encoder = joint.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        return attn.to_out[0](hidden), encoder if attn.context_pre_only else attn.to_add_out(encoder)

    @staticmethod
    def _heads(attn: Any, states: Tensor, names: Sequence[str], norms: Sequence[Any]) -> list[Tensor]:
        projected = [getattr(attn, name)(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for name in names]
        for i, norm in enumerate(norms):
            projected[i] = projected[i] if norm is None else norm(projected[i])
        return projected


@dataclass(frozen=True, kw_only=True)
class TextFlowObjective:
    """Training objective of `TextToImage`: `objective(model, generator)` -> mean flow-matching loss of a batch."""

    latents: Tensor
    """(N, C, H, W), as `encode_images` gives them."""
    input_ids: Tensor
    """(N, L)."""
    null_ids: Tensor
    """(L,), the empty prompt."""
    batch_size: int = 64
    prompt_drop: float = 0.1
    """Probability of training on the empty prompt instead, for classifier-free guidance."""
    zero_tokens: tuple[int, int] = ZERO_TOKENS
    """Numbers of zero tokens, one of which is drawn for every image: the evaluator's and the pipeline's default."""

    def __call__(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar.

        Data, noise, logit-normal noise levels and prompt drops are drawn from `generator`.
        """
        batch = self.batch_size
        index = torch.randint(len(self.latents), (batch,), generator=generator)
        noise = torch.randn((batch, *self.latents.shape[1:]), generator=generator)
        sigma = torch.randn(batch, generator=generator).sigmoid()
        dropped = torch.rand(batch, generator=generator) < self.prompt_drop
        many = torch.rand(batch, generator=generator) < 0.5
        device = next(model.parameters()).device
        ids = torch.where(dropped.unsqueeze(1), self.null_ids, self.input_ids[index]).to(device)
        zero_tokens = torch.where(many, float(self.zero_tokens[1]), float(self.zero_tokens[0])).to(device)
        latents, noise, sigma = self.latents[index].to(device), noise.to(device), sigma.to(device)
        level = sigma.reshape(-1, 1, 1, 1)
        velocity = model((1 - level) * latents + level * noise, sigma, ids, zero_tokens)
        return (velocity.float() - (noise - latents)).square().mean()


class PromptedFlow(nn.Module):
    """Adapter of a `StableDiffusion3Pipeline` network, or a refiner for it, to SiT's interface.

    It is for `RefinerObjective`.

    Called as `network(state, t, labels, return_dict=False)` with t = 1 data; a label is the number of a prompt, the
    last prompt is the empty one. Returns data - noise.
    """

    def __init__(self, network: Any, tokens: Tensor, pooled: Tensor) -> None:
        """Wrap `network`; `tokens` (P, L, joint_attention_dim) and `pooled` (P, D) are the encoded prompts."""
        super().__init__()
        self.network = network
        self.tokens, self.pooled = tokens, pooled

    @property
    def null_label(self) -> int:
        """Index of the empty prompt."""
        return len(self.tokens) - 1

    def forward(self, state: Tensor, t: Tensor, labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the velocity for `state` (B, C, H, W).

        For a refiner it is (B, 2 C, H, W) with data - noise in its second half.
        """
        channels = self.network.config.out_channels
        sample = torch.cat([state[:, :channels], -state[:, channels:]], dim=1)
        tokens, pooled = (table[labels.to(table.device)].to(state) for table in (self.tokens, self.pooled))
        output = self.network(sample, tokens, pooled, DIFFUSERS.network_time(SIT.noise_level(t)), return_dict=False)[0]
        return (SIT.velocity_sign * output,)


@dataclass(frozen=True, kw_only=True)
class PromptedData:
    """Captioned images of a `StableDiffusion3Pipeline`, in the form that `RefinerObjective` takes."""

    latents: ImageSet
    """Labels are numbers of prompts."""
    tokens: Tensor
    """(P, L, joint_attention_dim)."""
    pooled: Tensor
    """(P, D)."""

    def wrap(self, network: Any) -> PromptedFlow:
        """Adapt the network or refiner to SiT's interface."""
        return PromptedFlow(network, self.tokens, self.pooled)


def prompted_data(pipe: Pipeline, data: CaptionedSet, max_sequence_length: int) -> PromptedData:
    """Encode images and captions of `data`; the empty prompt comes last.

    `max_sequence_length` is what the pipeline will be called with.
    """
    prompts = list(dict.fromkeys(data.captions))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    tokens, pooled = _encode_prompts(pipe, [*prompts, ""], max_sequence_length)
    labels = torch.tensor([number[caption] for caption in data.captions])
    latents = encode_images(pipe.vae, data.images).cpu()
    return PromptedData(latents=ImageSet(images=latents, labels=labels), tokens=tokens, pooled=pooled)


@torch.no_grad()
def _encode_prompts(pipe: Pipeline, prompts: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    encoded = [
        pipe.encode_prompt(
            prompt=prompts[first : first + 500],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        for first in range(0, len(prompts), 500)
    ]
    return torch.cat([tokens for tokens, *_ in encoded]), torch.cat([pooled for _, _, pooled, _ in encoded])
