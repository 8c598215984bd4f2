"""Bad words as token sequences: each word as the tokenizer writes it alone, and after a space."""

from __future__ import annotations

from collections.abc import Sequence

from engine.text.tokenizer import Tokenizer


def bad_token_sequences(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """SamplingParams.bad_token_sequences of these words. Raises ValueError for text that is not valid Unicode."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.strip(), " " + word.strip()):
            ids = tuple(tokenizer.encode(text, parse_special=False, add_special_tokens=False))
            if ids:
                sequences[ids] = None
    return tuple(sequences)
