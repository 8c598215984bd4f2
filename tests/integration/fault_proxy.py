"""A TCP proxy between two gRPC peers that does to their connection what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 16 << 10
Direction = Literal["to_target", "to_client"]
Kind = Literal["none", "delay", "stall", "slow", "corrupt", "one_way", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to bytes from now on.

    delay: each chunk waits `delay_s`. slow: `bytes_per_s`. stall: nothing passes, both ways. one_way: nothing passes
    in `direction`. corrupt: one byte of the next chunk of at least `min_bytes` in `direction` is turned over, once.
    refuse: new connections are closed at once.
    """

    kind: Kind = "none"
    delay_s: float = 0.1
    bytes_per_s: float = 20_000.0
    direction: Direction = "to_client"
    min_bytes: int = 0

    def blocks(self, direction: Direction) -> bool:
        """Whether nothing passes this way."""
        return self.kind == "stall" or (self.kind == "one_way" and self.direction == direction)


HEALTHY = Fault()


class FaultProxy:
    """Forwards host:port from its birth on; `start` answers. `fault` may be set at any time."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._fault = HEALTHY
        self.num_bytes = 0
        self.num_corrupted = 0

    async def start(self) -> None:
        """Answer connections; those made since the birth have waited."""
        self._server = await asyncio.start_server(self._serve, sock=self._sock)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._sock.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()

    def cut(self) -> None:
        """End every connection without a word."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self._fault.kind != "refuse":
                await self._forward(reader, writer)
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            target_reader, target_writer = await asyncio.open_connection(self._host, self._port)
            self._writers.add(target_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, target_writer, "to_target")),
                asyncio.create_task(self._pump(target_reader, writer, "to_client")),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._writers.discard(target_writer)
                target_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._until_open(direction)
                fault = self._fault
                if fault.kind == "delay":
                    await asyncio.sleep(fault.delay_s)
                elif fault.kind == "slow":
                    await asyncio.sleep(len(data) / fault.bytes_per_s)
                elif fault.kind == "corrupt" and fault.direction == direction and len(data) >= fault.min_bytes:
                    data = _corrupted(data)
                    self.num_corrupted += 1
                    self.fault = HEALTHY
                self.num_bytes += len(data)
                writer.write(data)
                await writer.drain()

    async def _until_open(self, direction: Direction) -> None:
        """While nothing passes this way, wait."""
        while self._fault.blocks(direction):
            await self._changed.wait()


def _corrupted(data: bytes) -> bytes:
    """One byte in the middle turned over."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
