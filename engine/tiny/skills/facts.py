"""Facts about 60 countries, in both languages. Each fact is trained in all phrasings but one, which is held out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine.tiny.skills.countries import CONTINENTS, COUNTRIES, Country
from engine.tiny.skills.example import Example, Split, choose, single, stable_number

# kind -> phrasings; {x} is the country, or for "country" the capital
PHRASINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("capital", "en"): (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Capital of {x}?",
        "Name the capital of {x}.",
        "Tell me the capital of {x}.",
        "Do you know the capital of {x}?",
    ),
    ("capital", "zh"): (
        "{x}的首都是哪里?",
        "{x}的首都是什么?",
        "{x}首都?",
        "请说出{x}的首都。",
        "哪个城市是{x}的首都?",
        "{x}的首都叫什么名字?",
    ),
    ("continent", "en"): (
        "Which continent is {x} in?",
        "On which continent is {x}?",
        "Continent of {x}?",
        "What continent does {x} belong to?",
        "Tell me the continent of {x}.",
        "Do you know the continent of {x}?",
    ),
    ("continent", "zh"): (
        "{x}在哪个洲?",
        "{x}属于哪个洲?",
        "{x}位于哪个大洲?",
        "请说出{x}所在的洲。",
        "哪个洲有{x}?",
        "{x}是哪个洲的国家?",
    ),
    ("country", "en"): (
        "Which country is ruled from {x}?",
        "Which country has the capital {x}?",
        "Country of the capital {x}?",
        "Name the country whose capital is {x}.",
    ),
    ("country", "zh"): ("{x}是哪个国家的首都?", "哪个国家的首都是{x}?", "首都是{x}的国家?", "请说出首都是{x}的国家。"),
}
_KINDS = tuple(PHRASINGS)


@dataclass(frozen=True)
class _Fact:
    subject: str
    answer: str


def facts(rng: random.Random, split: Split) -> Example:
    """A country's capital or continent, or a capital's country."""
    kind, language = choose(rng, _KINDS)
    fact = _fact(choose(rng, COUNTRIES), kind, language == "zh")
    phrasings = PHRASINGS[kind, language]
    form = split.pick(rng, len(phrasings), stable_number(f"{kind} {fact.subject}") % len(phrasings))
    question = phrasings[form].format(x=fact.subject)
    return single("facts", question, fact.answer, f"fact {question}")


def _fact(country: Country, kind: str, chinese: bool) -> _Fact:
    name, capital = (country.zh, country.capital_zh) if chinese else (country.name, country.capital)
    if kind == "capital":
        return _Fact(name, capital)
    if kind == "continent":
        return _Fact(name, CONTINENTS[country.continent] if chinese else country.continent)
    return _Fact(capital, name)
