"""A checkpoint folder for the exact fake: a tokenizer whose every token is a piece of plain text, and nothing else.

So each generated token is text at once, which makes "one event per token" something that a client can count.
"""

from __future__ import annotations

import json
from pathlib import Path

VOCAB_SIZE = 512
_SPECIAL = ("<unk>", "<s>", "</s>")  # pad, bos, eos of the fake: it never draws the first two
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_SPACE = "\u0120"  # how a byte-level tokenizer writes a space
_TEMPLATE = (
    "{%- for message in messages -%}{{ message.role + ': ' + message.content + ' ' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)


def vocabulary() -> tuple[str, ...]:
    """Every token by id: the special ones, printable ASCII, then words of two or four letters after a space."""
    chars = [chr(code) for code in range(0x21, 0x7F)] + [_SPACE]
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    pairs = [first + second for first in syllables for second in syllables]
    words = [_SPACE + word for word in (*syllables, *pairs)]
    return (*_SPECIAL, *chars, *words)[:VOCAB_SIZE]


def words() -> tuple[str, ...]:
    """The words, without the space before them: one token each inside a text."""
    return tuple(token[1:] for token in vocabulary() if len(token) > 2 and token[0] == _SPACE)


def write_checkpoint(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and an empty config.json, which makes it a checkpoint."""
    vocab = {token: index for index, token in enumerate(vocabulary())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token) for index, token in enumerate(_SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "unk_token": "<unk>", "ignore_merges": True, "vocab": vocab, "merges": []},
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": _TEMPLATE}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config), ("config.json", {})):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _added(index: int, token: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": True, **flags}
