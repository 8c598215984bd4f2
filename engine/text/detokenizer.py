"""Token ids to text while they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from engine.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one growing sequence: all deltas and the flush together equal `Tokenizer.decode` of all ids.

    A character split over tokens is held back until its last byte. Cost per token doesn't grow with the sequence.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = self._token_bytes.drop_leading_space

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete (may be empty)."""
        data = b"".join([self._token_bytes.piece(token) for token in token_ids if token not in self._skip])
        if data and self._drops_space:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else nothing."""
        return self._decoder.decode(b"", final=True)
