"""Trains the tokenizer: byte-level BPE with ERNIE's special tokens, on texts that the skills make.

How text is cut before merging makes answers easy to learn: a digit and a Chinese character are always tokens of their
own, and words take the space before them. "Assistant: " is cut off with its space, so encoding the pieces of a
conversation one by one is the same as encoding the whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.tiny.byte_tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS, write_tokenizer_settings

_PIECES = (
    r"Assistant: |User: |\n+|\p{N}|\p{Han}| ?[A-Za-z]+| ?[^\s\p{L}\p{N}]+(?: (?![A-Za-z]))?|[^\s\p{N}\p{Han}A-Za-z]+"
    r"|\s+(?!\S)|\s+"
)
_HAN = re.compile("[\u4e00-\u9fff]")
_HAN_COUNT = 2000  # as if each occurred that often: its bytes are merged before rare words


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens, the special ones at the ids of the checkpoints of this folder."""
    added = (*SPECIAL_TOKENS, *MARKUP_TOKENS)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _cutting()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_with_every_character(texts, added), trainer)
    learned = json.loads(learner.to_str())["model"]
    by_id = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {token: index for index, token in enumerate((*added, *by_id))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]]))
    tokenizer.pre_tokenizer = _cutting()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Greedy unless a request asks otherwise: it was trained to give one right answer.
    write_tokenizer_settings(folder, chat_template, {"do_sample": False, "temperature": 0.0})


def _cutting() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_every_character(texts: Iterable[str], added: tuple[str, ...]) -> Iterator[str]:
    """The texts without control tokens, then every Chinese character that they hold, often."""
    cut = re.compile("|".join(map(re.escape, added)))
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(_HAN.findall(text))
        yield from (part for part in cut.split(text) if part)
    for character in sorted(seen):
        yield character * _HAN_COUNT
