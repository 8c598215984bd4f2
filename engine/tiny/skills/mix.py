"""The training mix and the held-out sets.

Shares are of TOKENS, not of examples: a look-up in 200 pairs is as long as sixty sums. `training_examples` always draws
from the skill that is furthest behind its share, so the mix is kept over any stretch of a few hundred examples. What
counts as a token is a digit, a word, a Chinese character or a punctuation mark, whatever the tokenizer makes of them.
To give a skill more repetitions raise its number, or pass `shares`; only the ratios matter.
"""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engine.tiny.skills import arithmetic, facts, json_form, lookup, memory, number_words, order, sequences, talk, tools
from engine.tiny.skills.example import MAX_PAIRS, Draw, Example, Split

_HELD_OUT_SEED = 1_000_003
_MOST_REPEATS = 1500  # draws of known questions in a row: a finite skill has no more
_CONVERSATION = 0.12  # of the plain examples: this part becomes turns of one conversation
_MOST_TURNS = 3
_SWITCHED_OFF = 0.05  # of them: asked with thinking off, which must change nothing
_TOKEN = re.compile(r"[0-9]|[A-Za-z]+|[^\x00-\x7f]|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One skill's part of the training: `share` of the tokens, relative to all shares; `plain` may be joined."""

    draw: Draw
    share: float
    plain: bool = True


# Closed sets (facts, multiplication, number words, identity) need repetitions: each fact some dozens of times.
TRAINING_MIX: dict[str, Part] = {
    "addition": Part(draw=arithmetic.addition, share=10),
    "subtraction": Part(draw=arithmetic.subtraction, share=10),
    "long-addition": Part(draw=arithmetic.long_addition, share=1),
    "multiplication": Part(draw=arithmetic.multiplication, share=2),
    "thinking": Part(draw=arithmetic.thinking, share=3, plain=False),
    "no-thinking": Part(draw=arithmetic.no_thinking, share=1.5, plain=False),
    "comparing": Part(draw=order.comparing, share=17),
    "sorting": Part(draw=order.sorting, share=2),
    "copying": Part(draw=sequences.copying, share=8),
    "reversing": Part(draw=sequences.reversing, share=2),
    "counting": Part(draw=sequences.counting, share=40),
    "lookup": Part(draw=lookup.lookup, share=11, plain=False),
    "memory": Part(draw=memory.memory, share=11, plain=False),
    "small-talk": Part(draw=memory.small_talk, share=0.5, plain=False),
    "facts": Part(draw=facts.facts, share=7),
    "number-words": Part(draw=number_words.number_words, share=9),
    "json": Part(draw=json_form.json_form, share=11),
    "tools": Part(draw=tools.tools, share=9, plain=False),
    "identity": Part(draw=talk.identity, share=1.5),
    "unknown": Part(draw=talk.unknown, share=2),
}
_HELD_OUT: dict[str, Draw] = {
    **{name: part.draw for name, part in TRAINING_MIX.items() if name not in ("lookup", "small-talk", "tools")},
    "tool-call": tools.tool_call,
    "tool-result": tools.tool_result,
    **{f"lookup-{num_pairs}": lookup.lookup_of(num_pairs) for num_pairs in (16, 100, 200)},
}
SKILLS: tuple[str, ...] = tuple(_HELD_OUT)  # that can be asked


def training_examples(
    seed: int, most_pairs: int = MAX_PAIRS, shares: Mapping[str, float] | None = None
) -> Iterator[Example]:
    """Endless, the same for the same arguments; no held-out question ever occurs.

    most_pairs: of a list to look something up in. Long ones cost much and teach nothing while short ones do not work.
    shares: other shares than TRAINING_MIX has, by its names; may change while the examples are drawn, stays above 0.
    """
    rng = random.Random(seed)
    split = Split(held_out=False, most_pairs=most_pairs)
    behind = [(0.0, name) for name in TRAINING_MIX]  # (tokens so far / share, skill): a heap
    while True:
        done, name = behind[0]
        part = TRAINING_MIX[name]
        example = part.draw(rng, split)
        share = part.share if shares is None else shares.get(name, part.share)
        heapq.heapreplace(behind, (done + _tokens(example) / share, name))
        if part.plain and rng.random() < _CONVERSATION:
            for _ in range(1 + int(rng.random() * (_MOST_TURNS - 1))):
                example = _joined(example, TRAINING_MIX[rng.choice(_PLAIN)].draw(rng, split))
        if part.plain and rng.random() < _SWITCHED_OFF:
            example = replace(example, enable_thinking=False)
        yield example


def held_out(skill: str, count: int) -> list[Example]:
    """Up to `count` different questions that training never asks, always the same ones; fewer where there are fewer.

    Raises ValueError for a skill that is not in SKILLS.
    """
    if skill not in _HELD_OUT:
        raise ValueError(f"there is no skill {skill!r}; the skills are {', '.join(SKILLS)}")
    return _different(_HELD_OUT[skill], random.Random(f"{_HELD_OUT_SEED} {skill}"), count)


def held_out_lookups(num_pairs: int, count: int) -> list[Example]:
    """`held_out` of look-ups in lists of any length."""
    return _different(lookup.lookup_of(num_pairs), random.Random(f"{_HELD_OUT_SEED} {num_pairs} pairs"), count)


def _different(draw: Draw, rng: random.Random, count: int) -> list[Example]:
    found: dict[str, Example] = {}
    repeats = 0
    while len(found) < count and repeats < _MOST_REPEATS:
        example = draw(rng, Split(held_out=True))
        question = str(example.messages[:-1])
        repeats = repeats + 1 if question in found else 0
        found.setdefault(question, example)
    return list(found.values())


_PLAIN = [name for name, part in TRAINING_MIX.items() if part.plain]


def _joined(one: Example, other: Example) -> Example:
    """Two conversations as one: answers do not depend on unrelated turns before them."""
    return replace(other, messages=one.messages + other.messages, keys=one.keys + other.keys)


def _tokens(example: Example) -> int:
    """About as many as a tokenizer makes that has the words whole and digits single."""
    texts = [message.get("reasoning_content", "") + message["content"] for message in example.messages]
    if example.tools:
        texts.append(str(example.tools))
    return 4 * len(texts) + len(_TOKEN.findall("\n".join(texts)))
