"""The registry as others see it: the Protocol, the gRPC client, and the server around the in-memory map.

A worker puts what it is, again before its time-to-live ends; a router watches. Both outlive the server: `put` says when
it could not (the worker tries again at its next turn), and `watch` reconnects for ever while the reader keeps the last
map it saw. A reader's own links to the workers, not this map, say who is alive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc
from grpc import aio

from cluster.registry.memory_registry import MemoryRegistry
from cluster.rpc.channel import SERVER_OPTIONS, open_channel
from cluster.rpc.convert import WireError, info_from_pb, info_to_pb
from cluster.rpc.pb import registry_pb2 as pb
from cluster.rpc.pb import registry_pb2_grpc as pb_grpc
from cluster.types import WorkerInfo

WATCH_REPEAT_S = 2.0  # the server repeats the map this often; a client that hears nothing for twice that reconnects
CALL_TIMEOUT_S = 2.0
RECONNECT_S = (0.05, 1.0)  # first and longest pause


class RegistryLostError(ConnectionError):
    """The registry did not answer; what was last known still holds."""


class Registry(Protocol):
    """What workers and routers need of a registry, whatever keeps it."""

    async def put(self, info: WorkerInfo, ttl_ms: int) -> None:
        """Publish `info` for ttl_ms. Raises RegistryLostError."""

    async def remove(self, worker_id: str, incarnation: str) -> None:
        """Take this incarnation out. Raises RegistryLostError."""

    def watch(self) -> AsyncIterator[tuple[WorkerInfo, ...]]:
        """The whole map at once and after each change; waits out lost connections and never ends by itself."""

    async def close(self) -> None:
        """Close the connections."""


class RegistryClient:
    """The registry over gRPC at `address` (host:port). Connects when first used."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: aio.Channel | None = None

    async def put(self, info: WorkerInfo, ttl_ms: int) -> None:
        """Publish `info` for ttl_ms. Raises RegistryLostError."""
        request = pb.PutRequest(info=info_to_pb(info), ttl_ms=ttl_ms)
        try:
            await self._stub().Put(request, timeout=CALL_TIMEOUT_S)
        except aio.AioRpcError as error:
            raise self._lost(error) from error

    async def remove(self, worker_id: str, incarnation: str) -> None:
        """Take this incarnation out. Raises RegistryLostError."""
        request = pb.RemoveRequest(worker_id=worker_id, incarnation=incarnation)
        try:
            await self._stub().Remove(request, timeout=CALL_TIMEOUT_S)
        except aio.AioRpcError as error:
            raise self._lost(error) from error

    async def watch(self) -> AsyncIterator[tuple[WorkerInfo, ...]]:
        """The whole map at once and after each change (and every 2 s); reconnects for ever."""
        pause = RECONNECT_S[0]
        while True:
            call = self._stub().Watch(pb.WatchRequest())
            replies = aiter(call)
            try:
                while True:
                    reply = await asyncio.wait_for(anext(replies), timeout=2 * WATCH_REPEAT_S)
                    pause = RECONNECT_S[0]
                    yield tuple(info_from_pb(info) for info in reply.workers)
            except (aio.AioRpcError, StopAsyncIteration, TimeoutError, WireError):
                pause = min(2 * pause, RECONNECT_S[1])
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Close the connection. The client can be used again; it then connects anew."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    def _stub(self) -> pb_grpc.RegistryStub:
        if self._channel is None:
            self._channel = open_channel(self.address)
        return pb_grpc.RegistryStub(self._channel)

    def _lost(self, error: aio.AioRpcError) -> RegistryLostError:
        return RegistryLostError(f"registry at {self.address}: {error.code().name.lower()}")


class RegistryServer(pb_grpc.RegistryServicer):
    """Serves a MemoryRegistry over gRPC and tells every watcher of each change."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.map = MemoryRegistry()
        self.host = host
        self.port = port
        self._clock = clock
        self._changed = asyncio.Event()
        self._server: aio.Server | None = None

    @property
    def address(self) -> str:
        """host:port, as clients on this machine reach it. Known after start()."""
        return f"{self.host}:{self.port}"

    async def start(self) -> None:
        """Bind and serve. Raises OSError if the port is taken."""
        server = aio.server(options=SERVER_OPTIONS)
        pb_grpc.add_RegistryServicer_to_server(self, server)
        try:
            self.port = server.add_insecure_port(f"{self.host}:{self.port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.host}:{self.port}") from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """End all calls now."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace=None)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The map as it is now, for the controller beside it."""
        self.map.expire(self._clock())
        return self.map.workers()

    def remove_worker(self, worker_id: str, incarnation: str) -> None:
        """Take out a worker whose process is known to be gone."""
        self.map.remove(worker_id, incarnation, now=self._clock())
        self._tell()

    async def Put(self, request: pb.PutRequest, context: aio.ServicerContext) -> pb.PutReply:  # type: ignore[type-arg]
        """See proto/registry.proto."""
        try:
            info = info_from_pb(request.info)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        self.map.put(info, ttl_s=request.ttl_ms / 1000, now=self._clock())
        self._tell()
        return pb.PutReply()

    async def Remove(self, request: pb.RemoveRequest, context: aio.ServicerContext) -> pb.RemoveReply:  # type: ignore[type-arg]
        """See proto/registry.proto."""
        self.remove_worker(request.worker_id, request.incarnation)
        return pb.RemoveReply()

    async def Watch(
        self,
        request: pb.WatchRequest,
        context: aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[pb.WatchReply]:
        """See proto/registry.proto."""
        while True:
            now = self._clock()
            self.map.expire(now)
            version, changed = self.map.version, self._changed
            yield pb.WatchReply(workers=[info_to_pb(info) for info in self.map.workers()])
            repeat = now + WATCH_REPEAT_S
            while self.map.version == version and (now := self._clock()) < repeat:
                wake = min(repeat, self.map.next_expiry() or repeat)
                try:
                    await asyncio.wait_for(changed.wait(), timeout=max(wake - now, 0.01))
                except TimeoutError:
                    self.map.expire(self._clock())
                changed = self._changed

    def _tell(self) -> None:
        """Wake the watchers; those that come later wait for the next event."""
        self._changed.set()
        self._changed = asyncio.Event()
