"""Streaming text equals whole text, and no character is ever shown in halves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer

SCRIPTS = st.text(st.sampled_from("aé ñ你好世界、🎉👨‍👩‍👧🇨🇳\n<>|ß"), max_size=40) | st.text(max_size=30)


def cuts(token_ids: list[int], seed: int) -> list[list[int]]:
    """The sequence in pieces of 0 to 3 tokens."""
    pieces, position, sizes = [], 0, random.Random(seed)
    while position < len(token_ids):
        size = sizes.randint(0, 3)
        pieces.append(token_ids[position : position + size])
        position += size
    return pieces


@settings(max_examples=80, deadline=None)
@given(text=SCRIPTS, seed=st.integers(0, 999))
def test_valid_text_streams_whole_and_without_replacement(tokenizer: Tokenizer, text: str, seed: int) -> None:
    text = text.replace("\ufffd", "")
    token_ids = tokenizer.encode(text, parse_special=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    deltas = [detokenizer.push(piece) for piece in cuts(token_ids, seed)]
    assert "".join(deltas) + detokenizer.flush() == tokenizer.decode(token_ids) == text
    assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=80, deadline=None)
@given(token_ids=st.lists(st.integers(0, 300), max_size=40), seed=st.integers(0, 999), skip=st.booleans())
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, token_ids: list[int], seed: int, skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    deltas = [detokenizer.push(piece) for piece in cuts(token_ids, seed)]
    assert "".join(deltas) + detokenizer.flush() == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", ["好", "🎉"])
def test_a_split_character_waits_for_its_last_byte(byte_folder: str, text: str) -> None:
    tokenizer = Tokenizer.load(byte_folder)
    detokenizer = IncrementalDetokenizer(tokenizer)
    *first, last = tokenizer.encode(text)
    assert [detokenizer.push([token]) for token in first] == [""] * len(first)
    assert detokenizer.push([last]) == text
    assert detokenizer.flush() == ""


def test_an_unfinished_character_shows_at_the_end_only(byte_folder: str) -> None:
    tokenizer = Tokenizer.load(byte_folder)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(tokenizer.encode("ok🎉")[:-1]) == "ok"
    assert detokenizer.flush() == "\ufffd"
