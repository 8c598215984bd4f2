"""What routers say becomes workers and traffic; what makes no sense is left out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.control.router_client import RouterClient, RouterError
from cluster.control.router_view import View, look, parse
from cluster.types import WorkerInfo
from tests.cluster.control.role_rig import LONG_PROMPTS, info, worker_json

DECODE, PREFILL = info("decode-0", "decode"), info("prefill-0", "prefill")
TRAFFIC = dict(LONG_PROMPTS.__dict__)


def router(
    *workers: dict[str, Any], traffic: dict[str, Any] = TRAFFIC, code: int = 200, uptime_s: float = 60.0
) -> RouterClient:
    class Client(RouterClient):
        def get(self, path: str) -> tuple[int, dict[str, Any]]:
            if not code:
                raise RouterError("no answer")
            return code, {"uptime_s": uptime_s, "workers": list(workers), "traffic": traffic}

    return Client(host="h", port=1)


def seen(*routers: RouterClient, infos: tuple[WorkerInfo, ...] = (DECODE, PREFILL)) -> View:
    return asyncio.run(look(routers, infos))


def test_a_worker_is_what_the_registry_knows_and_its_heartbeat_said_since() -> None:
    profile = {"prefill_scale": 1.5, "decode_scale": 0.5}
    peer = {"peer": "p", "transport": "grpc", "gb_per_s": 2.5, "latency_ms": 1.0}
    told = worker_json(replace(DECODE, role="prefill", state="verifying", epoch=9), profile=profile | {"peers": [peer]})
    told["load"] |= {"running": 3, "queued_tokens": 70, "context_tokens": 900, "blocks": 50}
    (heard,) = seen(router(told)).heard
    assert heard.info == replace(DECODE, role="prefill", state="verifying", epoch=9)
    assert (heard.load.num_running, heard.load.queued_tokens, heard.load.context_tokens) == (3, 70, 900)
    assert (heard.load.num_blocks, heard.load.prefill_scale, heard.load.decode_scale) == (50, 1.5, 0.5)
    assert (heard.peers[0].gb_per_s, heard.age_ms) == (2.5, 10)


@pytest.mark.parametrize(
    "changes",
    [{"link": "down"}, {"heartbeat_age_ms": None}, {"hung": True}, {"load": None}, {"incarnation": "another"}],
)
def test_workers_that_are_away_hung_or_unknown_are_left_out(changes: dict[str, Any]) -> None:
    heard = seen(router(worker_json(DECODE, **changes), worker_json(PREFILL))).heard
    assert [one.info.worker_id for one in heard] == ["prefill-0"]


def test_of_several_routers_the_youngest_heartbeat_counts_and_traffic_adds_up() -> None:
    old = worker_json(DECODE, heartbeat_age_ms=900)
    new = worker_json(replace(DECODE, epoch=5), heartbeat_age_ms=100)
    view = seen(router(old), router(new), router(code=0), router(code=503))
    assert [one.info.epoch for one in view.heard] == [5]
    assert (view.num_routers, view.traffic.requests_per_s) == (2, 8.0)
    assert seen(router(code=0)).num_routers == 0


def test_a_router_that_has_just_started_has_not_found_its_workers_yet() -> None:
    assert seen(router(worker_json(DECODE), uptime_s=1.0)).num_routers == 0


@pytest.mark.parametrize(
    ("worker", "traffic"),
    [
        ({"role": "king"}, {}),
        ({"state": "asleep"}, {}),
        ({"epoch": "x"}, {}),
        ({}, {"requests_per_s": -1.0}),
        ({}, {"requests_per_s": float("nan")}),
        ({}, {"mean_prompt_tokens": None}),
        ({}, {"window_s": "long"}),
    ],
)
def test_a_router_that_makes_no_sense_is_as_one_that_does_not_answer(
    worker: dict[str, Any], traffic: dict[str, Any]
) -> None:
    body = {"workers": [worker_json(DECODE, **worker)], "traffic": TRAFFIC | traffic}
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse(body, {DECODE.incarnation: DECODE})
    assert seen(router(*body["workers"], traffic=body["traffic"])).num_routers == 0
    del body["traffic"]
    with pytest.raises(KeyError):
        parse(body | {"workers": []}, {})
