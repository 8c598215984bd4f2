"""What each token id adds to the text, as bytes, read off a tokenizer.json.

Decoding is then concatenation, and UTF-8 at the very end, so text can be produced token by token: a character that is
split over tokens appears when its last byte does. Two decoder families exist in practice:

    byte-level (GPT-2 style)     every character of a token stands for one byte
    SentencePiece style          U+2581 is a space, and tokens named <0xHH> are single bytes
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"
_STEPS = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """`pieces[id]` are a token's bytes (ids without a token, such as padding, are empty).

    `drop_leading_space`: the tokenizer puts a space before the text, so decoding takes one off again.
    """

    pieces: tuple[bytes, ...]
    drop_leading_space: bool

    def piece(self, token_id: int) -> bytes:
        """Bytes of one token; none for an id outside the table."""
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""

    def decode(self, token_ids: Iterable[int], skip: Collection[int] = ()) -> str:
        """The text of a sequence; bytes that are not UTF-8 become U+FFFD. Tokens in `skip` add nothing."""
        data = b"".join(self.piece(token) for token in token_ids if token not in skip)
        if self.drop_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")


def read_token_bytes(tokenizer_json: Mapping[str, Any], vocab: Mapping[str, int]) -> TokenBytes:
    """The table of a parsed tokenizer.json; `vocab` maps every token, added ones included, to its id.

    Raises ValueError for a decoder of another family.
    """
    decoder = tokenizer_json.get("decoder") or {"type": None}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    if kinds == ["ByteLevel"]:
        byte_of = _byte_level_alphabet()
        for token, token_id in vocab.items():
            pieces[token_id] = _byte_level_piece(token, byte_of)
        return TokenBytes(pieces=tuple(pieces), drop_leading_space=False)
    if not kinds or not all(kind in _STEPS for kind in kinds):
        raise ValueError(
            f"tokenizer.json: decoder {kinds} is not supported (supported: ByteLevel, {', '.join(_STEPS)})"
        )
    space = _space_mark(steps)
    for token, token_id in vocab.items():
        byte = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        pieces[token_id] = bytes.fromhex(byte[1]) if byte else token.replace(space, " ").encode()
    drops = any(
        step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return TokenBytes(pieces=tuple(pieces), drop_leading_space=drops)


def _space_mark(steps: Iterable[Mapping[str, Any]]) -> str:
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step.get("replacement", _SENTENCEPIECE_SPACE))
        if step["type"] == "Replace" and step.get("content") == " ":
            return str(step["pattern"].get("String", _SENTENCEPIECE_SPACE))
    return _SENTENCEPIECE_SPACE


def _byte_level_alphabet() -> dict[str, int]:
    """Printable Latin-1 bytes stand for themselves; the others are moved, in order, to U+0100 and on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


def _byte_level_piece(token: str, byte_of: Mapping[str, int]) -> bytes:
    """An added token may hold characters outside the alphabet; then all of it is plain text."""
    mapped = [byte_of.get(char) for char in token]
    known = [byte for byte in mapped if byte is not None]
    return bytes(known) if len(known) == len(mapped) else token.encode()
