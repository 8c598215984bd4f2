"""The pieces for training are what the chat template renders for serving."""

from __future__ import annotations

import itertools

import pytest

from engine.text.chat_template import ERNIE_TEXT_TEMPLATE, ChatTemplate
from engine.tiny.skills import SKILLS, held_out, own_template, prompt_text, segments, training_examples


@pytest.mark.parametrize("skill", SKILLS)
def test_a_prompt_is_what_the_chat_template_renders(skill: str) -> None:
    template = own_template()
    for example in held_out(skill, 10):
        pieces = segments(example)
        assert "".join(text for text, _ in pieces[:-1]) == prompt_text(example, template)


def test_whole_training_conversations_are_what_the_template_renders() -> None:
    template = own_template()
    for example in itertools.islice(training_examples(0), 500):
        if example.enable_thinking is not None:
            continue  # an opened thought is part of the prompt only
        extra = {"tools": list(example.tools)} if example.tools else {}
        rendered = template.render(example.messages, add_generation_prompt=False, extra=extra)
        assert "".join(text for text, _ in segments(example)) == rendered


def test_without_tools_and_switches_it_is_the_text_models_template() -> None:
    theirs = ChatTemplate(
        ERNIE_TEXT_TEMPLATE, {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}
    )
    conversation = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "你好"},
    ]
    assert own_template().render(conversation) == theirs.render(conversation)


def test_tool_arguments_may_be_an_object() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "巴黎"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = own_template().render(messages)  # type: ignore[arg-type]
    assert '<tool_call>\n{"name": "f", "arguments": {"city": "巴黎"}}\n</tool_call>' in text
