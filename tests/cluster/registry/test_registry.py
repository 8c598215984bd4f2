"""The registry over gRPC: several watchers, expiry, a server that goes and comes back on the same port."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable

import pytest

from cluster.registry.registry import RegistryClient, RegistryLostError, RegistryServer
from cluster.types import WorkerInfo

INFO = WorkerInfo(
    worker_id="prefill-0",
    incarnation="0" * 32,
    epoch=1,
    role="prefill",
    state="ready",
    address="127.0.0.1:9",
    eos_token_ids=(2,),
    pool="prefill",
)
Map = tuple[WorkerInfo, ...]


async def until(watch: AsyncIterator[Map], wanted: Callable[[Map], bool]) -> Map:
    """The next map that is as wanted."""
    async with asyncio.timeout(30):
        while True:
            workers = await anext(watch)
            if wanted(workers):
                return workers


def test_watchers_get_the_map_at_once_and_after_each_change() -> None:
    async def scenario() -> None:
        server = RegistryServer()
        await server.start()
        writer, reader = RegistryClient(server.address), RegistryClient(server.address)
        early = reader.watch()
        assert await anext(early) == ()
        await writer.put(INFO, 60_000)
        late = reader.watch()
        assert await until(early, bool) == await until(late, bool) == (INFO,)
        switched = dataclasses.replace(INFO, epoch=2, role="decode")
        await writer.put(switched, 60_000)
        assert await until(early, lambda m: m != (INFO,)) == (switched,)
        await writer.remove("prefill-0", "1" * 32)
        assert server.workers() == (switched,)
        await writer.remove("prefill-0", INFO.incarnation)
        assert await until(late, lambda m: len(m) == 0) == ()
        await writer.close()
        await reader.close()
        await server.stop()

    asyncio.run(scenario())


def test_a_worker_that_falls_silent_leaves_the_map() -> None:
    async def scenario() -> None:
        server = RegistryServer()
        await server.start()
        client = RegistryClient(server.address)
        watch = client.watch()
        await client.put(INFO, 200)
        assert await until(watch, bool) == (INFO,)
        assert await until(watch, lambda m: len(m) == 0) == ()
        await client.close()
        await server.stop()

    asyncio.run(scenario())


def test_clients_outlive_the_server() -> None:
    async def scenario() -> None:
        first = RegistryServer()
        await first.start()
        client = RegistryClient(first.address)
        watch = client.watch()
        await client.put(INFO, 60_000)
        assert await until(watch, bool) == (INFO,)
        await first.stop()
        with pytest.raises(RegistryLostError, match="unavailable"):
            await client.put(INFO, 60_000)
        second = RegistryServer(port=first.port)
        await second.start()

        async def keep_putting() -> None:
            while True:
                try:
                    return await client.put(INFO, 60_000)
                except RegistryLostError:
                    await asyncio.sleep(0.1)

        async with asyncio.timeout(30):
            await keep_putting()
        assert await until(watch, bool) == (INFO,)
        await client.close()
        await second.stop()

    asyncio.run(scenario())


def test_a_taken_port_is_an_os_error() -> None:
    async def scenario() -> None:
        server = RegistryServer()
        await server.start()
        with pytest.raises(OSError, match="cannot listen"):
            await RegistryServer(port=server.port).start()
        await server.stop()

    asyncio.run(scenario())
