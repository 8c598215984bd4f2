"""/status/why over HTTP, and what /status says of predictions, profiles and breakers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

CHAT = {"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]}


def with_rig(rig: Callable[..., Any], test: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with rig() as r:
            await test(r)

    asyncio.run(main())


def test_a_request_can_be_asked_about_by_its_id(rig: Callable[..., Any]) -> None:
    async def test(r: Any) -> None:
        assert (await r.client.get("/status/why")).json() == {"decisions": []}
        model = (await r.client.get("/v1/models")).json()["data"][0]["id"]
        replies = [await r.client.post("/v1/chat/completions", json=CHAT | {"model": model}) for _ in range(2)]
        newest_first = (await r.client.get("/status/why")).json()["decisions"]
        ids = [reply.headers["x-request-id"] for reply in replies]
        assert [decision["request_id"] for decision in newest_first] == ids[::-1]
        for asked in (ids[0], replies[0].json()["id"]):
            (decision,) = (await r.client.get("/status/why", params={"request_id": asked})).json()["decisions"]
            assert decision["request_id"] == ids[0] and decision["decode"] == "decode-1"
            assert decision["words"][0].endswith("decode on decode-1, prefill on prefill-1.")
            assert decision["words"][-1].startswith("Real: first token after")
            assert decision["predicted_ms"]["ttft"] > 0.0 and decision["real_ms"]["ttft"] > 0.0
        assert (await r.client.get("/status/why", params={"request_id": "nobody"})).json() == {"decisions": []}

    with_rig(rig, test)


def test_status_tells_how_good_predictions_were(rig: Callable[..., Any]) -> None:
    async def test(r: Any) -> None:
        model = (await r.client.get("/v1/models")).json()["data"][0]["id"]
        await r.client.post("/v1/chat/completions", json=CHAT | {"model": model})
        body = (await r.client.get("/status")).json()
        assert body["predictions"]["ttft_of"] == 1 and body["breakers"] == []
        assert [worker["profile"] for worker in body["workers"]] == [None, None], "stubs measure nothing"

    with_rig(rig, test)
