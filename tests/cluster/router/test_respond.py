"""Answers: the order of a stream, what the status line waits for, how failures look before and after it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from cluster import metrics

CHAT: dict[str, Any] = {"model": "ernie-test", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "ernie-test", "prompt": "hi", "max_tokens": 64}
STREAM: dict[str, Any] = CHAT | {"stream": True}
Rigs = Callable[..., Any]


def with_rig(rig: Rigs, test: Callable[[Any], Awaitable[None]], **changes: Any) -> None:
    async def run() -> None:
        async with rig(**changes) as r:
            await test(r)
            assert (r.metric(metrics.QUEUED), r.metric(metrics.RUNNING)) == (0, 0)
            assert r.links.num_requests == 0

    asyncio.run(run())


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition; the deadline is generous, and only there so that a fault ends."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


async def post(r: Any, body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    reply = await r.client.post(path, json=body, headers={name.replace("_", "-"): v for name, v in headers.items()})
    assert isinstance(reply, httpx.Response)
    return reply


def events(text: str) -> list[Any]:
    """The data of a stream; comments as plain strings."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    return [json.loads(f[6:]) if f.startswith("data: {") else f.removeprefix("data: ") for f in frames]


def texts(chunks: list[Any], choice: int = 0) -> str:
    return "".join(
        entry["delta"].get("content") or ""
        for chunk in chunks
        if isinstance(chunk, dict)
        for entry in chunk["choices"]
        if entry["index"] == choice
    )


def test_the_order_of_a_stream(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        reply = await post(r, STREAM | {"stream_options": {"include_usage": True}})
        chunks = events(reply.text)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
        assert reply.headers["x-neap-path"] == "prefill-decode"
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert texts(chunks) == "Hello, world"
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-2]]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]
        assert chunks[-2]["choices"] == [] and chunks[-2]["usage"]["completion_tokens"] == 13
        assert chunks[-1] == "[DONE]"
        assert all(chunk["usage"] is None for chunk in chunks[:-2])
        assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
        assert "neap" not in json.dumps(chunks)

    with_rig(rig, test)


