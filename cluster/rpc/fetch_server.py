"""The source's end of KVSource.Fetch: open in, replies out in order, and one end for every call.

A call's replies wait in a queue; pieces are packed (in a thread) only when it is their turn to be written, so a
receiver that takes little costs no memory. The receiver's end is rpc/fetch_client.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import grpc
from grpc import aio

from cluster.rpc.convert import WireError
from cluster.rpc.convert_fetch import fetch_reply_to_pb, open_from_pb, taken_from_pb
from cluster.rpc.pb import kv_source_pb2 as pb
from cluster.rpc.pb import kv_source_pb2_grpc as pb_grpc
from cluster.rpc.race import StreamEndedError, race
from cluster.types import FetchAccepted, FetchOpen, FetchReply, FetchTaken, Piece, Transport

_log = logging.getLogger(__name__)
OPEN_S = 3.0
LAST_WORDS_S = 2.0  # what an ended call still has to say may take this long
MAX_CALLS = 256
FetchContext = aio.ServicerContext[pb.FetchClientMessage, pb.FetchReply]


class FetchHandler(Protocol):
    """Whom served calls report to: the worker's shell. Called in the event loop (pack: in a thread)."""

    def on_fetch(self, call: FetchOpen) -> None:
        """A call opened."""
        ...

    def on_taken(self, taken: FetchTaken) -> None:
        """The receiver holds more pieces."""
        ...

    def on_call_broken(self, call_id: str) -> None:
        """The call is over, however it ended. Exactly once per on_fetch."""
        ...

    def pack(self, transport: Transport, piece: Piece) -> Piece:
        """The piece as it goes on the wire."""
        ...


class _Served:
    """One call's replies on their way out; None in the queue ends it."""

    def __init__(self) -> None:
        self.replies: asyncio.Queue[FetchReply | None] = asyncio.Queue()
        self.ending = asyncio.Event()
        self.transport: Transport = "grpc"


class FetchServicer(pb_grpc.KVSourceServicer):
    """neap.v1.KVSource."""

    def __init__(self, handler: FetchHandler) -> None:
        self._handler = handler
        self._calls: dict[str, _Served] = {}

    def send(self, call_id: str, reply: FetchReply) -> None:
        """Queue a reply; dropped when the call is over."""
        call = self._calls.get(call_id)
        if call is None:
            return
        if isinstance(reply, FetchAccepted):
            call.transport = reply.transport
        call.replies.put_nowait(reply)

    def end(self, call_id: str) -> None:
        """End a call from our side once what was queued is written, at the latest after LAST_WORDS_S."""
        call = self._calls.get(call_id)
        if call is not None:
            call.replies.put_nowait(None)
            call.ending.set()

    async def Fetch(self, request_iterator: object, context: FetchContext) -> None:
        """See proto/kv_source.proto."""
        try:
            async with asyncio.timeout(OPEN_S):
                first = await context.read()
            if not isinstance(first, pb.FetchClientMessage):
                raise WireError("a call begins with open")
            opened = open_from_pb(first)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no open")
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if opened.call_id in self._calls:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "this call is being served")
        if len(self._calls) >= MAX_CALLS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls")
        call = self._calls[opened.call_id] = _Served()
        try:
            self._handler.on_fetch(opened)
            await race(self._read(opened.call_id, context), self._write(call, context), _last_words(call))
        except (StreamEndedError, WireError) as error:
            _log.info("call %s: %s", opened.call_id, error)
        finally:
            del self._calls[opened.call_id]
            self._handler.on_call_broken(opened.call_id)

    async def _read(self, call_id: str, context: FetchContext) -> None:
        while isinstance(message := await context.read(), pb.FetchClientMessage):
            self._handler.on_taken(taken_from_pb(call_id, message))

    async def _write(self, call: _Served, context: FetchContext) -> None:
        while (reply := await call.replies.get()) is not None:
            if isinstance(reply, Piece):
                reply = await asyncio.to_thread(self._handler.pack, call.transport, reply)
            await context.write(fetch_reply_to_pb(reply))


async def _last_words(call: _Served) -> None:
    await call.ending.wait()
    await asyncio.sleep(LAST_WORDS_S)
    raise StreamEndedError("the receiver does not read what it is told at the end")
