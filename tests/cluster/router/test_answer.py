"""Tokens to text: split characters, stop strings, stop tokens, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.router.answer import ChoiceText, Delta
from cluster.types import Tokens
from engine.request import FinishReason, SamplingParams
from engine.scheduler.batch import TokenLogprobs
from engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


def arrival(ids: list[int], reason: str | None = None, stop_token: int | None = None, **more: Any) -> Tokens:
    finish = None if reason is None else FinishReason(reason)
    return Tokens(
        request_id="r", attempt=1, choice=0, position=0, token_ids=tuple(ids), finish_reason=finish,
        stop_token=stop_token, **more,
    )  # fmt: skip


def feed(
    tokenizer: Tokenizer, text: str, params: SamplingParams, end: str = "length"
) -> tuple[ChoiceText, list[Delta]]:
    """One token per arrival."""
    choice, ids = ChoiceText(0, params, tokenizer), tokenizer.encode(text)
    deltas = [choice.add(arrival([token], end if n == len(ids) - 1 else None)) for n, token in enumerate(ids)]
    return choice, [delta for delta in deltas if delta is not None]


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    _, deltas = feed(tokenizer, "a\u4f60\U0001f600b", SamplingParams())
    assert [delta.text for delta in deltas] == ["a", "\u4f60", "\U0001f600", "b"]
    assert deltas[-1].finish_reason == "length"


def test_a_character_that_is_never_completed_is_told_at_the_end(tokenizer: Tokenizer) -> None:
    choice, ids = ChoiceText(0, SamplingParams(), tokenizer), tokenizer.encode("\u4f60")
    assert choice.add(arrival(ids[:1])) is None
    delta = choice.add(arrival(ids[1:2], "length"))
    assert delta is not None and delta.text == "\ufffd"


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer: Tokenizer) -> None:
    choice, deltas = feed(tokenizer, "one STOP two", SamplingParams(stop=("STOP",)))
    assert "".join(delta.text for delta in deltas) == "one "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "STOP")
    assert choice.num_tokens == len("one STOP")  # the client pays up to the token that ended it


def test_text_that_only_began_like_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    _, deltas = feed(tokenizer, "one STO", SamplingParams(stop=("STOP",)))
    assert "".join(delta.text for delta in deltas) == "one STO"
    assert deltas[-1].finish_reason == "length"


def test_the_stop_string_that_is_complete_first_is_named(tokenizer: Tokenizer) -> None:
    _, deltas = feed(tokenizer, "xxabc", SamplingParams(stop=("abc", "b", "zz")))
    assert "".join(delta.text for delta in deltas) == "xxa"
    assert deltas[-1].stop_reason == "b"


def test_before_min_tokens_nothing_stops(tokenizer: Tokenizer) -> None:
    choice, deltas = feed(tokenizer, "a.b.c.d", SamplingParams(stop=(".",), min_tokens=3))
    assert "".join(delta.text for delta in deltas) == "a.b"
    assert choice.num_tokens == 4


def test_what_comes_after_a_stop_is_dropped(tokenizer: Tokenizer) -> None:
    choice = ChoiceText(0, SamplingParams(stop=("b",)), tokenizer)
    ids = tokenizer.encode("abcd")
    delta = choice.add(arrival(ids, "length"))
    assert delta is not None and (delta.text, delta.finish_reason) == ("a", "stop")
    assert choice.add(arrival(ids)) is None
    assert choice.num_tokens == 2


def test_the_end_token_counts_but_is_no_text(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_ids[0]
    choice = ChoiceText(0, SamplingParams(skip_special_tokens=False), tokenizer)
    delta = choice.add(arrival([*tokenizer.encode("ok"), eos], "stop", eos))
    assert delta is not None and (delta.text, delta.stop_reason) == ("ok", None)
    assert choice.num_tokens == 3


def test_a_stop_token_that_the_client_named_is_the_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok!")
    choice = ChoiceText(0, SamplingParams(stop_token_ids=(ids[-1],)), tokenizer)
    delta = choice.add(arrival(ids, "stop", ids[-1]))
    assert delta is not None and (delta.text, delta.stop_reason) == ("ok", ids[-1])


def test_special_tokens_are_shown_only_when_asked(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    for skip, text in ((True, "a"), (False, "a" + tokenizer.token_bytes.piece(special).decode())):
        choice = ChoiceText(0, SamplingParams(skip_special_tokens=skip), tokenizer)
        delta = choice.add(arrival([*tokenizer.encode("a"), special], "length"))
        assert delta is not None and delta.text == text


def test_logprobs_follow_the_tokens_that_are_text(tokenizer: Tokenizer) -> None:
    eos, ids = tokenizer.eos_token_ids[0], tokenizer.encode("ok")
    entries = tuple(TokenLogprobs(logprob=-float(n), top_ids=(), top_logprobs=()) for n in range(3))
    choice = ChoiceText(0, SamplingParams(logprobs=0), tokenizer)
    delta = choice.add(arrival([*ids, eos], "stop", eos, logprobs=entries))
    assert delta is not None and delta.tokens == list(zip(ids, entries, strict=False))
