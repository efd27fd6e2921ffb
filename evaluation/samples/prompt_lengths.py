"""Check of prompt lengths: diffusers truncates long prompts and only logs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowaccel.evaluation.samples.call_arguments import parameters
from flowaccel.hooks import Pipeline

_SEQUENCE = "max_sequence_length"


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, with those that mark its start and end."""
    return [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids]


def token_limits(pipe: Pipeline, arguments: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """Yield every tokenizer of a pipeline whose text encoder is present, and how many tokens it keeps.

    CLIP's keep `model_max_length`, its encoder has no more positions; others keep the `max_sequence_length` of the
    call, given or default, where the pipeline has such an argument.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerBase

    default = parameters(pipe).get(_SEQUENCE)
    asked = arguments.get(_SEQUENCE, None if default is None else default.default)
    for name, tokenizer in pipe.components.items():
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None or not name.startswith("tokenizer") or not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        fixed = isinstance(tokenizer, CLIPTokenizer) or not isinstance(asked, int)
        yield tokenizer, tokenizer.model_max_length if fixed else asked


def too_long(pipe: Pipeline, prompts: Sequence[str], arguments: Mapping[str, Any]) -> str | None:
    """Return what is wrong with prompts that every text encoder of the pipeline would truncate, or None.

    Args:
        pipe: a diffusers pipeline.
        prompts: prompts of the pipeline's calls.
        arguments: arguments of its calls.
    """
    limits = list(token_limits(pipe, arguments))
    if not limits:
        return None
    distinct = list(dict.fromkeys(prompts))
    counts = [token_counts(tokenizer, distinct) for tokenizer, _ in limits]
    cut_by = [{i for i, n in enumerate(own) if n > limit} for own, (_, limit) in zip(counts, limits, strict=True)]
    cut = sorted(set.intersection(*cut_by))
    if not cut:
        return None
    widest = max(range(len(limits)), key=lambda i: limits[i][1])
    tokenizer, limit = limits[widest]
    remedy = "shorten them"
    if limit != tokenizer.model_max_length:
        remedy += f", or give a larger {_SEQUENCE} (--argument {_SEQUENCE}=N) if the model was trained for it"
    return (
        f"{len(cut)} of {len(distinct)} prompts are longer than {type(pipe).__name__} keeps and would be cut off; the "
        f"first is {distinct[cut[0]]!r} with {counts[widest][cut[0]]} tokens where {limit} are kept; {remedy}"
    )


def check_prompt_lengths(pipe: Pipeline, prompts: Sequence[str] | None, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError with the text of `too_long`, if any."""
    problem = None if prompts is None else too_long(pipe, prompts, arguments)
    if problem is not None:
        raise ValueError(problem)
