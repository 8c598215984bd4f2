"""The endpoints beside generation: health, models, status, metrics, docs, keys, and the form of every error."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec.structs import replace
from starlette.routing import Route

from cluster import metrics
from cluster.router.guard import OPEN_PATHS

KEY = "sk-test-1234"
CHAT: dict[str, Any] = {"model": "ernie-test", "messages": [{"role": "user", "content": "hi"}]}
Rigs = Callable[..., Any]


def with_rig(rig: Rigs, test: Callable[[Any], Awaitable[None]], **changes: Any) -> None:
    async def run() -> None:
        async with rig(**changes) as r:
            await test(r)

    asyncio.run(run())


def test_while_starting_nothing_claims_to_be_ready(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        assert (await r.client.get("/health/live")).status_code == 200
        for path in ("/health", "/health/ready"):
            reply = await r.client.get(path)
            assert reply.status_code == 503
            assert {"stage", "percent", "reason", "prefill_ready", "decode_ready"} <= set(reply.json())
        assert (await r.client.get("/v1/models")).json()["data"] == []
        assert (await r.client.get("/metrics")).status_code == 200
        reply = await r.client.post("/v1/chat/completions", json=CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_not_ready")
        assert reply.headers["x-should-retry"] == "true" and int(reply.headers["retry-after"]) >= 1

    with_rig(rig, test, ready=False)


def test_the_stages_of_a_start_are_told_one_by_one(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        async def stage() -> tuple[str, int]:
            body = (await r.client.get("/health/ready")).json()
            return body["stage"], body["percent"]

        seen = [await stage()]
        r.service.text = r.decode.tokenizer
        seen.append(await stage())
        r.links.on_map(())
        seen.append(await stage())
        r.workers["decode-1"].info = replace(r.decode.info, state="starting")
        r.links.on_map((r.decode.info,))
        seen.append(await stage())
        r.links.on_map((r.decode.info, r.workers["prefill-1"].info))
        r.decode.events.on_down("decode-1")
        r.decode.events.on_welcome(replace(r.decode.info, state="ready"))
        seen.append(await stage())
        assert [name for name, _ in seen] == ["tokenizer", "registry", "workers", "loading", "ready"]
        assert [percent for _, percent in seen] == sorted(percent for _, percent in seen)

    with_rig(rig, test, ready=False)


def test_a_decode_worker_alone_can_serve_unless_the_spec_wants_a_prefill_worker(rig: Rigs) -> None:
    for required, status in ((False, 200), (True, 503)):

        async def test(r: Any, status: int = status) -> None:
            r.workers["prefill-1"].events.on_down("prefill-1")
            reply = await r.client.get("/health/ready")
            assert (reply.status_code, reply.json()["prefill_ready"]) == (status, 0)
            assert len((await r.client.get("/v1/models")).json()["data"]) == (status == 200)

        with_rig(rig, test, require_prefill=required)


def test_the_model_is_listed_and_found_by_name(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        (model,) = (await r.client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("ernie-test", "model", 512)
        assert (await r.client.get("/v1/models/ernie-test")).json() == model
        reply = await r.client.get("/v1/models/other/name")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")

    with_rig(rig, test)


def test_status_shows_workers_links_and_load(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        await asyncio.sleep(0.05)  # the first heartbeat
        body = (await r.client.get("/status")).json()
        decode, prefill = body["workers"]
        assert (decode["worker_id"], decode["role"], decode["state"], decode["link"]) == (
            "decode-1", "decode", "ready", "up",
        )  # fmt: skip
        assert decode["load"]["kv_use"] == 0.25 and decode["epoch"] == 1 and prefill["role"] == "prefill"
        assert {"queued", "running", "max_queue"} <= set(body["requests"])

    with_rig(rig, test)


def test_status_tells_what_came_in_and_how_it_was_served_lately(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        assert (await r.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        traffic = (await r.client.get("/status")).json()["traffic"]
        assert (traffic["num_requests"], traffic["requests_per_s"]) == (1, 1.0)  # in its first second
        assert traffic["mean_prompt_tokens"] == traffic["prompt_tokens_per_s"] > 0.0
        assert traffic["output_tokens_per_s"] == 13.0 >= traffic["mean_output_tokens"] > 0.0
        assert traffic["ttft_p90_ms"] >= 0.0 and traffic["tpot_p90_ms"] >= 0.0 and traffic["num_queued"] == 0

    with_rig(rig, test)


def test_metrics_count_what_happened(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        await r.client.post("/v1/chat/completions", json=CHAT)
        await r.client.post("/v1/chat/completions", json=CHAT | {"model": "x"})
        assert r.metric(metrics.REQUESTS, endpoint="chat") == 2
        assert r.metric(metrics.FINISHED, reason="stop") == 1
        assert r.metric(metrics.ERRORS, code="model_not_found") == 1
        assert r.metric(metrics.PATHS, path="prefill-decode") == 1
        assert r.metric(metrics.GENERATION_TOKENS) == 13
        assert r.metric(metrics.TTFT + "_count") == 1
        assert r.metric(metrics.ITL + "_count") == 12
        assert r.metric(metrics.WORKER_KV_USE, worker_id="decode-1") == 0.25
        assert (r.metric(metrics.QUEUED), r.metric(metrics.RUNNING)) == (0, 0)
        text = (await r.client.get("/metrics")).text
        names = [value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)]
        assert len(names) > 20 and all(name in text for name in names)

    with_rig(rig, test)


def test_errors_of_the_framework_have_our_form(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        for method, path, status, code in (
            ("GET", "/nope", 404, "not_found"),
            ("GET", "/v1/chat/completions/", 404, "not_found"),
            ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
            ("DELETE", "/health", 405, "method_not_allowed"),
        ):
            reply = await r.client.request(method, path)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
            assert set(error) == {"message", "type", "param", "code", "request_id"}
            assert reply.headers["x-request-id"] == error["request_id"]
            assert reply.headers["x-should-retry"] == "false"
            assert ("allow" in reply.headers) == (status == 405)

    with_rig(rig, test)


def test_what_was_not_foreseen_is_a_500_without_its_words(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        r.service.readiness = lambda: 1 / 0
        reply = await r.client.get("/health/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert "division" not in reply.text

    with_rig(rig, test)


def test_a_clients_request_id_is_not_ours(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        reply = await r.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "attack"})
        assert "attack" not in reply.headers["x-request-id"] + reply.text
        assert r.decode.dispatched[0].request_id == reply.headers["x-request-id"]

    with_rig(rig, test)


def test_every_route_but_health_needs_the_key(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        routes = [route for route in r.app.routes if isinstance(route, Route)]
        assert len(routes) == len(r.app.routes) >= 11
        walked = [
            (route.path.replace("{model_id:path}", "x"), method) for route in routes for method in route.methods or ()
        ]
        for path, method in [*walked, ("/nope", "GET"), ("/health/", "GET"), ("/health/../metrics", "GET")]:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": KEY},
                {"authorization": "Basic " + KEY},
            ):
                reply = await r.client.request(method, path, headers=headers | {"host": "x/health?y="})
                if path in OPEN_PATHS:
                    assert reply.status_code == 200
                else:
                    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
            reply = await r.client.request(method, path, headers={"authorization": "bearer " + KEY})
            assert reply.status_code != 401

    with_rig(rig, test, api_key=KEY)


def test_two_keys_are_no_key(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        headers = [("authorization", "Bearer " + KEY), ("authorization", "Bearer x")]
        assert (await r.client.get("/version", headers=headers)).status_code == 401

    with_rig(rig, test, api_key=KEY)


def test_the_docs_need_no_other_host_and_show_the_real_bodies(rig: Rigs) -> None:
    async def test(r: Any) -> None:
        page = (await r.client.get("/docs")).text
        assert "http://" not in page and "https://" not in page
        document = (await r.client.get("/openapi.json")).json()
        chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schemas = document["components"]["schemas"]
        assert "max_completion_tokens" in schemas[chat["$ref"].rsplit("/", 1)[1]]["properties"]
        text = json.dumps(document)
        refs = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
        assert refs <= set(schemas)

    with_rig(rig, test)


def test_the_router_loads_neither_torch_nor_ray() -> None:
    modules = "cluster.router.app, cluster.router.server"
    code = f"import sys, {modules}; print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
