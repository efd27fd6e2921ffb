"""Checkpoints in the layout of the official SiT (MIT) and DiT repositories: reading, key maps, sizes.

The two repositories share one key layout. Only safetensors and, through torch's restricted loader, `.pt` files are
read.
"""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowaccel.errors import CheckpointError, WeightsNotFoundError

logger: logging.Logger = logging.getLogger(__name__)

# name -> (depth, width, heads); arXiv 2401.08740, table 1
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
TRAINING_ENTRIES = ("ema", "model")

# official name -> ours; `{i}` is the block. The fused `qkv` is split in `sit_from_official`.
_RENAMES = {
    "pos_embed": "pos_embed",
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "label_embed",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
}
_BLOCK_RENAMES = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
# key that a size is read from -> its number of axes
_AXES = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}
# exceptions of the readers for truncated and corrupted files, found by cutting and overwriting files at random
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def preset_config(name: str) -> dict[str, Any]:
    """Return the constructor arguments of a published SiT size such as `"SiT-XL/2"`.

    Raises:
        ValueError: unknown name.
    """
    match = re.fullmatch(r"(?:SiT-)?(S|B|L|XL)/(\d+)", name)
    if not match or int(match[2]) not in PATCHES:
        raise ValueError(f"unknown SiT size {name!r}; sizes are SiT-{{S,B,L,XL}}/{{2,4,8}}, for example 'SiT-XL/2'")
    depth, width, heads = SIZES[match[1]]
    return {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": int(match[2]),
    }


def load_official_state(source: str | Path | Mapping[str, Any], which: str | None = None) -> dict[str, Tensor]:
    """Return the flat state dict in `source` (a `.pt` or `.safetensors` file, or a dictionary already loaded).

    Raises:
        WeightsNotFoundError: no such file.
        CheckpointError: unreadable, or not a dictionary of tensors, or `which` is not in it.
    """
    name = "the given dictionary" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _read(Path(source))
    entry = which or next((key for key in TRAINING_ENTRIES if isinstance(content.get(key), Mapping)), None)
    if entry is not None:
        if not isinstance(content.get(entry), Mapping):
            raise CheckpointError(f"{name} has no entry {entry!r}; it has {sorted(map(str, content))[:8]}")
        content = content[entry]
        logger.info("%s: took the entry %r", name, entry)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{name} is not a state dict: expected a dictionary of tensors in the official layout, alone or under "
            f"{' or '.join(TRAINING_ENTRIES)}; pass which= to name another entry"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise WeightsNotFoundError(f"no checkpoint at {path}; give the path of a .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"cannot read {path}: it is truncated, not a checkpoint, or holds objects other than tensors and plain "
            f"containers, which are never executed ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def infer_sit_config(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the constructor arguments from an official state dict; `overrides` take precedence.

    They also supply the arguments that the weights do not determine.

    Raises:
        CheckpointError: keys missing, or a width whose number of heads is unknown and not given.
    """
    missing = [key for key in _AXES if key not in state]
    if missing:
        raise CheckpointError(
            f"not an official SiT or DiT checkpoint: {missing} missing; it has {sorted(state)[:6]} ..."
        )
    odd = [f"{key} {tuple(state[key].shape)}" for key, axes in _AXES.items() if state[key].dim() != axes]
    odd += [f"{key} {tuple(state[key].shape)}" for key in _AXES if state[key].numel() == 0]
    if odd:
        raise CheckpointError(f"not an official SiT or DiT checkpoint: unexpected shapes: {', '.join(odd)}")
    width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = overrides.get("num_attention_heads") or next((h for _, w, h in SIZES.values() if w == width), None)
    if heads is None:
        raise CheckpointError(
            f"the weights do not tell how many heads a width of {width} has; pass num_attention_heads="
        )
    if width % heads:
        raise CheckpointError(f"num_attention_heads={heads} does not divide the width of the weights, {width}")
    computed = state["final_layer.linear.weight"].shape[0] // patch**2
    out_channels = overrides.get("out_channels") or in_channels
    config = {
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_layers": _depth(state),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - overrides.get("null_class", True),
        "learn_sigma": computed == 2 * out_channels,
    }
    return {**config, **overrides}


def every_channel(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with all computed channels returned, learned variances too, unless `overrides` say otherwise.

    The official DyDiT and DiffMoE classes do so.
    """
    if config["learn_sigma"] and not {"learn_sigma", "out_channels"} & overrides.keys():
        return config | {"learn_sigma": False, "out_channels": 2 * config["out_channels"]}
    return config


def _depth(state: Mapping[str, Tensor]) -> int:
    """Count the blocks in an official state dict, so that a stray index cannot ask for a million of them."""
    return len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})


