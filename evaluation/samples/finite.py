"""Check for samples with NaN or infinity. Rounded to 8 bits they would be black or white, and nobody would know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from flowaccel import is_accelerated
from flowaccel.hooks import Pipeline
from flowaccel.models.weights import not_finite


def check_samples(pipe: Pipeline, made: Any, ids: Sequence[int]) -> None:
    """Raise a FloatingPointError that names the first sample that is not finite, their number and the likely cause.

    Args:
        pipe: the pipeline that made them.
        made: arrays or tensors, one per sample; anything else, such as PIL images, is past checking.
        ids: ids of the samples.
    """
    wrong = [sample_id for sample_id, sample in zip(ids, made, strict=True) if not _finite(sample)]
    if wrong:
        raise FloatingPointError(
            f"sample {wrong[0]} holds NaN or infinity ({len(wrong)} of the {len(ids)} that were made together do): "
            f"{_cause(pipe)}"
        )


def _finite(sample: Any) -> bool:
    if isinstance(sample, np.ndarray):
        return bool(np.isfinite(sample).all())
    return bool(sample.isfinite().all()) if isinstance(sample, torch.Tensor) else True


def _cause(pipe: Pipeline) -> str:
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, network in networks.items():
        damaged = not_finite(network)
        if damaged is not None:
            return f"{damaged} in the weights of {name} does; load the pipeline from another copy"
    if any(getattr(network, "dtype", None) == torch.float16 for network in networks.values()):
        return "float16 overflows in many networks; use --dtype bfloat16 or float32 (torch_dtype=)"
    if is_accelerated(pipe):
        return "the weights are finite; see whether it happens without the recipe (--recipe none)"
    return "the weights are finite; the arguments or the scheduler's settings may not suit the pipeline"
