"""Copying, reversing and counting. Lines and commas without spaces keep a word's tokens the same wherever it stands, in
the question as in the answer. Key: the sequence.

How often one letter stands in a line is asked in training of all three letters of the line, one by one and several at
once ("k=3, b=1"): with the letter before its number it is far easier to learn, and leads to the bare number.
"""

from __future__ import annotations

import random

from engine.tiny.skills.example import Example, Split, choose, is_held_out, single, turns
from engine.tiny.skills.words import LETTERS, WORDS, WORDS_ZH

_COPY = ("Copy:\n{line}", "Repeat this line:\n{line}", "Say exactly:\n{line}", "复制:\n{line}", "重复这一行:\n{line}")
_REVERSE = ("Reverse:\n{line}", "Write this backwards:\n{line}", "Reverse the order:\n{line}", "倒序:\n{line}")
_COUNT = (
    "How many items?\n{line}",
    "Count the items:\n{line}",
    "Count:\n{line}",
    "一共有几个?\n{line}",
    "数一数:\n{line}",
)
_COUNT_ONE = (
    "How often: {one}? Line: {line}",
    "Count only: {one}. Line: {line}",
    "出现几次: {one}? 一行: {line}",
)
_AND_ONE = ("And: {one}?", "How often: {one}?", "出现几次: {one}?")
_COUNT_EACH = ("Count each: {some}", "各出现几次: {some}")
_MAX_ITEMS = 20


def copying(rng: random.Random, split: Split) -> Example:
    """Words, letters or digits, 2 to 12 of them."""
    while True:
        line = _line(rng, 2 + int(rng.random() * 11), " " if rng.random() < 0.6 else ",")
        if split.accepts(f"copy {line}"):
            return single("copying", choose(rng, _COPY).format(line=line), line, f"copy {line}")


def reversing(rng: random.Random, split: Split) -> Example:
    """Words, letters or digits, 2 to 6 of them, and their reverse."""
    while True:
        line = _line(rng, 2 + int(rng.random() * 5), ",")
        if split.accepts(f"reverse {line}"):
            answer = ",".join(reversed(line.split(",")))
            return single("reversing", choose(rng, _REVERSE).format(line=line), answer, f"reverse {line}")


def counting(rng: random.Random, split: Split) -> Example:
    """Items of a list (1 to 20), or how often one letter stands in a line of up to 15."""
    while True:
        all_of_them = rng.random() < (0.6 if split.held_out else 0.25)  # counting one letter is the harder half
        example = _count_all(rng) if all_of_them else _count_one(rng, split)
        if all(map(split.accepts, example.keys)):
            return example


def _count_all(rng: random.Random) -> Example:
    number = 1 + int(rng.random() * _MAX_ITEMS)
    kind = rng.random()
    pool = WORDS if kind < 0.6 else (WORDS_ZH if kind < 0.8 else LETTERS)
    line = ", ".join(choose(rng, pool) for _ in range(number))
    return single("counting", choose(rng, _COUNT).format(line=line), str(number), f"count {line}")


def _count_one(rng: random.Random, split: Split) -> Example:
    one, other, third = rng.sample(LETTERS, 3)
    length = 1 + int(rng.random() * 15)
    number = int(rng.random() * (min(length, 9) + 1))
    letters = [one] * number + [choose(rng, (other, third)) for _ in range(length - number)]
    rng.shuffle(letters)
    line = ", ".join(letters)
    talk = [(choose(rng, _COUNT_ONE).format(one=one, line=line), str(number))]
    asked = [one]
    if not split.held_out:
        asked = [each for each in (one, other, third) if not is_held_out(f"count {each} in {line}")]
        for _ in range(2 if one in asked else 0):
            some = rng.sample(asked, 1 + int(rng.random() * len(asked)))
            each = ", ".join(f"{letter}={letters.count(letter)}" for letter in some)
            talk.append((choose(rng, _COUNT_EACH).format(some=", ".join(some)), each))
            letter = choose(rng, asked)
            talk.append((choose(rng, _AND_ONE).format(one=letter), str(letters.count(letter))))
    keys = tuple(f"count {letter} in {line}" for letter in dict.fromkeys([one, *asked]))
    return Example(skill="counting", messages=turns(*talk), answer=talk[-1][1], keys=keys)


def _line(rng: random.Random, number: int, separator: str) -> str:
    kind = rng.random()
    if kind < 0.45:
        pool: tuple[str, ...] | str = WORDS
    elif kind < 0.65:
        pool = WORDS_ZH
    else:
        pool = LETTERS if kind < 0.85 else "0123456789"
    return separator.join(choose(rng, pool) for _ in range(number))