def sit_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official SiT or DiT keys to `SiTTransformer2DModel` keys.

    Raises:
        CheckpointError: a key that the layout does not have.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        for ours, part in _rename(key, value):
            converted[ours] = part
    return converted


def _rename(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if block:
        prefix = f"transformer_blocks.{block[1]}."
        if block[2] == "attn.qkv":
            if not value.dim() or value.shape[0] % 3:
                raise CheckpointError(f"{key} must stack query, key and value, got shape {tuple(value.shape)}")
            parts = value.chunk(3, dim=0)
            return [(f"{prefix}{name}.{block[3]}", part) for name, part in zip(_QKV, parts, strict=True)]
        if block[2] in _BLOCK_RENAMES:
            return [(f"{prefix}{_BLOCK_RENAMES[block[2]]}.{block[3]}", value)]
    stem, _, leaf = key.rpartition(".")
    if key in _RENAMES:
        return [(_RENAMES[key], value)]
    if stem in _RENAMES:
        return [(f"{_RENAMES[stem]}.{leaf}", value)]
    raise CheckpointError(f"unexpected key {key!r}: not in the official SiT and DiT layout")


def sit_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert `SiTTransformer2DModel` keys to official keys (query, key and value are fused again).

    Raises:
        ValueError: a weight that the layout has no name for, such as an adapter's.
    """
    renames = {ours: theirs for theirs, ours in _RENAMES.items()}
    block_renames = {ours: theirs for theirs, ours in _BLOCK_RENAMES.items()}
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        if key in renames:
            converted[renames[key]] = value
        elif stem in renames:
            converted[f"{renames[stem]}.{leaf}"] = value
        elif not block or block[2] not in (*block_renames, *_QKV, "attn.to_qkv"):
            raise ValueError(f"{key!r} has no name in the official layout; merge or unload adapters first")
        elif block[2] in block_renames:
            converted[f"blocks.{block[1]}.{block_renames[block[2]]}.{leaf}"] = value
        elif block[2] == _QKV[0]:
            parts = [state[f"transformer_blocks.{block[1]}.{name}.{leaf}"] for name in _QKV]
            converted[f"blocks.{block[1]}.attn.qkv.{leaf}"] = torch.cat(parts)
    return converted


def dit_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official DiT keys to those of diffusers' `DiTTransformer2DModel` (one embedder copy per block)."""
    depth = _depth(state)
    names = {
        "time_embed.linear_1": "norm1.emb.timestep_embedder.linear_1",
        "time_embed.linear_2": "norm1.emb.timestep_embedder.linear_2",
        "label_embed": "norm1.emb.class_embedder.embedding_table",
    }
    renames = {"patch_embed": "pos_embed.proj", "modulation_out": "proj_out_1", "proj_out": "proj_out_2"}
    converted: dict[str, Tensor] = {}
    for key, value in sit_from_official(state).items():
        stem, _, leaf = key.rpartition(".")
        if stem in names:
            converted |= {f"transformer_blocks.{i}.{names[stem]}.{leaf}": value for i in range(depth)}
        elif stem in renames:
            converted[f"{renames[stem]}.{leaf}"] = value
        elif key != "pos_embed":  # the stock class computes this table itself
            converted[key.replace(".modulation.", ".norm1.linear.").replace(".attn.", ".attn1.")] = value
    return converted


def dit_transformer_from_official(
    source: str | Path | Mapping[str, Any], which: str | None = None, overrides: Mapping[str, Any] | None = None
) -> DiTTransformer2DModel:
    """Load an official DiT checkpoint as diffusers' own `DiTTransformer2DModel`.

    diffusers spaces the 128 time frequencies by 1/127 where DiT's code has 1/128, which moves the output by about 1e-3
    (diffusers' own conversion of DiT-XL/2 does the same).

    Raises:
        CheckpointError: as for `SiTTransformer2DModel.from_official`.
    """
    state = load_official_state(source, which)
    config = infer_sit_config(state, overrides or {})
    model = DiTTransformer2DModel(
        num_attention_heads=config["num_attention_heads"],
        attention_head_dim=config["attention_head_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] * (2 if config["learn_sigma"] else 1),
        num_layers=config["num_layers"],
        sample_size=config["sample_size"],
        patch_size=config["patch_size"],
        num_embeds_ada_norm=config["num_classes"],
        norm_eps=1e-6,
    )
    load_converted(model, dit_from_official(state))
    return model.eval()


def load_converted(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `state` strictly; on a mismatch raise a `CheckpointError` that lists it and leave `model` unchanged."""
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key}: checkpoint {tuple(value.shape)}, model {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({len(problems)} misfits): {'; '.join(problems[:3])}"
        )
    model.load_state_dict(dict(state))