def test_without_being_asked_a_stream_has_no_usage(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        assert '"usage"' not in (await post(r, STREAM)).text

    with_rig(rig, test)


def test_continuous_usage_counts_up(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events((await post(r, STREAM | {"stream_options": options})).text)[:-1]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 13
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {21}
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}

    with_rig(rig, test)


def test_choices_interleave_by_index_and_share_one_dispatch(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        chunks = events((await post(r, STREAM | {"n": 3})).text)
        assert chunks[-1] == "[DONE]"
        assert [texts(chunks, choice) for choice in range(3)] == ["Hello, world"] * 3
        opened = [c["choices"][0]["index"] for c in chunks[:-1] if "role" in c["choices"][0]["delta"]]
        ended = [c["choices"][0]["index"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]]
        assert sorted(opened) == sorted(ended) == [0, 1, 2]
        (dispatch,) = r.decode.dispatched
        assert len({choice.seed for choice in dispatch.choices}) == 3
        body = (await post(r, CHAT | {"n": 3})).json()
        assert [c["index"] for c in body["choices"]] == [0, 1, 2]
        assert body["usage"]["completion_tokens"] == 39 and body["usage"]["prompt_tokens"] == 21

    with_rig(rig, test)


def test_a_list_of_prompts_is_answered_in_its_order(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        body = (await post(r, COMPLETION | {"prompt": ["a", "b", "c"], "n": 2}, "/v1/completions")).json()
        assert [c["index"] for c in body["choices"]] == list(range(6))
        assert [c["text"] for c in body["choices"]] == ["Hello, world"] * 6
        assert len(r.decode.dispatched) == 3
        stream = await post(r, COMPLETION | {"prompt": [[50], [51, 52]], "stream": True}, "/v1/completions")
        chunks = events(stream.text)
        for choice in range(2):
            parts = [c["choices"][0]["text"] for c in chunks[:-1] if c["choices"][0]["index"] == choice]
            assert "".join(parts) == "Hello, world"

    with_rig(rig, test)


def test_a_stop_string_ends_the_text_and_the_work(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(step_s=0.005)
        for body in (CHAT | {"stop": ["o, w"]}, CHAT | {"stop": "o, w", "stream": True}):
            reply = await post(r, body)
            if "stream" in body:
                chunks = events(reply.text)
                assert texts(chunks) == "Hell" and chunks[-1] == "[DONE]"
                assert chunks[-2]["choices"][0]["stop_reason"] == "o, w"
            else:
                (choice,) = reply.json()["choices"]
                assert (choice["message"]["content"], choice["finish_reason"]) == ("Hell", "stop")
                assert reply.json()["usage"]["completion_tokens"] == 8
        await until(lambda: len(r.decode.aborted) == 2 and not r.decode.running)

    with_rig(rig, test)


def test_logprobs_of_a_chat(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(text="a\u4f60")
        body = (await post(r, CHAT | {"logprobs": True, "top_logprobs": 2})).json()
        content = body["choices"][0]["logprobs"]["content"]
        assert content[0]["token"] == "a"
        assert bytes(b for entry in content for b in entry["bytes"]).decode() == "a\u4f60"
        assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)
        chunks = events((await post(r, STREAM | {"logprobs": True})).text)
        streamed = [e for c in chunks[:-1] for e in (c["choices"][0]["logprobs"] or {}).get("content", [])]
        assert len(streamed) == 4 and all(entry["top_logprobs"] == [] for entry in streamed)

    with_rig(rig, test)


def test_logprobs_of_a_completion(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(text="abc")
        logprobs = (await post(r, COMPLETION | {"logprobs": 2}, "/v1/completions")).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["a", "b", "c"] and logprobs["text_offset"] == [0, 1, 2]
        assert logprobs["token_logprobs"] == [-0.5] * 3
        for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
            assert len(top) == 2 and token in top

    with_rig(rig, test)


def test_defaults_of_the_model_reach_the_worker(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        await post(r, CHAT)
        await post(r, CHAT | {"temperature": 0, "seed": 7, "max_tokens": 5})
        first, second = (dispatch.params for dispatch in r.decode.dispatched)
        assert (first.temperature, first.top_p, first.max_tokens) == (0.8, 0.8, 512 - 21)
        assert (second.temperature, second.max_tokens) == (0.0, 5)
        assert r.decode.dispatched[1].choices[0].seed == 7

    with_rig(rig, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"), [("kv_transfer_failed", 502), ("kv_capacity_exceeded", 400), ("no_such_code", 500)]
)
def test_a_failure_before_the_first_token_is_a_real_status(rig: Rigs, stream: bool, code: str, status: int) -> None:
    async def test(r: Any) -> None:
        r.behave(fail=code)
        reply = await post(r, CHAT | {"stream": stream})
        assert reply.status_code == status
        assert reply.json()["error"]["code"] == (code if status != 500 else "internal_error")

    with_rig(rig, test)


def test_a_failure_in_mid_stream_is_an_event_and_never_done(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(step_s=0.002, fail_after=3)
        reply = await post(r, STREAM)
        chunks = events(reply.text)
        assert reply.status_code == 200 and texts(chunks[:-1]) == "Hel"
        assert chunks[-1]["error"]["code"] == "internal_error"
        assert chunks[-1]["error"]["request_id"] == reply.headers["x-request-id"]
        assert "[DONE]" not in reply.text
        assert r.metric(metrics.ERRORS, code="internal_error") == 1

    with_rig(rig, test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_before_the_first_token_is_a_408(rig: Rigs, stream: bool) -> None:
    async def test(r: Any) -> None:
        r.behave(hang=True)
        reply = await post(r, CHAT | {"stream": stream}, x_neap_timeout_ms="1500")
        assert (reply.status_code, reply.json()["error"]["code"]) == (408, "deadline_exceeded")
        assert reply.headers["x-should-retry"] == "false"
        await until(lambda: len(r.decode.aborted) == 1 and not r.decode.running)

    with_rig(rig, test)


def test_a_deadline_that_passes_in_mid_stream_is_an_event(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(text="x" * 400, step_s=0.05)
        reply = await post(r, STREAM, x_neap_timeout_ms="1500")
        assert events(reply.text)[-1]["error"]["code"] == "deadline_exceeded"

    with_rig(rig, test)


def test_a_long_wait_is_filled_with_pings_and_the_path_comes_last(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.service.ping_s = 0.02
        r.behave(first_token_s=0.3, path="decode-only")
        reply = await post(r, STREAM)
        chunks = events(reply.text)
        assert reply.headers["x-neap-path"] == "pending"
        pings = [index for index, chunk in enumerate(chunks) if chunk == ": ping"]
        assert pings == list(range(len(pings))) and len(pings) >= 2
        assert texts(chunks) == "Hello, world"
        assert chunks[-2]["neap"] == {"path": "decode-only"} and chunks[-2]["choices"][0]["finish_reason"] == "stop"
        r.behave(hang=True)
        reply = await post(r, STREAM, x_neap_timeout_ms="1500")
        chunks = events(reply.text)
        assert reply.status_code == 200 and chunks[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in reply.text

    with_rig(rig, test)


def test_a_full_queue_is_a_429_that_says_when(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(hang=True)
        r.decode.events.on_down("decode-1")
        r.decode.info = replace(r.decode.info, max_num_seqs=1)  # takes 2: one in its batch and one behind it
        r.decode.events.on_welcome(r.decode.info)
        waiting = []
        for queued, running in ((0, 1), (0, 2), (1, 2), (2, 2)):
            waiting.append(asyncio.create_task(post(r, CHAT)))
            load = (queued, running)
            await until(lambda load=load: (r.metric(metrics.QUEUED), r.metric(metrics.RUNNING)) == load)
        reply = await post(r, CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert 1 <= int(reply.headers["retry-after"]) <= 30 and reply.headers["x-should-retry"] == "true"
        await r.service.drain(0.0)
        assert [done.status_code for done in await asyncio.gather(*waiting)] == [503] * 4

    with_rig(rig, test, max_queue=2)


def test_a_draining_router_admits_nothing_and_lets_finish(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(step_s=0.01)
        running = asyncio.create_task(post(r, STREAM))
        await until(lambda: r.decode.running)
        drain = asyncio.create_task(r.service.drain(10.0))
        await asyncio.sleep(0)
        reply = await post(r, CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        assert (await r.client.get("/health/ready")).json()["stage"] == "draining"
        assert events((await running).text)[-1] == "[DONE]"
        await drain

    with_rig(rig, test)


def test_what_does_not_finish_in_time_ends_with_an_error(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.behave(text="x" * 400, step_s=0.01)
        running = asyncio.create_task(post(r, STREAM))
        await until(lambda: r.metric(metrics.GENERATION_TOKENS) > 0)
        await r.service.drain(0.05)
        assert events((await running).text)[-1]["error"]["code"] == "shutting_down"

    with_rig(rig, test)


def test_a_large_answer_with_logprobs_is_whole(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        body = COMPLETION | {"logprobs": 1, "ignore_eos": True, "max_tokens": 300, "n": 2}
        answer = (await post(r, body, "/v1/completions")).json()
        assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [300, 300]

    with_rig(rig, test)
