"""Both ends of a link over real gRPC on loopback: greeting, messages, breaks, reconnects, readers that don't read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from msgspec.structs import replace

from cluster.rpc.channel import open_channel
from cluster.rpc.convert import heartbeat_to_pb, info_to_pb
from cluster.rpc.link import UNREAD_BEATS, LinkClient
from cluster.rpc.link_server import LinkServicer
from cluster.rpc.pb import kv_source_pb2_grpc, worker_pb2
from cluster.rpc.pb import worker_pb2_grpc as pb_grpc
from cluster.rpc.seal import SealedChannel
from cluster.rpc.server import WorkerServer
from cluster.rpc.switch_server import SwitchMethod
from cluster.types import (
    AbortRequest,
    Choice,
    Dispatch,
    Entry,
    Heartbeat,
    RouterMessage,
    SwitchReply,
    SwitchRequest,
    Tokens,
    WorkerInfo,
)
from engine.request import SamplingParams

INFO = WorkerInfo(worker_id="d", incarnation="1", epoch=1, role="decode", state="ready", address="")
DISPATCH = Dispatch(
    request_id="r",
    attempt=1,
    incarnation="1",
    epoch=1,
    prompt=b"abcd",
    choices=(Choice(index=0, seed=0),),
    params=SamplingParams(),
    remaining_ms=1,
)


@dataclass
class Worker:
    """A worker without an engine: keeps what it is told."""

    messages: list[tuple[str, RouterMessage]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    address: str = ""
    worker_id: str = "d"

    def info(self) -> WorkerInfo:
        return replace(INFO, address=self.address, worker_id=self.worker_id)

    def on_router_message(self, link_id: str, message: RouterMessage) -> None:
        self.messages.append((link_id, message))

    def on_link_broken(self, link_id: str) -> None:
        self.broken.append(link_id)

    async def switch(self, request: SwitchRequest) -> SwitchReply:
        return SwitchReply(outcome="refused", info=self.info(), reason="it has no engine")


@dataclass
class Router:
    """A router without a dispatcher: keeps what it is told."""

    events: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    num_messages: int = 0

    def has_tokens(self, count: int) -> bool:
        return sum(len(entry.token_ids) for entry in self.entries if isinstance(entry, Tokens)) == count

    def link(self, info: WorkerInfo) -> LinkClient:
        return LinkClient(
            info,
            "router",
            self.on_welcome,
            self.heartbeats.append,
            self.on_entries,
            lambda _: self.events.append("down"),
        )

    def on_welcome(self, info: WorkerInfo) -> None:
        self.events.append(f"up {info.incarnation}")

    def on_entries(self, worker_id: str, entries: tuple[Entry, ...]) -> None:
        assert worker_id == "d"
        self.num_messages += 1
        self.entries += entries


@asynccontextmanager
async def serving(
    worker: Worker, max_tokens: int = 1000, port: int = 0
) -> AsyncIterator[tuple[LinkServicer, WorkerServer]]:
    servicer = LinkServicer(worker, max_tokens, SwitchMethod(worker))
    server = WorkerServer(servicer, kv_source_pb2_grpc.KVSourceServicer(), host="127.0.0.1", port=port)
    worker.address = await server.start()
    try:
        yield servicer, server
    finally:
        await server.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (what is awaited lies behind callbacks)
            await asyncio.sleep(0.005)


def tokens(position: int, *ids: int) -> Tokens:
    return Tokens(request_id="r", attempt=1, choice=0, position=position, token_ids=ids)


def test_messages_go_both_ways_and_one_message_leaves_per_flush() -> None:
    async def run() -> None:
        worker, router = Worker(), Router()
        async with serving(worker) as (servicer, _):
            link = router.link(worker.info())
            link.start()
            await until(lambda: link.is_up)
            link.send(DISPATCH)
            link.send(AbortRequest(request_id="other", attempt=2))
            await until(lambda: len(worker.messages) == 2)
            assert {type(message) for _, message in worker.messages} == {Dispatch, AbortRequest}
            link_id = worker.messages[0][0]
            for i in range(5):
                servicer.put(link_id, tokens(i, i))
            servicer.flush()
            await until(lambda: router.entries)
            assert router.entries == [tokens(0, 0, 1, 2, 3, 4)]
            assert router.num_messages == 1
            servicer.send_heartbeat(Heartbeat(info=worker.info(), step_count=7))
            await until(lambda: router.heartbeats)
            assert router.heartbeats[0].step_count == 7
            await link.close()
            await until(lambda: worker.broken == [link_id])
            assert router.events == ["up 1", "down"]

    asyncio.run(run())


def test_a_link_comes_back_after_its_worker_went_away() -> None:
    async def run() -> None:
        worker, router = Worker(), Router()
        async with serving(worker):
            port = int(worker.address.rsplit(":", 1)[1])
            link = router.link(worker.info())
            link.start()
            await until(lambda: link.is_up)
        await until(lambda: router.events == ["up 1", "down"])
        link.send(DISPATCH)  # dropped: nobody is there
        async with serving(worker, port=port):
            await until(lambda: router.events == ["up 1", "down", "up 1"])
            await link.close()
        assert worker.messages == []

    asyncio.run(run())


def test_a_dropped_link_is_told_to_both_ends_and_made_anew() -> None:
    async def run() -> None:
        worker, router = Worker(), Router()
        async with serving(worker):
            link = router.link(worker.info())
            link.start()
            await until(lambda: link.is_up)
            link.drop("hung")
            await until(lambda: router.events == ["up 1", "down", "up 1"])
            assert len(worker.broken) == 1
            await link.close()

    asyncio.run(run())


class DeafWorker(pb_grpc.WorkerServicer):
    """Says Welcome and sends heartbeats, whose num_read is what the test says."""

    num_read = 0

    async def Link(self, request_iterator: object, context: aio.ServicerContext) -> None:  # type: ignore[type-arg]
        await context.read()
        await context.write(worker_pb2.WorkerMessage(welcome=info_to_pb(INFO)))
        while True:
            message = heartbeat_to_pb(Heartbeat(info=INFO))
            message.num_read = self.num_read
            await context.write(message)
            await asyncio.sleep(0.001)


def test_a_worker_that_reads_nothing_loses_its_link_only_when_there_is_something_to_read() -> None:
    async def run() -> None:
        worker, router = DeafWorker(), Router()
        server = WorkerServer(worker, kv_source_pb2_grpc.KVSourceServicer(), host="127.0.0.1", port=0)
        link = router.link(replace(INFO, address=await server.start()))
        link.start()
        await until(lambda: len(router.heartbeats) > 3 * UNREAD_BEATS)
        for _ in range(2):  # it reads a message, and then no more
            link.send(AbortRequest(request_id="r", attempt=1))
            wanted = len(router.heartbeats) + UNREAD_BEATS // 2
            await until(lambda wanted=wanted: len(router.heartbeats) > wanted)  # type: ignore[misc]
            worker.num_read = 1
        assert router.events == ["up 1"]
        worker.num_read = 1
        await until(lambda: router.events[:2] == ["up 1", "down"])
        await link.close()
        await server.stop()

    asyncio.run(run())


def test_another_worker_at_the_address_is_not_welcomed() -> None:
    async def run() -> None:
        worker, router = Worker(worker_id="somebody else"), Router()
        async with serving(worker):
            link = router.link(replace(INFO, address=worker.address))
            link.start()
            await until(lambda: worker.broken)
            assert router.events == []
            await link.close()

    asyncio.run(run())


def test_a_router_that_does_not_read_loses_its_link_and_others_keep_theirs() -> None:
    async def run() -> None:
        worker, router = Worker(), Router()
        async with serving(worker, max_tokens=50_000) as (servicer, _), open_channel(worker.address) as channel:
            link = router.link(worker.info())
            link.start()
            await until(lambda: link.is_up)
            deaf = pb_grpc.WorkerStub(SealedChannel(channel)).Link()
            await deaf.write(worker_pb2.RouterMessage(hello=worker_pb2.Hello(router_id="deaf")))
            await until(lambda: servicer.num_links == 2)
            link.send(DISPATCH)
            await until(lambda: worker.messages)
            mine, position = worker.messages[0][0], 0
            while not worker.broken:
                for link_id in (mine, "deaf/2"):
                    servicer.put(link_id, tokens(position, *range(10_000)))
                servicer.flush()
                position += 10_000
                await until(partial(router.has_tokens, position))
            assert worker.broken == ["deaf/2"]
            assert link.is_up
            deaf.cancel()
            await link.close()

    asyncio.run(run())


def test_a_bad_dispatch_fails_alone() -> None:
    async def run() -> None:
        worker = Worker()
        async with serving(worker), open_channel(worker.address) as channel:
            call = pb_grpc.WorkerStub(SealedChannel(channel)).Link()
            await call.write(worker_pb2.RouterMessage(hello=worker_pb2.Hello(router_id="r")))
            await call.read()
            await call.write(worker_pb2.RouterMessage(dispatch=worker_pb2.Dispatch(request_id="x", attempt=3)))
            message = await call.read()
            assert isinstance(message, worker_pb2.WorkerMessage)
            (entry,) = message.batch.entries
            assert (entry.request_id, entry.attempt, entry.failed.code) == ("x", 3, "invalid_value")
            assert worker.broken == []
            call.cancel()
            await until(lambda: worker.broken)

    asyncio.run(run())


def test_a_link_that_does_not_begin_with_hello_is_refused() -> None:
    async def run() -> None:
        worker = Worker()
        async with serving(worker), open_channel(worker.address) as channel:
            call = pb_grpc.WorkerStub(SealedChannel(channel)).Link()
            await call.write(worker_pb2.RouterMessage())
            with pytest.raises(aio.AioRpcError, match="begins with Hello"):
                await call.read()
                await call.read()

    asyncio.run(run())


def test_health_follows_set_serving() -> None:
    async def run() -> None:
        worker = Worker()
        async with serving(worker) as (_, server), open_channel(worker.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="neap.v1.Worker")
            assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await server.set_serving(True)
            assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(run())
