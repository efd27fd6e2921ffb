"""How much of a prompt a pipeline keeps, by its tokenizers and arguments."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from flowaccel.evaluation.samples.call_arguments import check_arguments, check_names
from flowaccel.evaluation.samples.prompt_lengths import check_prompt_lengths, token_limits, too_long
from flowaccel.training.text_to_image import word_tokenizer

CLIP = word_tokenizer(["red", "cat"], max_length=6)
LETTERS = tiny.letter_tokenizer()  # one token a letter and one for the end
LONG = "red red red red red"  # seven tokens for CLIP, twenty for the letters


class ClipOnly:
    """What `components` of a pipeline of CLIPs looks like; the encoders only have to be there."""

    def __init__(self, **components: Any) -> None:
        self.components = {"text_encoder": object(), "tokenizer": CLIP, **components}

    def __call__(self, prompt: str, negative_prompt: str = "") -> None: ...


class WithT5(ClipOnly):
    def __init__(self, encoder: Any = "a T5") -> None:
        super().__init__(text_encoder_2=encoder, tokenizer_2=LETTERS)

    def __call__(self, prompt: str, max_sequence_length: int = 12) -> None: ...


def test_clip_cuts_at_its_own_length() -> None:
    assert too_long(ClipOnly(), ["red cat", "red red red red"], {}) is None  # exactly six
    said = too_long(ClipOnly(), ["red cat", LONG, "cat", LONG, f"{LONG} cat"], {})
    assert said == (
        "2 of 4 prompts are longer than ClipOnly keeps and would be cut off; the first is "
        f"{LONG!r} with 7 tokens where 6 are kept; shorten them"
    )
    with pytest.raises(ValueError, match="2 of 4 prompts"):
        check_prompt_lengths(ClipOnly(), ["a", LONG, "b", f"{LONG} cat"], {})
    check_prompt_lengths(ClipOnly(), None, {})  # classes


def test_a_prompt_is_kept_where_one_encoder_keeps_it() -> None:
    letters = "red red red"  # twelve letters with the end
    clip_cuts = "c a t c a"
    assert too_long(WithT5(), [letters, clip_cuts], {}) is None
    said = too_long(WithT5(), [clip_cuts, LONG], {})
    assert said is not None and "1 of 2 prompts" in said
    assert "with 20 tokens where 12 are kept; shorten them, or give a larger max_sequence_length" in said
    assert too_long(WithT5(), [LONG], {"max_sequence_length": 20}) is None
    assert "where 19 are kept" in str(too_long(WithT5(), [LONG], {"max_sequence_length": 19}))


def test_an_encoder_that_is_not_there_keeps_nothing() -> None:
    said = too_long(WithT5(encoder=None), [LONG], {"max_sequence_length": 100})
    assert said is not None and "7 tokens where 6 are kept; shorten them" in said and "larger" not in said
    assert list(token_limits(WithT5(encoder=None), {})) == [(CLIP, 6)]


def test_pipelines_without_tokenizers_cut_nothing() -> None:
    assert too_long(tiny.sit_pipeline(), [LONG], {}) is None
    assert too_long(tiny.sd3_pipeline(), [LONG], {}) is None


def test_stock_pipelines_have_the_limits_that_their_code_uses() -> None:
    wan = tiny.wan_pipeline()
    assert [limit for _, limit in token_limits(wan, {})] == [512]
    assert [limit for _, limit in token_limits(wan, {"max_sequence_length": 9})] == [9]


def test_arguments_of_a_call() -> None:
    check_arguments(ClipOnly(), {"negative_prompt": "dog"})
    with pytest.raises(
        ValueError, match=r"ClipOnly does not take the argument 'negative'.*arguments are prompt, negat"
    ):
        check_arguments(ClipOnly(), {"negative": "dog"})
    for value in (object(), float("inf"), {1, 2}):
        with pytest.raises(ValueError, match="'negative_prompt' must be a plain number"):
            check_names({"negative_prompt": value})
    with pytest.raises(ValueError, match=r"'generator' is set by flowaccel; use --seed \(seed=\)"):
        check_arguments(ClipOnly(), {"generator": 3})
