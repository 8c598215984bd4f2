"""Worker.Switch over real gRPC on loopback: what is asked and answered, callers that go, workers that are not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from grpc import aio

from cluster.rpc.channel import SERVER_OPTIONS
from cluster.rpc.pb import worker_pb2 as pb
from cluster.rpc.pb import worker_pb2_grpc as pb_grpc
from cluster.rpc.seal import SealedChannel, SealedServer
from cluster.rpc.switch_client import SwitchCallError, call_switch
from cluster.rpc.switch_server import SwitchContext, SwitchMethod
from cluster.types import SwitchReply, SwitchRequest, WorkerInfo

INFO = WorkerInfo(worker_id="d", incarnation="1", epoch=5, role="prefill", state="ready", address="")
REQUEST = SwitchRequest(incarnation="1", expected_epoch=1, role="prefill", timeout_ms=60_000)
REPLY = SwitchReply(
    outcome="switched", info=INFO, reason="why", moved=3, finished_in_place=2, duration_ms=12.5, canary_ms=1.25
)
DEADLINE_S = 30.0


@dataclass
class Worker:
    """Switches when it is let; keeps what it was asked."""

    let: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[SwitchRequest] = field(default_factory=list)
    num_ended: int = 0

    async def switch(self, request: SwitchRequest) -> SwitchReply:
        self.asked.append(request)
        await self.let.wait()
        self.num_ended += 1
        return REPLY


class Servicer(pb_grpc.WorkerServicer):
    """The worker's service with nothing but Switch."""

    def __init__(self, worker: Worker) -> None:
        self._method = SwitchMethod(worker)

    async def Switch(self, request: pb.SwitchRequest, context: SwitchContext) -> pb.SwitchReply:
        return await self._method.serve(request, context)


@asynccontextmanager
async def serving(servicer: pb_grpc.WorkerServicer) -> AsyncIterator[str]:
    server = aio.server(options=SERVER_OPTIONS)
    pb_grpc.add_WorkerServicer_to_server(servicer, SealedServer(server))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def until(worker: Worker, num_asked: int, num_ended: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (len(worker.asked), worker.num_ended) != (num_asked, num_ended):  # noqa: ASYNC110 (gRPC tells nobody)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("role", ["prefill", "decode", None])
def test_what_is_asked_and_answered_arrives_whole(role: str | None) -> None:
    async def scenario() -> None:
        worker = Worker()
        worker.let.set()
        request = SwitchRequest(incarnation="abc", expected_epoch=7, role=role, timeout_ms=1234)  # type: ignore[arg-type]
        async with serving(Servicer(worker)) as address:
            assert await call_switch(address, request) == REPLY
        assert worker.asked == [request]

    asyncio.run(scenario())


def test_a_caller_that_goes_does_not_end_the_switch() -> None:
    async def scenario() -> None:
        worker = Worker()
        async with serving(Servicer(worker)) as address:
            calling = asyncio.create_task(call_switch(address, REQUEST))
            await until(worker, 1, 0)
            calling.cancel()
            await asyncio.wait({calling})
            await asyncio.sleep(0.1)  # for the cancellation to arrive there
            worker.let.set()
            await until(worker, 1, 1)

    asyncio.run(scenario())


def test_a_worker_that_is_away_cannot_switch_or_dies_meanwhile_is_an_error_at_once() -> None:
    async def scenario() -> None:
        with pytest.raises(SwitchCallError, match=r"127\.0\.0\.1:1: unavailable"):
            await call_switch("127.0.0.1:1", REQUEST)
        async with serving(pb_grpc.WorkerServicer()) as address:
            with pytest.raises(SwitchCallError, match="unimplemented"):
                await call_switch(address, REQUEST)
        worker = Worker()
        async with serving(Servicer(worker)) as address:
            calling = asyncio.create_task(call_switch(address, REQUEST))
            await until(worker, 1, 0)
        with pytest.raises(SwitchCallError):
            await asyncio.wait_for(calling, DEADLINE_S)

    asyncio.run(scenario())


def test_a_role_that_is_none_and_an_outcome_that_is_none_are_errors_of_the_wire() -> None:
    class Odd(pb_grpc.WorkerServicer):
        async def Switch(self, request: pb.SwitchRequest, context: SwitchContext) -> pb.SwitchReply:
            return pb.SwitchReply(outcome="exploded")

    async def scenario() -> None:
        worker = Worker()
        async with serving(Odd()) as address:
            with pytest.raises(SwitchCallError, match="exploded"):
                await call_switch(address, REQUEST)
        async with serving(Servicer(worker)) as address, aio.insecure_channel(address) as channel:
            with pytest.raises(aio.AioRpcError, match="role 9"):
                await pb_grpc.WorkerStub(SealedChannel(channel)).Switch(pb.SwitchRequest(role=9))  # type: ignore[arg-type]
        assert worker.asked == []

    asyncio.run(scenario())
