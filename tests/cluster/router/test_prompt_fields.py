"""echo, prompt_logprobs, truncation, priority, salt, label, switches: from the body to the worker and back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

MODEL = "ernie-test"
COMPLETION = {"model": MODEL, "prompt": "abcd", "max_tokens": 3}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def run(rig: Any, test: Any) -> None:
    async def main() -> None:
        async with rig() as r:
            await test(r)

    asyncio.run(main())


async def complete(r: Any, **fields: Any) -> Any:
    reply = await r.client.post("/v1/completions", json={**COMPLETION, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def chunks(r: Any, path: str, body: Any) -> list[Any]:
    reply = await r.client.post(path, json={**body, "stream": True})
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]", reply.text
    return [json.loads(event) for event in events]


def prompts(r: Any) -> list[list[int]]:
    return [np.frombuffer(sent.prompt, dtype="<i4").tolist() for sent in r.decode.dispatched]


def test_an_echo_begins_with_the_prompt_as_it_was_given(rig: Any) -> None:
    async def test(r: Any) -> None:
        answer = await complete(r, prompt=["abcd", "x"], n=2, echo=True)
        assert [choice["text"] for choice in answer["choices"]] == ["abcdHel", "abcdHel", "xHel", "xHel"]
        ids = r.decode.tokenizer.encode("abcd")
        assert (await complete(r, prompt=ids, echo=True))["choices"][0]["text"] == "abcdHel"
        assert r.decode.dispatched[0].params.prompt_logprobs is None
        assert r.decode.dispatched[0].sources, "an echo of the text alone needs no logits"

    run(rig, test)


def test_logprobs_of_an_echo_begin_with_the_prompts_as_evaluation_tools_read_them(rig: Any) -> None:
    async def test(r: Any) -> None:
        answer = await complete(r, echo=True, logprobs=1, max_tokens=1, n=2)
        for choice in answer["choices"]:
            got = choice["logprobs"]
            assert choice["text"] == "abcdH" and "".join(got["tokens"]) == "abcdH"
            assert got["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.5]
            assert got["top_logprobs"][:2] == [None, {"P": -0.5}] and len(got["top_logprobs"]) == 5
            assert got["text_offset"] == [0, 1, 2, 3, 4]
            assert "prompt_logprobs" not in choice
        (sent,) = r.decode.dispatched
        assert sent.sources == () and sent.params.prompt_logprobs == 1

    run(rig, test)


def test_an_echo_with_no_tokens_asked_for_gives_the_prompt_only(rig: Any) -> None:
    async def test(r: Any) -> None:
        answer = await complete(r, echo=True, logprobs=0, max_tokens=0)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abcd", "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0]
        assert answer["usage"]["completion_tokens"] == 0
        reply = await r.client.post("/v1/completions", json=COMPLETION | {"max_tokens": 0})
        assert reply.json()["error"]["param"] == "max_tokens"

    run(rig, test)


def test_prompt_logprobs_have_a_field_of_their_own(rig: Any) -> None:
    async def test(r: Any) -> None:
        (choice,) = (await complete(r, prompt_logprobs=2))["choices"]
        first, second, *others = choice["prompt_logprobs"]
        assert first is None and len(others) == 2 and choice["text"] == "Hel" and choice["logprobs"] is None
        assert second["66"] == {"logprob": -0.75, "rank": 2, "decoded_token": "Q"}
        chat = (await r.client.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 0})).json()
        assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
        assert "prompt_logprobs" not in (await r.client.post("/v1/chat/completions", json=CHAT)).json()

    run(rig, test)


def test_in_a_stream_the_prompt_comes_with_each_choices_first_text(rig: Any) -> None:
    async def test(r: Any) -> None:
        body = COMPLETION | {"echo": True, "logprobs": 0, "n": 2, "prompt_logprobs": 0}
        events = await chunks(r, "/v1/completions", body)
        for index in (0, 1):
            mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in mine) == "abcdHel"
            assert mine[0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.5]
            assert [len(choice.get("prompt_logprobs", ())) for choice in mine] == [4] + [0] * (len(mine) - 1)
            assert [offset for choice in mine for offset in choice["logprobs"]["text_offset"]] == list(range(7))
        chat = await chunks(r, "/v1/chat/completions", CHAT | {"prompt_logprobs": 0, "n": 2})
        assert sum("prompt_logprobs" in event for event in chat) == 1

    run(rig, test)


def test_truncation_keeps_the_end_and_the_echo_is_what_counted(rig: Any) -> None:
    async def test(r: Any) -> None:
        answer = await complete(r, truncate_prompt_tokens=2, echo=True)
        assert answer["choices"][0]["text"] == "cdHel" and answer["usage"]["prompt_tokens"] == 2
        room = r.decode.info.max_model_len
        assert (await complete(r, prompt="y" * 3 * room, truncate_prompt_tokens=-1))["usage"] == {
            **answer["usage"], "prompt_tokens": room - 3, "total_tokens": room,
        }  # fmt: skip
        assert [len(prompt) for prompt in prompts(r)] == [2, room - 3]
        reply = await r.client.post("/v1/completions", json=COMPLETION | {"truncate_prompt_tokens": room})
        assert reply.json()["error"]["param"] == "truncate_prompt_tokens"

    run(rig, test)


def test_priority_salt_label_and_bad_words_reach_their_places(rig: Any) -> None:
    async def test(r: Any) -> None:
        body = COMPLETION | {"priority": -3, "cache_salt": "s", "request_id": "job/1", "bad_words": ["x"]}
        reply = await r.client.post("/v1/completions", json=body)
        (sent,) = r.decode.dispatched
        assert (sent.priority, sent.cache_salt) == (-3, b"s")
        x, space = r.decode.tokenizer.encode("x")[0], r.decode.tokenizer.encode(" ")[0]
        assert sent.params.bad_token_sequences == ((x,), (space, x))
        assert reply.headers["x-neap-label"] == "job/1"
        assert "job/1" not in reply.text + sent.request_id + reply.headers["x-request-id"]

    run(rig, test)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, "unsupported_parameter", "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "invalid_value", "enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "unsupported_parameter", "messages"),
        ({"chat_template_kwargs": {"options": {"thinking_mode": "wild"}}}, "invalid_value", "options"),
    ],
)
def test_template_switches_are_of_the_allow_list(rig: Any, fields: Any, code: str, param: str) -> None:
    async def test(r: Any) -> None:
        error = (await r.client.post("/v1/chat/completions", json=CHAT | fields)).json()["error"]
        assert (error["code"], error["param"]) == (code, f"chat_template_kwargs.{param}")
        harmless = CHAT | {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
        assert (await r.client.post("/v1/chat/completions", json=harmless)).status_code == 200

    run(rig, test)


def test_prompt_logprobs_are_bounded(rig: Any) -> None:
    async def test(r: Any) -> None:
        big = COMPLETION | {"prompt": "z" * 200, "prompt_logprobs": 20, "n": 8, "stream": True}
        error = (await r.client.post("/v1/completions", json=big)).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "prompt_logprobs")
        assert (await r.client.post("/v1/completions", json=big | {"stream": False})).status_code == 200

    run(rig, test)
