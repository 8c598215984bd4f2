"""Number words of both languages."""

from __future__ import annotations

import pytest

from engine.tiny.skills.number_words import in_chinese, in_english


@pytest.mark.parametrize(
    ("number", "english", "chinese"),
    [
        (0, "zero", "零"),
        (10, "ten", "十"),
        (17, "seventeen", "十七"),
        (40, "forty", "四十"),
        (99, "ninety-nine", "九十九"),
        (100, "one hundred", "一百"),
        (110, "one hundred ten", "一百一十"),
        (305, "three hundred five", "三百零五"),
        (1000, "one thousand", "一千"),
        (1005, "one thousand five", "一千零五"),
        (1050, "one thousand fifty", "一千零五十"),
        (4827, "four thousand eight hundred twenty-seven", "四千八百二十七"),
        (9010, "nine thousand ten", "九千零一十"),
    ],
)
def test_words_of_a_number(number: int, english: str, chinese: str) -> None:
    assert in_english(number) == english
    assert in_chinese(number) == chinese


def test_every_number_has_its_own_words() -> None:
    assert len({in_english(number) for number in range(10_000)}) == 10_000
    assert len({in_chinese(number) for number in range(10_000)}) == 10_000
