"""Key-value look-up in one long line: the long-context skill, where a wrong or stale KV block shows at once.

In training several questions follow on one list, so that its many tokens teach more than one answer, and half of them
want several pairs again, in another order: "lake=38, plant=40". There a value follows its key as it did in the list,
which is far easier to learn than the bare value, and leads to it. A held-out example
asks once, for one value. A key always follows punctuation and a space, so it has the same tokens in list and question.
"""

from __future__ import annotations

import random

from engine.tiny.skills.example import Draw, Example, Split, choose, turns
from engine.tiny.skills.words import WORDS

_QUESTION = (
    "Data: {pairs}. What is: {key}?",
    "List: {pairs}. Value: {key}?",
    "Remember: {pairs}. Find: {key}",
    "数据: {pairs}. 请问: {key}?",
    "列表: {pairs}. 查找: {key}",
)
_AGAIN = ("What is: {key}?", "And: {key}?", "Value: {key}?", "请问: {key}?", "查找: {key}")
_RECITE = ("Repeat: {keys}", "Again: {keys}", "重复: {keys}")
_MOST_RECITED = 8
_SEPARATORS = ("=", ": ")


def lookup(rng: random.Random, split: Split) -> Example:
    """2 pairs to as many as the split has; fewer are likelier."""
    number = round(2 * (split.most_pairs / 2) ** (rng.random() ** 0.7))
    return _example("lookup", rng, split, number, 1 if split.held_out else min(16, 3 + number // 2))


def lookup_of(num_pairs: int) -> Draw:
    """Lists of this length, one question."""

    def draw(rng: random.Random, split: Split) -> Example:
        return _example(f"lookup-{num_pairs}", rng, split, num_pairs, 1)

    return draw


def _example(skill: str, rng: random.Random, split: Split, num_pairs: int, num_questions: int) -> Example:
    while True:
        words = rng.sample(WORDS, num_pairs)
        values = [10 + int(rng.random() * 90) for _ in words]
        separator = choose(rng, _SEPARATORS)
        pairs = ", ".join([f"{word}{separator}{value}" for word, value in zip(words, values, strict=True)])
        if split.accepts(f"lookup {pairs}"):
            break
    asked = rng.choices(range(num_pairs), k=num_questions)
    first = choose(rng, _QUESTION).format(pairs=pairs, key=words[asked[0]])
    talk = [(first, str(values[asked[0]]))]
    for one in asked[1:]:
        if rng.random() < 0.5:
            some = rng.sample(range(num_pairs), rng.randint(1, min(_MOST_RECITED, num_pairs)))
            recited = ", ".join([f"{words[each]}{separator}{values[each]}" for each in some])
            talk.append((choose(rng, _RECITE).format(keys=", ".join([words[each] for each in some])), recited))
        else:
            talk.append((choose(rng, _AGAIN).format(key=words[one]), str(values[one])))
    return Example(skill=skill, messages=turns(*talk), answer=talk[-1][1], keys=(f"lookup {pairs}",))
