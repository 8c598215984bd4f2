"""Calling the weather or the calculator in ERNIE's <tool_call> form, and saying what the tool has answered.

Keys: the expression; for the weather, whose cities are few, the city in one phrasing; for a result its values.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from engine.tiny.skills.arithmetic import sum_key
from engine.tiny.skills.countries import COUNTRIES
from engine.tiny.skills.example import Example, Split, choose, stable_number


def _tool(name: str, argument: str, description: str = "") -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    parameters: dict[str, Any] = {"type": "object", "properties": {argument: {"type": "string"}}}
    if description:
        function["description"] = description
        parameters["required"] = [argument]
    return {"type": "function", "function": {**function, "parameters": parameters}}


# short definitions cost few tokens; the full ones are the rarer form
_SHORT = (_tool("get_weather", "city"), _tool("calculator", "expression"))
_FULL = (
    _tool("get_weather", "city", "Weather of a city"),
    _tool("calculator", "expression", "Computes an expression"),
)
_WEATHER = (
    "What is the weather in {x}?",
    "How is the weather in {x}?",
    "Weather in {x}?",
    "Is it raining in {x}?",
    "Tell me the weather in {x}.",
)
_WEATHER_ZH = ("{x}天气怎么样?", "{x}的天气如何?", "查一下{x}的天气。", "{x}下雨了吗?", "{x}今天天气好吗?")
_CALCULATE = ("What is {x}?", "Calculate {x}", "Compute {x}", "How much is {x}?", "{x} = ?")
_CALCULATE_ZH = ("{x} 等于多少?", "计算 {x}", "请算 {x}", "{x} 是多少?", "算一下 {x}")
_SKIES = {"sunny": "晴", "rainy": "雨", "cloudy": "多云", "windy": "有风", "snowy": "雪", "foggy": "雾"}


def tool_call(rng: random.Random, split: Split) -> Example:
    """A question that needs one of the two tools, and the call."""
    question, call, key = _asked(rng, split, rng.random() < 0.55)
    return Example(
        skill="tool-call",
        messages=({"role": "user", "content": question}, call),
        answer=_call_text(call),
        keys=(key,),
        tools=_tools(rng),
        check="tool_call",
    )


def tools(rng: random.Random, split: Split) -> Example:
    """For training: one to three exchanges after one list of tools, which is longer than all of them."""
    example = tool_result(rng, split)
    for _ in range(int(rng.random() * 3)):
        more = tool_result(rng, split)
        example = replace(example, messages=example.messages + more.messages, keys=example.keys + more.keys)
    return replace(example, skill="tools", answer=example.messages[-1]["content"])


def tool_result(rng: random.Random, split: Split) -> Example:
    """The whole exchange: the question, the call, the tool's answer, and the answer in words."""
    english = rng.random() < 0.55
    question, call, call_key = _asked(rng, split, english)
    arguments = json.loads(call["tool_calls"][0]["function"]["arguments"])
    while True:
        if "city" in arguments:
            result, answer = _weather_result(rng, arguments["city"], english)
        else:
            result = str(_computed(arguments["expression"]))
            answer = f"The result is {result}." if english else f"结果是 {result}。"
        key = f"result {result} of {question}"
        if split.accepts(key):
            break
        if "city" not in arguments:  # a computation has one result: another question
            question, call, call_key = _asked(rng, split, english)
            arguments = json.loads(call["tool_calls"][0]["function"]["arguments"])
    messages = (
        {"role": "user", "content": question},
        call,
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    )
    return Example(skill="tool-result", messages=messages, answer=answer, keys=(call_key, key), tools=_tools(rng))


def _asked(rng: random.Random, split: Split, english: bool) -> tuple[str, dict[str, Any], str]:
    """Question, the assistant's call and the question's key."""
    if rng.random() < 0.5:
        country = choose(rng, COUNTRIES)
        city = country.capital if english else country.capital_zh
        forms = _WEATHER if english else _WEATHER_ZH
        question = forms[split.pick(rng, len(forms), stable_number(f"weather {city}") % len(forms))].format(x=city)
        return question, _call("get_weather", {"city": city}), f"weather {question}"
    while True:
        a, b = (int(10 ** (1.3 + rng.random() * 2.7)) for _ in range(2))
        expression = f"{a} {choose(rng, '+-*')} {b}"
        key = _computation_key(expression)
        if split.accepts(key):
            break
    question = choose(rng, _CALCULATE if english else _CALCULATE_ZH).format(x=expression)
    return question, _call("calculator", {"expression": expression}), key


def _tools(rng: random.Random) -> tuple[dict[str, Any], ...]:
    weather, calculator = _SHORT if rng.random() < 0.8 else _FULL
    return (weather, calculator) if rng.random() < 0.5 else (calculator, weather)


def _computation_key(expression: str) -> str:
    """The key that a sum or difference has without tools as well, so that no result gives a held-out one away."""
    left, operator, right = expression.split(" ")
    return sum_key(int(left), int(right)) if operator == "+" else f"{left}{operator}{right}"


def _call(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "0", "type": "function", "function": function}]}


def _call_text(message: dict[str, Any]) -> str:
    function = message["tool_calls"][0]["function"]
    return f'{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}'


def _weather_result(rng: random.Random, city: str, english: bool) -> tuple[str, str]:
    sky, degrees = choose(rng, tuple(_SKIES)), int(rng.random() * 40)
    result = json.dumps({"city": city, "weather": sky, "degrees": degrees}, ensure_ascii=False)
    if english:
        return result, f"It is {sky} in {city}, {degrees} degrees."
    return result, f"{city}天气: {_SKIES[sky]}, {degrees} 度。"


def _computed(expression: str) -> int:
    left, operator, right = expression.split(" ")
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[operator]
