"""An example as text, piece by piece: what the model is given, and what it shall learn to write.

The pieces joined are what `engine/tiny/chat_template.jinja` renders. Encode each piece by itself: at inference the
prompt is encoded without the answer, so an answer's first token never joins the prompt's last space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.text.chat_template import ChatTemplate
from engine.tiny.skills.example import Example

CHAT_TEMPLATE = (Path(__file__).parent.parent / "chat_template.jinja").read_text(encoding="utf-8")
BEGIN, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"


def segments(example: Example) -> list[tuple[str, bool]]:
    """The whole conversation in order: (text, True where the assistant speaks, its end token included)."""
    pieces: list[tuple[str, bool]] = []
    given = BEGIN + "".join(_head(example))
    last = len(example.messages) - 1
    for index, message in enumerate(example.messages):
        role = message["role"]
        if role == "assistant":
            opening, answer = "Assistant: ", answer_text(message)
            if index == last and example.enable_thinking is not None:
                opening += "<think>\n" if example.enable_thinking else "<think>\n\n</think>\n\n"
            pieces += [(given + opening, False), (answer + END, True)]
            given = ""
        elif role == "tool":
            given += f"User: <tool_output>\n{message['content']}\n</tool_output>\n"
        elif role == "user":
            given += f"User: {message['content']}\n"
        else:
            assert role == "system" and index == 0, "skills put the system message first"
    return pieces


def answer_text(message: Mapping[str, Any]) -> str:
    """What the model writes for an assistant's message, without its end token."""
    calls = "".join(
        f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"], ensure_ascii=False)}, '
        f'"arguments": {call["function"]["arguments"]}}}\n</tool_call>'
        for call in message.get("tool_calls", ())
    )
    reasoning = message.get("reasoning_content")
    thought = f"{reasoning}\n</think>\n\n" if reasoning else ""
    return f"{thought}{message['content'] or ''}{calls}"


def prompt_text(example: Example, template: ChatTemplate) -> str:
    """The question as a model's own chat template renders it. Raises ValueError where it does not accept it."""
    extra: dict[str, object] = {"tools": list(example.tools)} if example.tools else {}
    if example.enable_thinking is not None:
        extra["enable_thinking"] = example.enable_thinking
    return template.render(example.messages[:-1], extra=extra)


def own_template() -> ChatTemplate:
    """The embedded model's chat template, with ERNIE's tokens."""
    return ChatTemplate(CHAT_TEMPLATE, {"cls_token": BEGIN, "sep_token": END})


def _head(example: Example) -> Iterator[str]:
    first = example.messages[0]
    if first["role"] == "system":
        yield f"{first['content']}\n"
    if example.tools:
        functions = [tool["function"] for tool in example.tools]
        yield f"<tool_list>\n{json.dumps(functions, ensure_ascii=False)}\n</tool_list>\n"
