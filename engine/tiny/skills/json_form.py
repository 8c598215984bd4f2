"""One sentence about a person as a JSON object of a given small schema. Key: what is told and the schema."""

from __future__ import annotations

import json
import random

from engine.tiny.skills.countries import COUNTRIES
from engine.tiny.skills.example import Example, Split, choose, turns
from engine.tiny.skills.words import NAMES, NAMES_ZH

_FIELDS = {"name": "string", "age": "integer", "city": "string"}
_SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age} years old, from {city}.",
    "{name} lives in {city} and is {age}.",
)
_SENTENCES_ZH = ("{name}今年{age}岁, 住在{city}。", "{name}, {age}岁, 来自{city}。", "住在{city}的{name}今年{age}岁。")
_ORDERS = ("{sentence} Answer as JSON: {schema}", "JSON {schema}: {sentence}", "Fill in {schema} for: {sentence}")
_ORDERS_ZH = ("{sentence}用JSON回答: {schema}", "JSON {schema}: {sentence}", "按 {schema} 填写: {sentence}")


def json_form(rng: random.Random, split: Split) -> Example:
    """Two or three of name, age and city, in the schema's order."""
    while True:
        english = rng.random() < 0.6
        country = choose(rng, COUNTRIES)
        person: dict[str, str | int] = {
            "name": choose(rng, NAMES if english else NAMES_ZH),
            "age": 1 + int(rng.random() * 98),
            "city": country.capital if english else country.capital_zh,
        }
        fields = rng.sample(tuple(_FIELDS), 2 if rng.random() < 0.5 else 3)
        key = f"json {fields} {person}"
        if split.accepts(key):
            break
    schema = json.dumps({field: _FIELDS[field] for field in fields})
    sentence = choose(rng, _SENTENCES if english else _SENTENCES_ZH).format(**person)
    question = choose(rng, _ORDERS if english else _ORDERS_ZH).format(sentence=sentence, schema=schema)
    answer = json.dumps({field: person[field] for field in fields}, ensure_ascii=False)
    return Example(skill="json", messages=turns((question, answer)), answer=answer, keys=(key,), check="json")
