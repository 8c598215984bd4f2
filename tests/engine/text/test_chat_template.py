"""Templates: ERNIE's own, the sandbox, and what messages may look like."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.text import chat_template
from engine.text.chat_template import ChatTemplate, SwitchError, check_messages

USER = [{"role": "user", "content": "u1"}]


def render(source: str | None, messages: object, **tokens: str) -> str:
    return ChatTemplate(source, tokens).render(check_messages(messages))


def test_without_a_system_message_nothing_stands_before_the_user() -> None:
    assert render(None, USER) == "<|begin_of_sentence|>User: u1\nAssistant: "


def test_the_built_in_template_without_a_generation_prompt() -> None:
    messages = check_messages([*USER, {"role": "assistant", "content": "a1"}])
    text = ChatTemplate(None, {}).render(messages, add_generation_prompt=False)
    assert text == "<|begin_of_sentence|>User: u1\nAssistant: a1<|end_of_sentence|>"


def test_text_is_kept_exactly() -> None:
    content = "  {{ 7 * 7 }} {% raw %}\n\n<b>&amp;</b>\n"
    assert render(None, [{"role": "user", "content": content}]) == (
        f"<|begin_of_sentence|>User: {content}\nAssistant: "
    )


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = check_messages([{"role": "developer", "content": "s"}, {"role": "user", "content": parts}])
    assert messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (None, "messages"),
        (["hi"], r"messages\[0\]"),
        ([{"role": "king", "content": "x"}], r"messages\[0\].role"),
        ([*USER, {"content": "x"}], r"messages\[1\].role"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content"),
        ([{"role": "user", "content": []}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\].*image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], r"messages\[0\].tool_calls"),
        (USER * 5000, "at most"),
    ],
)
def test_wrong_messages_are_named(messages: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_messages(messages)


def test_a_role_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no role tool"):
        render(None, [{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('no') }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_can_do_no_harm(source: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        render(source, USER)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(ValueError, match="exceeds 1000"):
        render("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", USER)


def test_a_broken_template_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="not valid"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    "source",
    [
        chat_template.ERNIE_TEXT_TEMPLATE,
        "{% for m in messages %}\n  {% if m.role %}\n{{ bos_token }}{{ m | tojson }}\n  {% endif %}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'].strip() }}{% endfor %}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} é",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_templates_render_as_transformers_does(source: str) -> None:
    messages = [*USER, {"role": "assistant", "content": '"é" <b> '}, {"role": "user", "content": "好"}]
    tokens = {"bos_token": "<s>", "cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}
    expected, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **tokens)
    assert render(source, messages, **tokens) == expected[0]


THINKING_TEMPLATE = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"


@pytest.mark.parametrize(
    ("source", "switches", "known"),
    [
        (THINKING_TEMPLATE, {"messages": []}, False),
        (THINKING_TEMPLATE, {"bos_token": "x"}, False),
        (THINKING_TEMPLATE, {"enable_thinking": "yes"}, True),
        (THINKING_TEMPLATE, {"options": {"thinking_mode": "ajar"}}, True),
        (THINKING_TEMPLATE, {"options": {"thinking_mode": "open"}}, False),
        (None, {"enable_thinking": True}, False),
    ],
)
def test_a_switch_must_be_of_the_list_of_its_type_and_looked_at(
    source: str | None, switches: dict[str, object], known: bool
) -> None:
    with pytest.raises(SwitchError) as caught:
        ChatTemplate(source, {}).check_switches(switches)
    assert caught.value.known == known and caught.value.name in switches


def test_a_switch_reaches_the_template_and_off_is_harmless_where_there_is_none() -> None:
    template = ChatTemplate(THINKING_TEMPLATE, {})
    messages = [{"role": "user", "content": "hi"}]
    for value, text in ((True, "hi<think>"), (False, "hi")):
        assert template.render(messages, extra=template.check_switches({"enable_thinking": value})) == text
    off = {"enable_thinking": False, "options": {"thinking_mode": "close"}}
    assert ChatTemplate(None, {}).check_switches(off) == off
