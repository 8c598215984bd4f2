"""Comparing two numbers and sorting a few."""

from __future__ import annotations

import random

from engine.tiny.skills.example import Example, Split, choose, single

_LARGER = (
    "Which is larger, {a} or {b}?",
    "Larger number: {a} or {b}?",
    "max({a}, {b})",
    "{a} 和 {b} 哪个大?",
    "比较 {a} 和 {b}, 大的是?",
)
_SMALLER = (
    "Which is smaller, {a} or {b}?",
    "Smaller number: {a} or {b}?",
    "min({a}, {b})",
    "{a} 和 {b} 哪个小?",
    "比较 {a} 和 {b}, 小的是?",
)
_IS_LARGER = (("Is {a} larger than {b}?", "yes", "no"), ("{a} 比 {b} 大吗?", "是", "不是"))
_UP = ("Sort: {list}", "Sort from small to large: {list}", "从小到大排序: {list}")
_DOWN = ("Sort from large to small: {list}", "从大到小排序: {list}")


def comparing(rng: random.Random, split: Split) -> Example:
    """Two different numbers below 1000: the larger, the smaller, or whether one is larger. Key: the two numbers."""
    while True:
        limit = 1000 if rng.random() < (0.4 if split.held_out else 0.55) else 100
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not split.held_out and rng.random() < 0.25:  # numbers of unlike length are rare otherwise
            a, b = (rng.randrange(choose(rng, (10, 100, 1000))) for _ in range(2))
        key = f"compare {min(a, b)} {max(a, b)}"
        if a != b and split.accepts(key):
            break
    kind = rng.random()
    if kind < 0.3:
        question, yes, no = choose(rng, _IS_LARGER)
        return single("comparing", question.format(a=a, b=b), yes if a > b else no, key)
    forms, answer = (_LARGER, max(a, b)) if kind < 0.65 else (_SMALLER, min(a, b))
    return single("comparing", choose(rng, forms).format(a=a, b=b), str(answer), key)


def sorting(rng: random.Random, split: Split) -> Example:
    """Three to five different two-digit numbers. Key: the set of them."""
    while True:
        numbers = rng.sample(range(10, 100), 3 + int(rng.random() * 3))
        key = f"sort {sorted(numbers)}"
        if split.accepts(key):
            break
    down = rng.random() < 0.35
    question = choose(rng, _DOWN if down else _UP).format(list=", ".join(map(str, numbers)))
    return single("sorting", question, ", ".join(map(str, sorted(numbers, reverse=down))), key)
