"""Whether an answer is right: exactly the expected text, JSON object or call; never nearly."""

from __future__ import annotations

import json
import re

from engine.tiny.skills.example import Example

_CALL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>\s*", re.DOTALL)
_END_OF_THOUGHT = "</think>"


def final_answer(text: str) -> str:
    """What follows the reasoning, without white space around it and without ERNIE's <response> markup."""
    answer = text.rpartition(_END_OF_THOUGHT)[2]
    return answer.replace("<response>", "").replace("</response>", "").strip()


def is_correct(example: Example, text: str) -> bool:
    """Exact match by the example's check: of text (inner white space counts once), of a JSON object, of one call.

    With thinking on, an answer that never ends its reasoning is wrong.
    """
    if example.enable_thinking and _END_OF_THOUGHT not in text:
        return False
    answer = final_answer(text)
    if example.check == "text":
        return answer.split() == example.answer.split()
    if example.check == "tool_call":
        call = _CALL.fullmatch(answer)
        return call is not None and _same_json(call[1], example.answer)
    return _same_json(answer, example.answer)


def contains_answer(example: Example, text: str) -> bool:
    """A weaker measure for models with other manners: the expected text stands in the answer as whole words."""
    words = " ".join(example.answer.rstrip(".\u3002").split())
    left = r"(?<![\w-])" if words[:1].isascii() else ""
    right = r"(?![\w-])" if words[-1:].isascii() else ""
    return re.search(left + re.escape(words) + right, " ".join(final_answer(text).split())) is not None


def _same_json(one: str, other: str) -> bool:
    try:
        # dumps tells 1 from 1.0 and true; the order of keys does not count
        return json.dumps(json.loads(one), sort_keys=True) == json.dumps(json.loads(other), sort_keys=True)
    except (ValueError, RecursionError):
        return False
