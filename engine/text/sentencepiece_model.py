"""Turns a SentencePiece `tokenizer.model` (BPE) into what a tokenizer.json says, so that one library runs both.

Of all neighbours whose concatenation is a piece SentencePiece merges the pair with the best score first. The tokenizers
library wants the pairs listed in that order: every way to cut a piece into two pieces, best piece first. The file is a
protobuf message; the few fields that matter are read here.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

SPACE = "\u2581"
_BPE = 2


class PieceType(IntEnum):
    """SentencePiece's own numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a tokenizer.model says. `charsmap` is its compiled normalisation (empty: none)."""

    pieces: tuple[Piece, ...]
    model_type: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Read the message. Raises ValueError if it is none, or has no pieces."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append(Piece(text=piece[1].decode(), score=score, type=PieceType(piece.get(3, 1))))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (LookupError, TypeError, AttributeError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"not a SentencePiece model ({error})") from error
    if not pieces:
        raise ValueError("not a SentencePiece model (it has no pieces)")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=trainer.get(3, 1),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for varints, bytes for the other wire types."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"it ends within a field at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    if data[position] < 0x80:  # nearly all of them
        return data[position], position + 1
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than 64 bits at byte {position}")


def to_tokenizer_json(model: SentencePieceModel, added: Mapping[str, tuple[int | None, bool]]) -> dict[str, Any]:
    """The content of an equal tokenizer.json.

    `added` are the checkpoint's further tokens: text -> (id, None for one of the model's own; whether it is special).
    Raises ValueError for models of another kind than BPE, and for ids that are taken.
    """
    if model.model_type != _BPE:
        raise ValueError(f"SentencePiece model type {model.model_type} is not supported (supported: {_BPE}, BPE)")
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.type is PieceType.UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model, vocab, added),
        "normalizer": _normalizer(model),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type is PieceType.BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model),
        },
    }


def _added_tokens(
    model: SentencePieceModel, vocab: dict[str, int], added: Mapping[str, tuple[int | None, bool]]
) -> list[dict[str, Any]]:
    """Those that are found in a text whole; puts the ones that the model does not have into `vocab`."""
    special = {
        piece.text: piece.type is not PieceType.USER_DEFINED
        for piece in model.pieces
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
    }
    taken = {token_id: text for text, token_id in vocab.items()}
    for text, (token_id, is_special) in added.items():
        if text not in vocab:
            if token_id is None:
                continue  # a name in the configuration for a token that this vocabulary has not
            if token_id in taken:
                raise ValueError(f"added token {text!r} has id {token_id}, which is {taken[token_id]!r}")
            vocab[text], taken[token_id] = token_id, text
        special[text] = is_special or special.get(text, False)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    found = sorted((vocab[text], text) for text in special)
    return [{"id": token_id, "content": text, "special": special[text], **plain} for token_id, text in found]


def _merges(model: SentencePieceModel) -> list[list[str]]:
    rank = {piece.text: -piece.score for piece in model.pieces if piece.type is PieceType.NORMAL}
    place = {piece.text: index for index, piece in enumerate(model.pieces)}
    found = [
        (rank[text], place[text], place[text[:cut]], text[:cut], text[cut:])
        for text in rank
        for cut in range(1, len(text))
        if text[:cut] in rank and text[cut:] in rank
    ]
    return [[left, right] for *_, left, right in sorted(found)]


def _normalizer(model: SentencePieceModel) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        # spaces only: the library's Strip takes every kind of white space
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
