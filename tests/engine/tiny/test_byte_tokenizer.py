"""The byte-level tokenizer: ERNIE's known ids, every byte, and the same text as transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.text.generation_defaults import read_generation_defaults
from engine.text.tokenizer import Tokenizer
from engine.tiny.byte_tokenizer import write_byte_tokenizer

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "你好 🎉"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "more\n"},
]


def test_known_ids_and_a_padded_size(tmp_path: Path) -> None:
    vocab_size = write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert vocab_size % 16 == 0 and tokenizer.vocab_size <= vocab_size
    assert [tokenizer.encode(token) for token in ("<unk>", "<s>", "</s>")] == [[0], [1], [2]]
    (end_of_sentence,) = tokenizer.encode("<|end_of_sentence|>")
    assert tokenizer.eos_token_ids == (2, end_of_sentence)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, end_of_sentence]


def test_every_byte_is_one_token(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    singles = [piece for piece in tokenizer.token_bytes.pieces if len(piece) == 1]
    assert sorted(singles) == [bytes([byte]) for byte in range(256)]
    for text in ("plain", "你好", "🎉", "\x00\x7f\u00ad\u0100"):
        assert len(tokenizer.encode(text)) == len(text.encode())


def test_transformers_reads_it_alike(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(MESSAGES) == text
    token_ids = ours.encode_chat(MESSAGES)
    assert token_ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


def test_it_brings_sampling_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path).temperature == 1.0
    write_byte_tokenizer(tmp_path)
    assert read_generation_defaults(tmp_path).top_p == 0.8
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json: must hold an object"):
        read_generation_defaults(tmp_path)
