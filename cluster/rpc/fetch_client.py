"""The receiver's end of KVSource.Fetch: calls that this worker makes, over one shared channel per source.

A call that we close says nothing any more; any other ends with exactly one `on_fetch_broken`. The source's end is
rpc/fetch_server.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from grpc import aio

from cluster.rpc.channel import ChannelPool
from cluster.rpc.convert import WireError
from cluster.rpc.convert_fetch import fetch_reply_from_pb, open_to_pb, taken_to_pb
from cluster.rpc.link import describe
from cluster.rpc.pb import kv_source_pb2 as pb
from cluster.rpc.pb import kv_source_pb2_grpc as pb_grpc
from cluster.rpc.race import StreamEndedError, race
from cluster.rpc.seal import SealedChannel
from cluster.types import FetchOpen, FetchReply, FetchTaken, SourceRef

_log = logging.getLogger(__name__)
FetchStream = aio.StreamStreamCall[pb.FetchClientMessage, pb.FetchReply]


class FetchCallHandler(Protocol):
    """Whom our calls report to: the worker's shell. Called in the event loop."""

    def on_fetch_reply(self, call: FetchOpen, reply: FetchReply) -> None:
        """The source said something."""
        ...

    def on_fetch_broken(self, call: FetchOpen) -> None:
        """The source or the network ended the call."""
        ...


class _Call:
    """One call: its task, and the newest FetchTaken to send (each says everything that those before it said)."""

    def __init__(self, opened: FetchOpen) -> None:
        self.opened = opened
        self.task: asyncio.Task[None] | None = None
        self.taken: FetchTaken | None = None
        self.wake = asyncio.Event()


class FetchCalls:
    """Every call that this worker makes."""

    def __init__(self, handler: FetchCallHandler) -> None:
        self._handler = handler
        self._channels = ChannelPool()
        self._calls: dict[str, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, source: SourceRef, opened: FetchOpen) -> None:
        """Make a call."""
        assert opened.call_id not in self._calls, "call ids are unique"
        call = self._calls[opened.call_id] = _Call(opened)
        call.task = asyncio.get_running_loop().create_task(self._run(source, call), name=f"fetch {opened.call_id}")
        self._tasks.add(call.task)
        call.task.add_done_callback(self._tasks.discard)

    def send_taken(self, taken: FetchTaken) -> None:
        """Tell the source which pieces have landed; nothing when the call is over."""
        call = self._calls.get(taken.call_id)
        if call is not None:
            call.taken = taken
            call.wake.set()

    def close_call(self, call_id: str) -> None:
        """End a call; nothing of it is reported any more. Unknown ids are ignored."""
        call = self._calls.pop(call_id, None)
        if call is not None and call.task is not None:
            call.task.cancel()

    async def close(self) -> None:
        """End every call and every channel."""
        for call_id in list(self._calls):
            self.close_call(call_id)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channels.close()

    async def _run(self, source: SourceRef, call: _Call) -> None:
        reason = "the source ended it"
        try:
            with self._channels.use(source.address) as channel:
                stream: FetchStream = pb_grpc.KVSourceStub(SealedChannel(channel)).Fetch(
                    timeout=call.opened.remaining_ms / 1000
                )
                await stream.write(open_to_pb(call.opened))
                await race(self._read(call, stream), _write(call, stream))
            await self._channels.sweep()
        except (aio.AioRpcError, StreamEndedError, WireError) as error:
            reason = describe(error)
        except Exception:  # a fault of ours: the call is over all the same, and its request must go on
            _log.exception("call %s", call.opened.call_id)
        if self._calls.pop(call.opened.call_id, None) is not None:
            _log.info("call %s to %s: %s", call.opened.call_id, source.worker_id, reason)
            self._handler.on_fetch_broken(call.opened)

    async def _read(self, call: _Call, stream: FetchStream) -> None:
        while isinstance(message := await stream.read(), pb.FetchReply):
            if call.opened.call_id not in self._calls:
                return
            self._handler.on_fetch_reply(call.opened, fetch_reply_from_pb(message))


async def _write(call: _Call, stream: FetchStream) -> None:
    while True:
        await call.wake.wait()
        call.wake.clear()
        if call.taken is not None:
            taken, call.taken = call.taken, None
            await stream.write(taken_to_pb(taken))
