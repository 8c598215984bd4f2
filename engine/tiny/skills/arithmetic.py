"""Sums, differences, small products, and sums of three numbers with and without thinking.

One-digit operands are always trained; a key has its operands in order, so 17 + 25 is held out with 25 + 17.
"""

from __future__ import annotations

import random
from dataclasses import replace

from engine.tiny.skills.example import Example, Split, choose, is_held_out, single, stable_number, turns

_SUM = (
    "{a} + {b} = ?",
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "{a}+{b}=",
    "{a} + {b} 等于多少?",
    "计算 {a} + {b}",
)
_DIFFERENCE = (
    "{a} - {b} = ?",
    "What is {a} - {b}?",
    "Subtract {b} from {a}.",
    "{a}-{b}=",
    "{a} - {b} 等于多少?",
    "计算 {a} - {b}",
)
_PRODUCT = (
    "{a} * {b} = ?",
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "{a}*{b}=",
    "{a} 乘以 {b} 等于多少?",
    "计算 {a} * {b}",
)
_SUM_OF_THREE = (
    "{a} + {b} + {c} = ?",
    "What is {a} + {b} + {c}?",
    "Add {a}, {b} and {c}.",
    "{a} + {b} + {c} 等于多少?",
    "计算 {a} + {b} + {c}",
)
_THINKING_LIMIT, _DIRECT_LIMIT = 50, 10


def addition(rng: random.Random, split: Split) -> Example:
    """Two-digit sums; in training one in eight has one-digit operands only."""
    while True:
        a, b = _operands(rng, split)
        key = sum_key(a, b)
        if _trained(a, b, split) or split.accepts(key):
            return single("addition", choose(rng, _SUM).format(a=a, b=b), str(a + b), key)


def subtraction(rng: random.Random, split: Split) -> Example:
    """Two-digit differences, never negative."""
    while True:
        one, other = _operands(rng, split)
        a, b = max(one, other), min(one, other)
        key = f"{a}-{b}"
        if _trained(a, b, split) or split.accepts(key):
            return single("subtraction", choose(rng, _DIFFERENCE).format(a=a, b=b), str(a - b), key)


def long_addition(rng: random.Random, split: Split) -> Example:
    """Three-digit sums."""
    while True:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        key = sum_key(a, b)
        if split.accepts(key):
            return single("long-addition", choose(rng, _SUM).format(a=a, b=b), str(a + b), key)


def multiplication(rng: random.Random, split: Split) -> Example:
    """The table up to 10 x 10. It can only be known by heart: a product in one of its phrasings is held out."""
    a, b = rng.randrange(11), rng.randrange(11)
    form = split.pick(rng, len(_PRODUCT), stable_number(f"{a}*{b}") % len(_PRODUCT))
    return single("multiplication", _PRODUCT[form].format(a=a, b=b), str(a * b), f"{a}*{b} as {form}")


def thinking(rng: random.Random, split: Split) -> Example:
    """A sum of three numbers, step by step inside <think>; in training one in four of two.

    Training shows no step that is a held-out sum.
    """
    while True:
        if not split.held_out and rng.random() < 0.25:
            example = addition(rng, split)
            steps = f"{example.keys[0].replace('+', ' + ')} = {example.answer}"
            messages = (example.messages[0], {**example.messages[1], "reasoning_content": steps})
            return replace(example, skill="thinking", messages=messages, enable_thinking=True)
        a, b, c = (rng.randrange(1, _THINKING_LIMIT) for _ in range(3))
        key = f"{a}+{b}+{c}"
        if not split.held_out and (_is_hidden_sum(a, b) or _is_hidden_sum(a + b, c)):
            continue
        if split.accepts(key):
            steps = f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}"
            return _sum_of_three("thinking", rng, (a, b, c), key, steps)


def no_thinking(rng: random.Random, split: Split) -> Example:
    """A sum of three one-digit numbers, straight away: thinking is switched off, or in training not mentioned."""
    while True:
        a, b, c = (rng.randrange(1, _DIRECT_LIMIT) for _ in range(3))
        key = f"{a}+{b}+{c}"
        if split.accepts(key):
            example = _sum_of_three("no-thinking", rng, (a, b, c), key, None)
            return example if split.held_out or rng.random() < 0.5 else replace(example, enable_thinking=None)


def sum_key(a: int, b: int) -> str:
    """The key of a + b and b + a."""
    return f"{min(a, b)}+{max(a, b)}"


def _is_hidden_sum(a: int, b: int) -> bool:
    return max(a, b) >= 10 and is_held_out(sum_key(a, b))


def _operands(rng: random.Random, split: Split) -> tuple[int, int]:
    if not split.held_out and rng.random() < 0.125:
        return rng.randrange(10), rng.randrange(10)
    return rng.randrange(10, 100), rng.randrange(10, 100) if rng.random() < 0.85 else rng.randrange(1, 10)


def _trained(a: int, b: int, split: Split) -> bool:
    return not split.held_out and a < 10 and b < 10


def _sum_of_three(
    skill: str, rng: random.Random, numbers: tuple[int, int, int], key: str, steps: str | None
) -> Example:
    a, b, c = numbers
    answer = str(a + b + c)
    messages = turns((choose(rng, _SUM_OF_THREE).format(a=a, b=b, c=c), answer))
    if steps is not None:
        messages[-1]["reasoning_content"] = steps
    return Example(skill=skill, messages=messages, answer=answer, keys=(key,), enable_thinking=steps is not None)
