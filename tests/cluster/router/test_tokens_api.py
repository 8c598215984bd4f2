"""/tokenize and /detokenize, /load and /server_info: vLLM's form, our errors, no secrets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

TURNS = [{"role": "user", "content": "hi"}]


def run(rig: Any, test: Any, **changes: Any) -> None:
    async def main() -> None:
        async with rig(**changes) as r:
            await test(r)

    asyncio.run(main())


def test_a_prompt_is_tokenised_and_back(rig: Any) -> None:
    async def test(r: Any) -> None:
        body = {"prompt": "tide 潮", "return_token_strs": True}
        reply = (await r.client.post("/tokenize", json=body)).json()
        assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) > 0
        assert reply["max_model_len"] == r.decode.info.max_model_len
        back = await r.client.post("/detokenize", json={"model": "ernie-test", "tokens": reply["tokens"]})
        assert back.json() == {"prompt": "tide 潮"}
        assert (await r.client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []

    run(rig, test)


def test_a_conversation_is_tokenised_as_chat_does_it(rig: Any) -> None:
    async def test(r: Any) -> None:
        reply = (await r.client.post("/tokenize", json={"messages": TURNS})).json()
        assert reply["token_strs"] is None
        await r.client.post("/v1/chat/completions", json={"model": "ernie-test", "messages": TURNS})
        assert len(r.decode.dispatched[0].prompt) == 4 * reply["count"]
        shorter = {"messages": TURNS, "add_generation_prompt": False}
        assert (await r.client.post("/tokenize", json=shorter)).json()["count"] < reply["count"]

    run(rig, test)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/tokenize", {}, 400, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": "x", "messages": TURNS}, 400, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model_not_found", "model"),
        ("/tokenize", {"messages": [{"role": "boss", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
        ("/tokenize", {"prompt": "x", "tools": [1]}, 400, "unsupported_parameter", "tools"),
        (
            "/tokenize",
            {"messages": TURNS, "add_special_tokens": True},
            400,
            "unsupported_parameter",
            "add_special_tokens",
        ),
        ("/detokenize", {}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [1, 10**6]}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "invalid_value", "tokens[0]"),
    ],
)
def test_what_is_wrong_is_named(rig: Any, path: str, body: Any, status: int, code: str, param: str) -> None:
    async def test(r: Any) -> None:
        reply = await r.client.post(path, json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (status, code, param)

    run(rig, test)


def test_load_counts_what_is_in_flight(rig: Any) -> None:
    async def test(r: Any) -> None:
        await asyncio.sleep(0.05)
        idle = (await r.client.get("/load")).json()
        assert (idle["server_load"], idle["running"]) == (0, 0)
        assert {worker["worker_id"] for worker in idle["workers"]} == {"decode-1", "prefill-1"}
        r.decode.behaviour.hang = True
        body = {"model": "ernie-test", "messages": TURNS}
        asking = asyncio.create_task(r.client.post("/v1/chat/completions", json=body))
        for _ in range(1000):
            if r.decode.dispatched:
                break
            await asyncio.sleep(0.01)
        assert (await r.client.get("/load")).json()["server_load"] == 1
        asking.cancel()

    run(rig, test)


def test_server_info_has_options_and_no_secrets(rig: Any) -> None:
    async def test(r: Any) -> None:
        reply = await r.client.get("/server_info", headers={"authorization": "Bearer hunter2"})
        info = reply.json()
        assert info["has_api_key"] and info["router"]["max_queue"] == r.service.spec.max_queue
        assert {worker["role"] for worker in info["workers"]} == {"decode", "prefill"}
        assert "hunter2" not in reply.text and str(r.service.spec.model_path) not in reply.text

    run(rig, test, api_key="hunter2")
