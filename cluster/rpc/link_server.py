"""The worker's end of the links: Hello, Welcome, messages down, and per router one bounded outbox of entries up.

The engine never waits for a link: entries are put, and at most one message per link leaves for each `flush` (one per
engine step). A router that has MAX_UNTAKEN of them before it gets no more until it says that it has taken some: entries
melt together meanwhile; over the bound its link is broken, which drops its requests. The router's end is rpc/link.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import grpc
from grpc import aio

from cluster.rpc.convert import (
    WireError,
    batch_to_pb,
    heartbeat_to_pb,
    info_to_pb,
    router_message_from_pb,
    router_messages_in,
)
from cluster.rpc.outbox import MAX_UNTAKEN, WorkerOutbox
from cluster.rpc.pb import worker_pb2 as pb
from cluster.rpc.pb import worker_pb2_grpc as pb_grpc
from cluster.rpc.race import StreamEndedError, race
from cluster.rpc.switch_server import SwitchContext, SwitchMethod
from cluster.types import Entry, Failed, Heartbeat, RouterMessage, WorkerInfo

_log = logging.getLogger(__name__)
HELLO_S = 3.0
MAX_LINKS = 64
LinkContext = aio.ServicerContext[pb.RouterMessage, pb.WorkerMessage]


class LinkHandler(Protocol):
    """Whom the links report to: the worker's shell. Called in the event loop; must not block."""

    def info(self) -> WorkerInfo:
        """What Welcome says."""
        ...

    def on_router_message(self, link_id: str, message: RouterMessage) -> None:
        """A router wants something."""
        ...

    def on_link_broken(self, link_id: str) -> None:
        """A link ended, for whatever reason. Exactly once for each link that sent something."""
        ...


class _Link:
    """One router's stream."""

    def __init__(self, link_id: str, max_tokens: int) -> None:
        self.link_id = link_id
        self.outbox = WorkerOutbox(max_tokens)
        self.heartbeat: Heartbeat | None = None
        self.num_read = 0  # messages since Hello
        self.num_untaken = 0  # batches written that the router has not said to have taken
        self.wake = asyncio.Event()
        self.broken = asyncio.Event()
        self.reason = ""

    def break_off(self, reason: str) -> None:
        self.reason = reason
        self.broken.set()

    async def wait_for_break(self) -> None:
        await self.broken.wait()
        raise StreamEndedError(self.reason)

    async def write(self, context: LinkContext) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            if self.heartbeat is not None:
                heartbeat, self.heartbeat = self.heartbeat, None
                message = heartbeat_to_pb(heartbeat)
                message.num_read = self.num_read
                await context.write(message)
            if self.num_untaken < MAX_UNTAKEN and (entries := self.outbox.take()):
                self.num_untaken += 1
                await context.write(batch_to_pb(entries))


class LinkServicer(pb_grpc.WorkerServicer):
    """neap.v1.Worker. `max_outbox_tokens` bounds what one router may leave unread; `switch` serves Switch."""

    def __init__(self, handler: LinkHandler, max_outbox_tokens: int, switch: SwitchMethod) -> None:
        self._handler = handler
        self._switch = switch
        self._max_outbox_tokens = max_outbox_tokens
        self._links: dict[str, _Link] = {}
        self._num_links = 0
        self._unflushed: set[str] = set()

    @property
    def num_links(self) -> int:
        """Links that are up."""
        return len(self._links)

    @property
    def link_ids(self) -> tuple[str, ...]:
        """Links that are up, the oldest first."""
        return tuple(self._links)

    def put(self, link_id: str, entry: Entry) -> None:
        """Queue an entry for a router; dropped when its link is gone. It leaves at the next flush."""
        link = self._links.get(link_id)
        if link is None:
            return
        link.outbox.put(entry)
        self._unflushed.add(link_id)
        if link.outbox.is_over:
            link.break_off("the router does not read")

    def flush(self) -> None:
        """Let what was put leave: one message per link, or none for a link that is still writing the last one."""
        for link_id in self._unflushed:
            if link_id in self._links:
                self._links[link_id].wake.set()
        self._unflushed.clear()

    def send_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Tell every router; an unsent older one is replaced."""
        for link in self._links.values():
            link.heartbeat = heartbeat
            link.wake.set()

    def break_all(self, reason: str) -> None:
        """End every link."""
        for link in list(self._links.values()):
            link.break_off(reason)

    async def Switch(self, request: pb.SwitchRequest, context: SwitchContext) -> pb.SwitchReply:
        """See proto/worker.proto."""
        return await self._switch.serve(request, context)

    async def Link(self, request_iterator: object, context: LinkContext) -> None:
        """See proto/worker.proto."""
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no Hello")
        if not isinstance(hello, pb.RouterMessage) or hello.WhichOneof("kind") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a link begins with Hello")
        if len(self._links) >= MAX_LINKS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many links")
        self._num_links += 1
        link = _Link(f"{hello.hello.router_id[:64]}/{self._num_links}", self._max_outbox_tokens)
        await context.write(pb.WorkerMessage(welcome=info_to_pb(self._handler.info())))
        self._links[link.link_id] = link
        reason = "the router is gone"
        try:
            await race(self._read(link, context), link.write(context), link.wait_for_break())
        except (StreamEndedError, WireError) as error:
            reason = str(error)
        finally:
            _log.info("link %s: %s", link.link_id, reason)
            del self._links[link.link_id]
            self._handler.on_link_broken(link.link_id)
        await context.abort(grpc.StatusCode.ABORTED, reason)

    async def _read(self, link: _Link, context: LinkContext) -> None:
        while True:
            message = await context.read()
            if not isinstance(message, pb.RouterMessage):
                raise StreamEndedError("the router closed the link")
            link.num_read += 1
            for part in router_messages_in(message):
                self._take(link, part)

    def _take(self, link: _Link, message: pb.RouterMessage) -> None:
        """Hand one message on. A dispatch that makes no sense fails alone; else raises WireError."""
        if message.taken:
            link.num_untaken = max(0, link.num_untaken - message.taken)
            link.wake.set()
            return
        try:
            request = router_message_from_pb(message)
        except WireError as error:
            if not message.dispatch.request_id:
                raise
            failed = Failed(
                request_id=message.dispatch.request_id,
                attempt=message.dispatch.attempt,
                code="invalid_value",
                message=str(error),
            )
            self.put(link.link_id, failed)
            self.flush()
            return
        self._handler.on_router_message(link.link_id, request)
