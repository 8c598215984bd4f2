"""Every request field of the conventions is implemented, ignored on purpose, or refused by name: never silence."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import RequestError
from cluster.router.openai.chat import ChatRequest, parse_chat
from cluster.router.openai.completions import CompletionRequest, parse_completion

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}

IMPLEMENTED: list[tuple[str, Any]] = [
    ("max_tokens", 5), ("temperature", 0.5), ("temperature", 1), ("top_p", 0.5), ("n", 2), ("stop", "x"),
    ("stop", ["x", "y"]), ("seed", -1), ("presence_penalty", 0.5), ("frequency_penalty", -0.5),
    ("logit_bias", {"5": -3}), ("stream", True), ("top_k", 4), ("min_p", 0.1), ("repetition_penalty", 1.1),
    ("min_tokens", 2), ("ignore_eos", True), ("stop_token_ids", [3]), ("skip_special_tokens", False),
    ("stream_options", {"include_usage": True, "continuous_usage_stats": True}), ("model", "m"),
    ("bad_words", ["x"]), ("bad_words_token_ids", [3]), ("allowed_token_ids", [1, 2]), ("prompt_logprobs", 0),
    ("truncate_prompt_tokens", 5), ("truncate_prompt_tokens", -1), ("priority", -7), ("cache_salt", "mine"),
    ("request_id", "job-7/a"),
]  # fmt: skip
IMPLEMENTED_CHAT: list[tuple[str, Any]] = [
    ("max_completion_tokens", 5), ("logprobs", True), ("add_generation_prompt", False),
    ("chat_template_kwargs", {"enable_thinking": False}),
]  # fmt: skip
IMPLEMENTED_COMPLETION: list[tuple[str, Any]] = [
    ("logprobs", 5), ("echo", True), ("prompt", [1, 2]), ("prompt", ["a", "b"]), ("prompt", [[1], [2, 3]]),
]  # fmt: skip

# field, a value that asks for something, values that ask for nothing (null is tried for all)
REFUSED: list[tuple[str, Any, list[Any]]] = [
    ("response_format", {"type": "json_object"}, [{"type": "text"}]),
    ("response_format", {"type": "json_schema", "json_schema": {}}, []),
    ("response_format", {"type": "structural_tag"}, []),
    ("tools", [{"type": "function", "function": {"name": "f"}}], [[]]),
    ("tool_choice", "auto", ["none"]),
    ("tool_choice", "required", []),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, []),
    ("reasoning_effort", "high", ["none"]),
    ("include_stop_str_in_output", True, [False]),
    ("logprob_token_ids", [1], [[]]),
    ("structured_outputs", {"json": {}}, [{}]),
    ("guided_json", {"type": "object"}, [{}]),
    ("guided_regex", "a+", [""]),
    ("guided_choice", ["a"], [[]]),
    ("guided_grammar", "root ::= x", [""]),
    ("chat_template", "{{ messages }}", [""]),
    ("continue_final_message", True, [False]),
    ("thinking_token_budget", 5, []),
    ("reasoning_max_tokens", 5, []),
    ("session_id", "mine", [""]),
    ("kv_transfer_params", {"do_remote_decode": True}, [{}]),
    ("suffix", "x", [""]),
    ("best_of", 2, [1]),
    ("parallel_tool_calls", "yes", [True, False]),
    ("never_heard_of", 1, [[], {}, ""]),
    ("never_heard_of", False, []),
]
# refused on one endpoint only
REFUSED_CHAT: list[tuple[str, Any, list[Any]]] = [("echo", True, [False])]
REFUSED_COMPLETION: list[tuple[str, Any, list[Any]]] = [
    ("chat_template_kwargs", {"enable_thinking": False}, [{}]),
    ("add_generation_prompt", False, [True]),
]
LABELS = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto"}

# every request parameter of the conventions that this project follows (shared/reference/ecosystem.md, 1.2)
CONVENTIONS = frozenset({
    "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "stream", "stream_options",
    "response_format", "tools", "tool_choice", "parallel_tool_calls", "user", "reasoning_effort", "service_tier",
    "metadata", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "include_stop_str_in_output", "skip_special_tokens", "bad_words", "allowed_token_ids", "logprob_token_ids",
    "prompt_logprobs", "truncate_prompt_tokens", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "chat_template",
    "thinking_token_budget", "reasoning_max_tokens", "priority", "request_id", "session_id", "cache_salt",
    "kv_transfer_params", "prompt", "echo", "suffix", "best_of",
})  # fmt: skip


def parse(endpoint: str, data: dict[str, Any]) -> Any:
    return parse_chat(CHAT | data) if endpoint == "chat" else parse_completion(COMPLETION | data)


def both(rows: list[Any], chat: list[Any], completion: list[Any]) -> list[Any]:
    return [("chat", *row) for row in rows + chat] + [("completions", *row) for row in rows + completion]


@pytest.mark.parametrize(("endpoint", "field", "value"), both(IMPLEMENTED, IMPLEMENTED_CHAT, IMPLEMENTED_COMPLETION))
def test_an_implemented_field_is_taken_over(endpoint: str, field: str, value: Any) -> None:
    got = getattr(parse(endpoint, {field: value}), field)
    assert (got.model_dump() if field == "stream_options" else got) == value


@pytest.mark.parametrize(("endpoint", "field", "value", "neutral"), both(REFUSED, REFUSED_CHAT, REFUSED_COMPLETION))
def test_an_unsupported_field_is_refused_by_name_unless_neutral(
    endpoint: str, field: str, value: Any, neutral: list[Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        parse(endpoint, {field: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", field)
    for harmless in [None, *neutral]:
        parse(endpoint, {field: harmless})


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_labels_are_ignored(endpoint: str) -> None:
    parse(endpoint, LABELS)


def test_every_field_of_the_conventions_has_a_row_in_these_tables() -> None:
    rows = IMPLEMENTED + IMPLEMENTED_CHAT + IMPLEMENTED_COMPLETION
    listed = {field for field, _ in rows} | {field for field, _, _ in REFUSED} | LABELS.keys() | {"messages", "prompt"}
    assert CONVENTIONS - {"top_logprobs"} <= listed
    declared = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert declared <= listed | {"top_logprobs"}, "a field that is implemented and in no table"


def test_top_logprobs_is_implemented() -> None:
    assert parse_chat(CHAT | {"logprobs": True, "top_logprobs": 3}).num_logprobs == 3


@pytest.mark.parametrize("label", ["two words", "a\r\nset-cookie: x", "\u00e9", "x" * 129])
def test_a_label_that_could_not_go_back_as_a_header_is_refused(label: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(CHAT | {"request_id": label})
    assert (caught.value.code, caught.value.param) == ("invalid_value", "request_id")


def test_fields_of_the_other_endpoint_are_refused() -> None:
    for endpoint, field, value in (
        ("chat", "prompt", "x"),
        ("completions", "messages", [1]),
        ("completions", "max_completion_tokens", 5),
        ("completions", "top_logprobs", 5),
    ):
        with pytest.raises(RequestError) as caught:
            parse(endpoint, {field: value})
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", "1", "temperature"), ("temperature", float("nan"), "temperature"), ("n", True, "n"),
        ("n", 1.5, "n"), ("stop", 5, "stop"), ("stop", ["a", 5], "stop"), ("seed", 1 << 63, "seed"),
        ("top_k", "4", "top_k"), ("stream", "yes", "stream"), ("stream", 1, "stream"), ("model", 5, "model"),
        ("logit_bias", [1], "logit_bias"), ("logit_bias", {"1": "x"}, "logit_bias"),
        ("logit_bias", {str(n): 1 for n in range(400)}, "logit_bias"),
        ("stream_options", True, "stream_options"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
        ("stop_token_ids", ["a"], "stop_token_ids[0]"), ("bad_words", "x", "bad_words"),
        ("bad_words", [3], "bad_words[0]"), ("allowed_token_ids", ["x"], "allowed_token_ids[0]"),
        ("prompt_logprobs", True, "prompt_logprobs"), ("priority", 1 << 31, "priority"), ("priority", "1", "priority"),
        ("cache_salt", "x" * 300, "cache_salt"), ("chat_template_kwargs", [1], "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named(field: str, value: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse("chat", {field: value})
    assert (caught.value.code, caught.value.param) == ("invalid_value", param)


MESSAGES: list[tuple[Any, str, str]] = [
    ([], "invalid_value", "messages"),
    ("hi", "invalid_value", "messages"),
    (["hi"], "invalid_value", "messages[0]"),
    ([{"content": "x"}], "invalid_value", "messages[0].role"),
    ([{"role": "user"}], "invalid_value", "messages[0].content"),
    ([{"role": "user", "content": None}], "invalid_value", "messages[0].content"),
    ([{"role": "user", "content": 5}], "invalid_value", "messages[0].content"),
    ([{"role": "tool", "content": "x"}], "invalid_value", "messages[0].role"),
    ([{"role": "user", "content": "x", "name": "bob"}], "unsupported_parameter", "messages[0].name"),
    ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "unsupported_parameter", "messages[0].tool_calls"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "invalid_value", "messages[0].content[0].text"),
    ([{"role": "user", "content": ["x"]}], "invalid_value", "messages[0].content[0]"),
]


@pytest.mark.parametrize(("messages", "code", "param"), MESSAGES)
def test_a_bad_message_is_named_with_its_place(messages: Any, code: str, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({"model": "m", "messages": messages})
    assert (caught.value.code, caught.value.param) == (code, param)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_chat(CHAT | {"messages": [{"role": "user", "content": parts}]}).messages[0].content == "a\nb"


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""], [1, "a"], [True], 5, {}, ["a"] * 33, [[1, "a"]], None])
def test_a_bad_prompt_is_named(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion({"model": "m", "prompt": prompt})
    assert (caught.value.code, caught.value.param) == ("invalid_value", "prompt")


def test_top_logprobs_needs_logprobs() -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(CHAT | {"top_logprobs": 3})
    assert caught.value.param == "top_logprobs"
