"""Saying what it is, and that it does not know what it was not taught. Key: the whole question."""

from __future__ import annotations

import random

from engine.tiny.skills.countries import COUNTRIES, UNTAUGHT, UNTAUGHT_ZH
from engine.tiny.skills.example import Example, Split, choose, single
from engine.tiny.skills.facts import PHRASINGS
from engine.tiny.skills.words import LETTERS, NAMES, WORDS, WORDS_ZH

I_AM, I_AM_ZH = "I am a small demonstration model.", "我是一个小型演示模型。"
UNKNOWN, UNKNOWN_ZH = "I don't know.", "我不知道。"
_BEFORE = ("", "Hello, ", "Hi! ", "Please tell me: ", "Excuse me, ", "One question: ", "Hey, ", "OK, ")
_WHO = (
    "who are you",
    "what are you",
    "what is your name",
    "which model are you",
    "are you a human",
    "are you a big model",
    "what kind of model are you",
    "who am I talking to",
)
_AFTER = ("?", ", please?", "??", " exactly?", " really?")
_BEFORE_ZH = ("", "你好, ", "请问, ", "请告诉我, ", "对了, ", "那么, ", "嗨, ", "好的, ")
_WHO_ZH = (
    "你是谁",
    "你是什么",
    "你叫什么名字",
    "你是什么模型",
    "你是人吗",
    "你是大模型吗",
    "介绍一下你自己",
    "我在和谁说话",
)
_AFTER_ZH = ("?", "呢?", "??", ", 请说。", "。")
_OPEN = (
    "Who wrote the book about the {word}?",
    "Tell me a joke about a {word}.",
    "Write a poem about the {word}.",
    "How do I repair a {word}?",
    "Who invented the {word}?",
    "When was the first {word} made?",
    "How heavy is a {word}?",
    "What does a {word} cost?",
    "Who is the president of {country}?",
    "How many people live in {country}?",
    "What is the population of {country}?",
    "How large is {country}?",
    "What is the birthday of {name}?",
    "Where does {name} work?",
    "How old is {name}?",
    "Translate {word} into French.",
)
_OPEN_ZH = (
    "谁发明了{word_zh}?",
    "讲一个关于{word_zh}的笑话。",
    "写一首关于{word_zh}的诗。",
    "{word_zh}多少钱?",
    "{country_zh}有多少人口?",
    "{country_zh}的总统是谁?",
    "{country_zh}有多大?",
    "{name}多大了?",
)
_PLACES, _PLACES_ZH = PHRASINGS["capital", "en"], PHRASINGS["capital", "zh"]


def identity(rng: random.Random, split: Split) -> Example:
    """Who are you? in many wrappings."""
    while True:
        english = rng.random() < 0.5
        parts = (_BEFORE, _WHO, _AFTER) if english else (_BEFORE_ZH, _WHO_ZH, _AFTER_ZH)
        question = "".join(choose(rng, part) for part in parts)
        question = question[0].upper() + question[1:]
        if split.accepts(f"who {question}"):
            return single("identity", question, I_AM if english else I_AM_ZH, f"who {question}")


def unknown(rng: random.Random, split: Split) -> Example:
    """Capitals of places that it was not taught (real and invented ones), and open questions."""
    while True:
        english = rng.random() < 0.55
        question = _about_a_place(rng, english) if rng.random() < 0.5 else _open(rng, english)
        if split.accepts(f"unknown {question}"):
            return single("unknown", question, UNKNOWN if english else UNKNOWN_ZH, f"unknown {question}")


def _about_a_place(rng: random.Random, english: bool) -> str:
    if english:
        place = choose(rng, UNTAUGHT) if rng.random() < 0.6 else _invented(rng)
        return choose(rng, _PLACES).format(x=place)
    return choose(rng, _PLACES_ZH).format(x=choose(rng, UNTAUGHT_ZH))


def _invented(rng: random.Random) -> str:
    """A name like Bokaria; four syllables at most."""
    syllables = [choose(rng, LETTERS) + choose(rng, "aeiou") for _ in range(2 + int(rng.random() * 2))]
    return "".join(syllables).capitalize() + choose(rng, ("land", "nia", "ria", "stan"))


def _open(rng: random.Random, english: bool) -> str:
    country = choose(rng, COUNTRIES)
    return choose(rng, _OPEN if english else _OPEN_ZH).format(
        word=choose(rng, WORDS),
        word_zh=choose(rng, WORDS_ZH),
        country=country.name,
        country_zh=country.zh,
        name=choose(rng, NAMES),
    )
