"""What a skill makes: a conversation whose last message is the answer, and the keys of the questions in it.

A question is held out, or trained, by its key alone (`is_held_out`), so the two sets are disjoint by construction.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

MAX_PAIRS = 200  # of a list to look something up in
_HELD_OUT_OF = 10  # one question in ten is held out

T = TypeVar("T")
Check = Literal["text", "json", "tool_call"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A conversation to learn from, or, without its last message, a question to ask.

    messages: in OpenAI's form; the last one is the assistant's answer. Earlier assistant messages are right as well.
    tools: OpenAI function tools for the chat template. enable_thinking: None is not given to the template.
    answer: what `is_correct` compares with (not the reasoning). keys: of every question in it; see `is_held_out`.
    """

    skill: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    keys: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()
    enable_thinking: bool | None = None
    check: Check = "text"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which questions may be drawn: the held-out ones or the others. `most_pairs`: of a training list."""

    held_out: bool
    most_pairs: int = MAX_PAIRS

    def accepts(self, key: str) -> bool:
        """Whether the question of this key belongs to this split."""
        return is_held_out(key) == self.held_out

    def pick(self, rng: random.Random, count: int, held_out: int) -> int:
        """One of `count` phrasings, of which the one numbered `held_out` is never trained and the only one asked."""
        if self.held_out:
            return held_out
        drawn = rng.randrange(count - 1)
        return drawn + 1 if drawn >= held_out else drawn


# draws an example of one skill; a skill of several lengths asks the split
Draw = Callable[[random.Random, Split], Example]


def is_held_out(key: str) -> bool:
    """The same for ever and everywhere: from the key's digest."""
    return stable_number(key) % _HELD_OUT_OF == 0


def stable_number(key: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def turns(*pairs: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    """Messages of (user, assistant) pairs."""
    return tuple(
        message
        for user, assistant in pairs
        for message in ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    )


def single(skill: str, question: str, answer: str, key: str) -> Example:
    """One question and its answer, checked as text."""
    return Example(skill=skill, messages=turns((question, answer)), answer=answer, keys=(key,))


def choose(rng: random.Random, options: Sequence[T]) -> T:
    """One of them, evenly (`random.choice`, at half its cost)."""
    return options[int(rng.random() * len(options))]
