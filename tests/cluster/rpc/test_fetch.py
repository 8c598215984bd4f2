"""Both ends of KVSource.Fetch over real gRPC on loopback: order, packing, and one end for every call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from grpc import StatusCode, aio
from msgspec.structs import replace

from cluster.rpc.channel import open_channel
from cluster.rpc.convert_fetch import open_to_pb, taken_to_pb
from cluster.rpc.fetch_client import FetchCalls
from cluster.rpc.fetch_server import FetchServicer
from cluster.rpc.pb import kv_source_pb2 as pb
from cluster.rpc.pb import kv_source_pb2_grpc as pb_grpc
from cluster.rpc.pb import worker_pb2_grpc
from cluster.rpc.seal import SealedChannel
from cluster.rpc.server import WorkerServer
from cluster.types import (
    FetchAccepted,
    FetchBusy,
    FetchNews,
    FetchOfferedAll,
    FetchOpen,
    FetchReply,
    FetchTaken,
    Piece,
    SourceRef,
    Transport,
)

OPEN = FetchOpen(
    call_id="call",
    request_id="r",
    attempt=1,
    source_incarnation="s",
    receiver_id="d",
    receiver_incarnation="i",
    identity="x",
    kv_fingerprint="y",
    tokens=bytes(64),
    start=0,
    end=16,
    max_compute_tokens=-1,
    remaining_ms=60_000,
)
ACCEPTED = FetchAccepted(cached_tokens=0, end_tokens=16, queue_ms=0, transport="grpc")
PIECE = Piece(
    call_id="call",
    source_incarnation="s",
    index=0,
    first_block=0,
    end_tokens=16,
    num_layers=1,
    dtype="uint8",
    shape=(1, 2, 1, 16, 8),
    checksum_algorithm="xxh3_64",
    checksums=(1,),
    block_ids=(4,),
)


@dataclass
class Source:
    """A source without an engine."""

    opened: list[FetchOpen] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    packed: int = 0
    address: str = ""
    payload: bytes = b"bytes"

    def on_fetch(self, call: FetchOpen) -> None:
        self.opened.append(call)

    def on_taken(self, taken: FetchTaken) -> None:
        self.taken.append(taken.piece_index)

    def on_call_broken(self, call_id: str) -> None:
        self.broken.append(call_id)

    def pack(self, transport: Transport, piece: Piece) -> Piece:
        self.packed += 1
        return replace(piece, payload=self.payload) if transport == "grpc" else piece

    def ref(self) -> SourceRef:
        return SourceRef(worker_id="p", incarnation="s", address=self.address)


@dataclass
class Receiver:
    """A receiver without an engine."""

    replies: list[FetchReply] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def on_fetch_reply(self, call: FetchOpen, reply: FetchReply) -> None:
        self.replies.append(reply)

    def on_fetch_broken(self, call: FetchOpen) -> None:
        self.broken.append(call.call_id)


@asynccontextmanager
async def serving(source: Source) -> AsyncIterator[FetchServicer]:
    servicer = FetchServicer(source)
    server = WorkerServer(worker_pb2_grpc.WorkerServicer(), servicer, host="127.0.0.1", port=0)
    source.address = await server.start()
    try:
        yield servicer
    finally:
        await server.stop()


@asynccontextmanager
async def calling(source: Source, *opens: FetchOpen) -> AsyncIterator[tuple[FetchServicer, FetchCalls, Receiver]]:
    """A source, and a receiver whose calls have been opened."""
    async with serving(source) as servicer:
        receiver = Receiver()
        calls = FetchCalls(receiver)
        for opened in opens:
            calls.open(source.ref(), opened)
        await until(lambda: len(source.opened) == len(opens))
        try:
            yield servicer, calls, receiver
        finally:
            await calls.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (what is awaited lies behind callbacks)
            await asyncio.sleep(0.005)


def test_replies_arrive_in_order_and_pieces_carry_what_the_connector_packs() -> None:
    async def run() -> None:
        source = Source()
        async with calling(source, OPEN) as (servicer, calls, receiver):
            assert source.opened == [OPEN]
            for reply in (ACCEPTED, PIECE, FetchNews(computed_tokens=3, queue_ms=0), FetchOfferedAll()):
                servicer.send("call", reply)
            await until(lambda: len(receiver.replies) == 4)
            packed = replace(PIECE, payload=b"bytes")
            assert receiver.replies == [
                ACCEPTED,
                packed,
                FetchNews(computed_tokens=3, queue_ms=0),
                FetchOfferedAll(),
            ]
            calls.send_taken(FetchTaken(call_id="call", piece_index=0))
            await until(lambda: source.taken == [0])
            calls.close_call("call")
            await until(lambda: source.broken == ["call"])
            assert receiver.broken == []

    asyncio.run(run())


def test_what_is_said_last_arrives_before_the_end() -> None:
    async def run() -> None:
        source = Source()
        async with calling(source, OPEN) as (servicer, _, receiver):
            servicer.send("call", FetchBusy(retry_ms=7))
            servicer.end("call")
            await until(lambda: receiver.broken)
            assert receiver.replies == [FetchBusy(retry_ms=7)]
            assert source.broken == ["call"]

    asyncio.run(run())


def test_nothing_is_reported_of_a_call_that_we_closed() -> None:
    async def run() -> None:
        source = Source()
        async with calling(source, OPEN, replace(OPEN, call_id="other")) as (servicer, calls, receiver):
            servicer.send("call", ACCEPTED)
            calls.close_call("call")
            servicer.send("other", ACCEPTED)
            await until(lambda: receiver.replies)
            await until(lambda: source.broken)
            assert (receiver.replies, receiver.broken, source.broken) == ([ACCEPTED], [], ["call"])

    asyncio.run(run())


def test_a_source_that_goes_away_breaks_its_calls_once() -> None:
    async def run() -> None:
        source, receiver = Source(), Receiver()
        calls = FetchCalls(receiver)
        async with serving(source):
            calls.open(source.ref(), OPEN)
            await until(lambda: source.opened)
        await until(lambda: receiver.broken)
        calls.open(source.ref(), replace(OPEN, call_id="late"))  # nobody listens there any more
        await until(lambda: len(receiver.broken) == 2)
        assert receiver.broken == ["call", "late"]
        await calls.close()

    asyncio.run(run())


def test_a_deadline_ends_a_call_on_both_sides() -> None:
    async def run() -> None:
        source = Source()
        async with calling(source, replace(OPEN, remaining_ms=300)) as (_, _, receiver):
            await until(lambda: receiver.broken and source.broken)

    asyncio.run(run())


def test_a_receiver_that_reads_nothing_costs_no_memory_and_can_be_ended() -> None:
    async def run() -> None:
        source = Source(payload=bytes(4 << 20))
        async with serving(source) as servicer, open_channel(source.address) as channel:
            deaf = pb_grpc.KVSourceStub(SealedChannel(channel)).Fetch()
            await deaf.write(open_to_pb(OPEN))
            await until(lambda: source.opened)
            for index in range(64):
                servicer.send("call", replace(PIECE, index=index))
            await until(lambda: source.packed)
            await asyncio.sleep(0.3)
            assert source.packed < 16  # the rest waits unpacked
            servicer.end("call")
            await until(lambda: source.broken == ["call"])
            deaf.cancel()

    asyncio.run(run())


async def _status_of(source: Source, *messages: pb.FetchClientMessage) -> tuple[StatusCode, str]:
    async with serving(source), open_channel(source.address) as channel:
        call = pb_grpc.KVSourceStub(SealedChannel(channel)).Fetch()
        for message in messages:
            await call.write(message)
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        return caught.value.code(), caught.value.details() or ""


def test_a_call_that_does_not_begin_with_a_sane_open_is_refused() -> None:
    taken = taken_to_pb(FetchTaken(call_id="", piece_index=0))
    too_far = open_to_pb(replace(OPEN, end=17))
    for message, words in ((taken, "begins with open"), (too_far, r"[0, 17) of 16")):
        source = Source()
        code, details = asyncio.run(_status_of(source, message))
        assert code is StatusCode.INVALID_ARGUMENT
        assert words in details
        assert source.opened == []


def test_a_second_open_or_a_call_id_in_use_end_that_call_alone() -> None:
    async def run() -> None:
        source = Source()
        async with calling(source, OPEN) as (servicer, _, receiver), open_channel(source.address) as channel:
            twin = pb_grpc.KVSourceStub(SealedChannel(channel)).Fetch()
            await twin.write(open_to_pb(OPEN))
            with pytest.raises(aio.AioRpcError, match="being served"):
                await twin.read()
            rude = pb_grpc.KVSourceStub(SealedChannel(channel)).Fetch()
            await rude.write(open_to_pb(replace(OPEN, call_id="rude")))
            await rude.write(open_to_pb(replace(OPEN, call_id="rude")))
            await until(lambda: source.broken == ["rude"])
            servicer.send("call", ACCEPTED)
            await until(lambda: receiver.replies == [ACCEPTED])

    asyncio.run(run())
