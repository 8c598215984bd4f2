"""Remembering what was told some turns ago: a name, a number, a city, with small talk in between.

Key: the number itself; for names and cities, which are few, the whole conversation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine.tiny.skills.countries import COUNTRIES
from engine.tiny.skills.example import Example, Split, choose, turns
from engine.tiny.skills.words import NAMES, NAMES_ZH

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("Good morning!", "Good morning!"),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("It is a nice day.", "Yes, it is."),
    ("I like music.", "That is nice."),
    ("I am tired.", "Take a rest."),
    ("I had lunch.", "I hope it was good."),
    ("Just a moment.", "OK."),
    ("Goodbye!", "Goodbye!"),
)
SMALL_TALK_ZH = (
    ("你好!", "你好! 有什么可以帮你?"),
    ("你好", "你好! 有什么可以帮你?"),
    ("你好吗?", "我很好, 谢谢。"),
    ("早上好!", "早上好!"),
    ("谢谢。", "不客气。"),
    ("谢谢你!", "不客气。"),
    ("今天天气不错。", "是的。"),
    ("我喜欢音乐。", "很好。"),
    ("我累了。", "休息一下吧。"),
    ("我吃过午饭了。", "希望很好吃。"),
    ("等一下。", "好的。"),
    ("再见!", "再见!"),
)
_CITIES = tuple(country.capital for country in COUNTRIES)
_CITIES_ZH = tuple(country.capital_zh for country in COUNTRIES)
_MOST_TURNS_BETWEEN = 4


@dataclass(frozen=True, kw_only=True)
class _Thing:
    """What can be told: (statement, reply) and questions with the answer, each with {x}."""

    statements: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    answer: str


_ENGLISH = {
    "name": _Thing(
        statements=(
            ("My name is {x}.", "Nice to meet you, {x}."),
            ("I am {x}.", "Hello, {x}."),
            ("Call me {x}.", "OK, {x}."),
        ),
        questions=("What is my name?", "Who am I?", "Do you remember my name?"),
        answer="Your name is {x}.",
    ),
    "number": _Thing(
        statements=(
            ("Remember the number {x}.", "OK."),
            ("My number is {x}.", "OK, I remember it."),
            ("The code is {x}.", "OK, the code is {x}."),
        ),
        questions=("What was the number?", "Which number did I tell you?", "Tell me the number."),
        answer="The number is {x}.",
    ),
    "city": _Thing(
        statements=(("I live in {x}.", "OK."), ("My home is in {x}.", "That is nice."), ("I am from {x}.", "Great.")),
        questions=("Where do I live?", "Which city is my home?", "Do you remember my city?"),
        answer="You live in {x}.",
    ),
}
_CHINESE = {
    "name": _Thing(
        statements=(("我叫{x}。", "很高兴认识你, {x}。"), ("我是{x}。", "你好, {x}。"), ("叫我{x}吧。", "好的, {x}。")),
        questions=("我叫什么?", "我是谁?", "你记得我的名字吗?"),
        answer="你叫{x}。",
    ),
    "number": _Thing(
        statements=(
            ("记住数字 {x}。", "好的。"),
            ("我的号码是 {x}。", "好的, 我记住了。"),
            ("密码是 {x}。", "好的, 密码是 {x}。"),
        ),
        questions=("数字是多少?", "我告诉你的数字是什么?", "请说出那个数字。"),
        answer="数字是 {x}。",
    ),
    "city": _Thing(
        statements=(("我住在{x}。", "好的。"), ("我的家在{x}。", "很好。"), ("我来自{x}。", "好极了。")),
        questions=("我住在哪里?", "我的家在哪个城市?", "你记得我的城市吗?"),
        answer="你住在{x}。",
    ),
}


def memory(rng: random.Random, split: Split) -> Example:
    """One or two things are told, then 0 to 4 turns of small talk, then one of them is asked."""
    while True:
        english = rng.random() < 0.55
        things = _ENGLISH if english else _CHINESE
        told = rng.sample(tuple(things), 1 if rng.random() < 0.6 else 2)
        values = {kind: _value(rng, kind, english) for kind in told}
        pairs = [_stated(rng, things[kind], values[kind]) for kind in told]
        talk = SMALL_TALK if english else SMALL_TALK_ZH
        between = int(rng.random() * (_MOST_TURNS_BETWEEN + 1))
        for _ in range(between):
            pairs.insert(1 + int(rng.random() * len(pairs)), choose(rng, talk))
        asked = choose(rng, told)
        question, answer = choose(rng, things[asked].questions), things[asked].answer.format(x=values[asked])
        key = f"remember {values[asked]}" if asked == "number" else f"remember {question} {pairs}"
        if split.accepts(key):
            return Example(skill="memory", messages=turns(*pairs, (question, answer)), answer=answer, keys=(key,))


def small_talk(rng: random.Random, split: Split) -> Example:
    """Only trained: greetings and the like."""
    talk = SMALL_TALK if rng.random() < 0.5 else SMALL_TALK_ZH
    pairs = [choose(rng, talk) for _ in range(1 + int(rng.random() * 3))]
    return Example(
        skill="small-talk", messages=turns(*pairs), answer=pairs[-1][1], keys=tuple(f"talk {one}" for one, _ in pairs)
    )


def _value(rng: random.Random, kind: str, english: bool) -> str:
    if kind == "number":
        return str(int(10 ** (1 + rng.random() * 3)))
    if kind == "name":
        return choose(rng, NAMES if english else NAMES_ZH)
    return choose(rng, _CITIES if english else _CITIES_ZH)


def _stated(rng: random.Random, thing: _Thing, value: str) -> tuple[str, str]:
    statement, reply = choose(rng, thing.statements)
    return statement.format(x=value), reply.format(x=value)
