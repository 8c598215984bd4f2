"""The router's end of a link: connect, Hello, Welcome, messages both ways until it breaks; then again.

    start -> connecting -> (Welcome) up -> (any error, EOF, silence of the connection, full outbox, drop) down
                 ^------------- pause with jitter -------------------------------------'
on_welcome and on_down alternate, beginning with on_welcome. Nothing that was queued survives a break: the dispatcher
decides anew. The worker's end is rpc/link_server.py.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from grpc import aio

from cluster.rpc.channel import open_channel
from cluster.rpc.convert import WireError, router_batch_to_pb, worker_message_from_pb
from cluster.rpc.outbox import TAKEN_EVERY, RouterOutbox
from cluster.rpc.pb import worker_pb2 as pb
from cluster.rpc.pb import worker_pb2_grpc as pb_grpc
from cluster.rpc.race import StreamEndedError, race
from cluster.rpc.seal import SealedChannel
from cluster.types import Entry, Heartbeat, RouterMessage, WorkerInfo

LinkCall = aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]
_log = logging.getLogger(__name__)
WELCOME_S = 3.0
RECONNECT_S = (0.05, 1.0)  # first and longest pause
UNREAD_BEATS = 10  # heartbeats, 5 s: longer than the largest message is under way


class LinkClient:
    """The link of one router to one worker. Use it from one event loop; callbacks run in it and must not block."""

    def __init__(
        self,
        info: WorkerInfo,
        router_id: str,
        on_welcome: Callable[[WorkerInfo], None],
        on_heartbeat: Callable[[Heartbeat], None],
        on_entries: Callable[[str, tuple[Entry, ...]], None],
        on_down: Callable[[str], None],
    ) -> None:
        self.info = info
        self._router_id = router_id
        self._on_welcome = on_welcome
        self._on_heartbeat = on_heartbeat
        self._on_entries = on_entries
        self._on_down = on_down
        self._outbox: RouterOutbox | None = None
        self._wake = asyncio.Event()
        self._broken = asyncio.Event()
        self._reason = ""
        self._num_written = 0  # messages since Welcome
        self._num_read = 0  # of them, by the worker's own words
        self._num_beats_unread = 0  # heartbeats in a row that told of nothing read, though there was something
        self._num_taken = 0  # batches of entries, that the worker has not been told of
        self._task: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether the worker has said Welcome and the link has not broken since."""
        return self._outbox is not None

    def start(self) -> None:
        """Begin to connect, and to reconnect whenever the link breaks."""
        assert self._task is None, "a link is started once"
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link to {self.info.worker_id}")

    def send(self, message: RouterMessage) -> None:
        """Queue a message. While the link is down it is dropped; over the bound the link breaks. Never blocks."""
        if self._outbox is None:
            return
        self._outbox.put(message)
        self._wake.set()
        if self._outbox.is_over:
            self.drop("the worker does not take what it is sent")

    def drop(self, reason: str) -> None:
        """Break the link now; it connects anew."""
        self._reason = reason
        self._broken.set()

    async def close(self) -> None:
        """Break the link for good."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        pause = RECONNECT_S[0]
        while True:
            was_up = await self._connect()
            pause = RECONNECT_S[0] if was_up else min(2 * pause, RECONNECT_S[1])
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))

    async def _connect(self) -> bool:
        """One connection's life. Returns whether it came up."""
        self._broken.clear()
        channel = open_channel(self.info.address)
        was_up = False
        try:
            call: LinkCall = pb_grpc.WorkerStub(SealedChannel(channel)).Link()
            async with asyncio.timeout(WELCOME_S):
                info = await self._greet(call)
            was_up = True
            self._num_taken = self._num_written = self._num_read = self._num_beats_unread = 0
            self._outbox = RouterOutbox()
            self._on_welcome(info)
            await race(self._read(call), self._write(call, self._outbox), self._wait_for_drop())
        except (aio.AioRpcError, WireError, TimeoutError, StreamEndedError) as error:
            _log.info("link to %s at %s: %s", self.info.worker_id, self.info.address, describe(error))
        except Exception:  # a callback's fault: the link is not to be trusted, and must not stay down for it
            _log.exception("link to %s", self.info.worker_id)
        finally:
            if self._outbox is not None:
                self._outbox = None
                self._on_down(self.info.worker_id)
            await channel.close(None)
        return was_up

    async def _greet(self, call: LinkCall) -> WorkerInfo:
        await call.write(pb.RouterMessage(hello=pb.Hello(router_id=self._router_id)))
        first = await call.read()
        if not isinstance(first, pb.WorkerMessage):
            raise StreamEndedError("the worker ended the link")
        info = worker_message_from_pb(first)
        if not isinstance(info, WorkerInfo) or info.worker_id != self.info.worker_id:
            raise WireError(f"no Welcome of {self.info.worker_id}")
        return info

    async def _read(self, call: LinkCall) -> None:
        while isinstance(message := await call.read(), pb.WorkerMessage):
            news = worker_message_from_pb(message)
            if isinstance(news, tuple):
                self._on_entries(self.info.worker_id, news)
                self._num_taken += 1
                if self._num_taken >= TAKEN_EVERY:
                    self._wake.set()
            elif isinstance(news, Heartbeat):
                self._note_read(message.num_read)
                self._on_heartbeat(news)
            else:
                raise WireError("a second Welcome")
        raise StreamEndedError("the worker ended the link")

    def _note_read(self, num_read: int) -> None:
        """Raises WireError when our messages do not arrive any more, though the worker's do and pings pass."""
        is_stuck = num_read < self._num_written and num_read == self._num_read
        self._num_read = num_read
        self._num_beats_unread = self._num_beats_unread + 1 if is_stuck else 0
        if self._num_beats_unread > UNREAD_BEATS:
            raise WireError(f"the worker reads nothing after message {num_read} of {self._num_written}")

    async def _write(self, call: LinkCall, outbox: RouterOutbox) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while True:
                messages, taken = outbox.take_some(), self._num_taken
                if not messages and not taken:
                    break
                self._num_taken = 0
                await call.write(router_batch_to_pb(messages, taken))
                self._num_written += 1

    async def _wait_for_drop(self) -> None:
        await self._broken.wait()
        raise StreamEndedError(self._reason)


def describe(error: BaseException) -> str:
    """One line for a log: gRPC's own words only where it has nothing better than a code."""
    if isinstance(error, aio.AioRpcError):
        return f"{error.code().name.lower()}: {(error.details() or '')[:200]}"
    return str(error) or type(error).__name__
