"""The trained tokenizer: what is one token, ids that are known, and pieces of a conversation against the whole."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer as RawTokenizer

from engine.text.tokenizer import Tokenizer
from engine.tiny.skills import CHAT_TEMPLATE, SKILLS, held_out, segments, training_examples
from engine.tiny.training.tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def loaded(small_tokenizer: RawTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(small_tokenizer, folder, CHAT_TEMPLATE)
    return Tokenizer.load(folder)


def test_digits_and_chinese_characters_are_single_tokens(loaded: Tokenizer) -> None:
    assert len(loaded.encode("2024")) == 4
    assert len(loaded.encode("计算")) == 2
    assert loaded.encode("7")[0] in loaded.encode("Add 17")


def test_any_text_comes_back(loaded: Tokenizer) -> None:
    for text in ("a  b\n\n c", "Zürich 龘 🎉\t", ' {"x": [1, 2]}', "½ ٣ \u00ad\x00"):
        assert loaded.decode(loaded.encode(text)) == text


def test_special_tokens_have_their_ids(loaded: Tokenizer) -> None:
    assert [loaded.encode(token) for token in ("<unk>", "<s>", "</s>")] == [[0], [1], [2]]
    for markup in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|end_of_sentence|>"):
        assert len(loaded.encode(markup)) == 1
    assert loaded.decode(loaded.encode("<think>a</think><|end_of_sentence|>")) == "<think>a</think>"


def test_pieces_of_a_conversation_are_encoded_as_the_whole(loaded: Tokenizer) -> None:
    training = itertools.islice(training_examples(11), 300)
    asked = (example for skill in SKILLS for example in held_out(skill, 4))
    for example in itertools.chain(training, asked):
        pieces = [text for text, _ in segments(example)]
        one_by_one = [token for text in pieces for token in loaded.encode(text)]
        assert one_by_one == loaded.encode("".join(pieces)), pieces
