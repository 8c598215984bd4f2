"""Numbers below 10,000 in English and Chinese words, both directions. Key: the number; those up to 100 are always
trained and never asked.
"""

from __future__ import annotations

import random

from engine.tiny.skills.example import Example, Split, choose, single
from engine.tiny.skills.words import listed

_ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = listed("- - twenty thirty forty fifty sixty seventy eighty ninety")
_DIGITS_ZH = "零一二三四五六七八九"
_ALWAYS_TRAINED = 100
_TO_ENGLISH = ("Write {n} in words.", "{n} in English words?", "How do you say {n} in English?", "{n} 用英语怎么说?")
_TO_CHINESE = ("Write {n} in Chinese.", "{n} 用中文怎么写?", "用汉字写 {n}", "{n} 的中文是什么?")
_FROM_ENGLISH = ("Write as a number: {w}", "Which number is {w}?", "In digits: {w}", "写成数字: {w}")
_FROM_CHINESE = ("Write as a number: {w}", "{w}是哪个数字?", "In digits: {w}", "写成数字: {w}")


def number_words(rng: random.Random, split: Split) -> Example:
    """Three and four digits, in training also fewer."""
    while True:
        number = _number(rng, split)
        key = f"number {number}"
        if (number <= _ALWAYS_TRAINED and not split.held_out) or split.accepts(key):
            break
    english = rng.random() < 0.5
    words = in_english(number) if english else in_chinese(number)
    if rng.random() < 0.5:
        forms, answer = _TO_ENGLISH if english else _TO_CHINESE, words
    else:
        forms, answer = _FROM_ENGLISH if english else _FROM_CHINESE, str(number)
    return single("number-words", choose(rng, forms).format(n=number, w=words), answer, key)


def in_english(number: int) -> str:
    """Words of 0 to 9999, American style: 4027 is four thousand twenty-seven."""
    assert 0 <= number < 10_000, "number words go to 9999"
    if number < 20:
        return _ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return _TENS[ten] + (f"-{_ONES[one]}" if one else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    return f"{_ONES[many]} {name}" + (f" {in_english(rest)}" if rest else "")


def in_chinese(number: int) -> str:
    """Characters of 0 to 9999: 4027 is si qian ling er shi qi; 12 is shi er, 112 yi bai yi shi er."""
    assert 0 <= number < 10_000, "number words go to 9999"
    if number == 0:
        return _DIGITS_ZH[0]
    text, gap = "", False
    for size, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, size)
        if digit == 0:
            gap = bool(text)
        else:
            text += (_DIGITS_ZH[0] if gap else "") + _DIGITS_ZH[digit] + unit
            gap = False
    return text.removeprefix("一") if text.startswith("一十") else text


def _number(rng: random.Random, split: Split) -> int:
    kind = rng.random()
    if not split.held_out and kind < 0.15:
        return int(rng.random() * (_ALWAYS_TRAINED + 1))
    if kind < 0.55:
        return 101 + int(rng.random() * 899)
    return 1000 + int(rng.random() * 9000)
