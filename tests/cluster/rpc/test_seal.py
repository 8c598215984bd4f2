"""The seal: any wrong byte of a message is found, the bytes stay protobuf, and a broken message ends its stream."""

from __future__ import annotations

import asyncio

import pytest
from grpc import aio

from cluster.rpc.channel import SERVER_OPTIONS, open_channel
from cluster.rpc.pb import kv_source_pb2, kv_source_pb2_grpc, worker_pb2
from cluster.rpc.seal import SealedChannel, SealedServer, is_whole, sealed

DISPATCH = worker_pb2.RouterMessage(
    dispatch=worker_pb2.Dispatch(request_id="r", attempt=1, prompt=bytes(range(200)), remaining_ms=1000)
)
PIECE = kv_source_pb2.FetchReply(piece=kv_source_pb2.Piece(call_id="c", checksums=[7], payload=b"kv" * 1000))
NEWS = kv_source_pb2.FetchReply(news=kv_source_pb2.FetchNews(computed_tokens=5))


def test_a_sealed_message_is_plain_protobuf() -> None:
    data = sealed(DISPATCH.SerializeToString())
    assert is_whole(data)
    parsed = worker_pb2.RouterMessage.FromString(data)
    assert parsed.dispatch == DISPATCH.dispatch and parsed.seal != 0


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_wrong_byte_is_found(mask: int) -> None:
    data = sealed(DISPATCH.SerializeToString())
    for at in range(len(data)):
        assert not is_whole(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
    for length in range(len(data)):
        assert not is_whole(data[:length])


class Source(kv_source_pb2_grpc.KVSourceServicer):
    """Answers each message with a piece and news; remembers what it understood."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    async def Fetch(self, request_iterator: object, context: aio.ServicerContext) -> None:  # type: ignore[type-arg]
        while isinstance(message := await context.read(), kv_source_pb2.FetchClientMessage):
            self.seen.append(message.taken.piece_index)
            await context.write(PIECE)
            await context.write(NEWS)
        self.seen.append("over")


async def talk(source: Source, last: bytes) -> list[object]:
    """One good message, then `last` as it is; what came back until the stream ended."""
    server = aio.server(options=SERVER_OPTIONS)
    kv_source_pb2_grpc.add_KVSourceServicer_to_server(source, SealedServer(server))  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    came: list[object] = []
    async with open_channel(f"127.0.0.1:{port}") as channel:
        raw = channel.stream_stream("/neap.v1.KVSource/Fetch")
        good = kv_source_pb2.FetchClientMessage(taken=kv_source_pb2.FetchTaken(piece_index=3))
        call = raw()
        for data in (sealed(good.SerializeToString()), last):
            await call.write(data)
        await call.done_writing()
        async with asyncio.timeout(60):
            while (data := await call.read()) is not aio.EOF:
                came.append(data)
        stub = kv_source_pb2_grpc.KVSourceStub(SealedChannel(channel)).Fetch()  # type: ignore[arg-type]
        await stub.write(good)
        assert [(await stub.read()).WhichOneof("kind") for _ in range(2)] == ["piece", "news"]
        stub.cancel()
    await server.stop(None)
    return came


def test_a_broken_message_is_not_handed_on_and_ends_its_stream_only(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    bad = kv_source_pb2.FetchClientMessage(taken=kv_source_pb2.FetchTaken(piece_index=4)).SerializeToString()
    came = asyncio.run(talk(source, sealed(bad)[:-1] + b"x"))
    assert source.seen[:3] == [3, "over", 3], "the broken one was taken for a message"
    assert came[0] == PIECE.SerializeToString() and came[1] == sealed(NEWS.SerializeToString())
    assert "is not what was sent" in caplog.text
