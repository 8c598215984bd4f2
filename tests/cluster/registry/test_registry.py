"""One suite for both keepers: several watchers, rules, expiry, a server that goes and comes back empty."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec import structs
from redis.asyncio import Redis

from cluster.registry.connect import connect
from cluster.registry.redis_registry import RedisRegistry
from cluster.registry.registry import Registry, RegistryClient, RegistryLostError, RegistryServer
from cluster.types import WorkerInfo
from tests.cluster.registry.keepers import RedisKeeper, running

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


async def current(registry: Registry) -> Map:
    """The map as a newcomer sees it."""
    watch = registry.watch()
    try:
        async with asyncio.timeout(30):
            return await anext(watch)
    finally:
        await watch.aclose()  # type: ignore[attr-defined]


def test_watchers_get_the_map_at_once_and_after_each_change(kind: str) -> None:
    async def scenario() -> None:
        async with running(kind) as keeper:
            writer, reader = keeper.client(), keeper.client()
            early = reader.watch()
            assert await anext(early) == ()
            await writer.put(INFO, 60_000)
            late = reader.watch()
            assert await until(early, bool) == await until(late, bool) == (INFO,)
            switched = structs.replace(INFO, epoch=2, role="decode")
            await writer.put(switched, 60_000)
            assert await until(early, lambda m: m != (INFO,)) == (switched,)
            await writer.remove("prefill-0", "1" * 32)
            assert await current(writer) == (switched,)
            await writer.remove("prefill-0", INFO.incarnation)
            assert await until(late, lambda m: len(m) == 0) == ()
            for watch in (early, late):
                await watch.aclose()  # type: ignore[attr-defined]
            await writer.close()
            await reader.close()

    asyncio.run(scenario())


def test_epochs_never_fall_and_former_incarnations_never_return(kind: str) -> None:
    async def scenario() -> None:
        async with running(kind) as keeper:
            registry = keeper.client()
            told: list[tuple[str, int]] = []
            for letter, epoch in [("a", 2), ("a", 1), ("a", 3), ("b", 1), ("a", 9), ("b", 2), ("c", 1), ("b", 3)]:
                await registry.put(structs.replace(INFO, incarnation=letter * 32, epoch=epoch), 60_000)
                (info,) = await current(registry)
                told.append((info.incarnation[0], info.epoch))
            assert told == [("a", 2), ("a", 2), ("a", 3), ("b", 1), ("b", 1), ("b", 2), ("c", 1), ("c", 1)]
            await registry.remove("prefill-0", "c" * 32)
            await registry.put(structs.replace(INFO, incarnation="c" * 32, epoch=9), 60_000)
            assert await current(registry) == ()
            await registry.close()

    asyncio.run(scenario())


def test_several_workers_come_by_id(kind: str) -> None:
    async def scenario() -> None:
        async with running(kind) as keeper:
            registry = keeper.client()
            infos = [structs.replace(INFO, worker_id=f"decode-{i}", incarnation=f"{i}" * 32) for i in range(5)]
            await asyncio.gather(*(registry.put(info, 60_000) for info in reversed(infos)))
            assert await current(registry) == tuple(infos)
            await registry.close()

    asyncio.run(scenario())


def test_a_worker_that_falls_silent_leaves_the_map(kind: str) -> None:
    async def scenario() -> None:
        async with running(kind) as keeper:
            client = keeper.client()
            watch = client.watch()
            await client.put(INFO, 200)
            assert await until(watch, bool) == (INFO,)
            assert await until(watch, lambda m: len(m) == 0) == ()
            await client.put(INFO, 60_000)  # silence is no crime
            assert await until(watch, bool) == (INFO,)
            await watch.aclose()  # type: ignore[attr-defined]
            await client.close()

    asyncio.run(scenario())


def test_clients_outlive_the_server(kind: str) -> None:
    async def scenario() -> None:
        async with running(kind) as keeper:
            client = keeper.client()
            watch = client.watch()
            await client.put(INFO, 60_000)
            assert await until(watch, bool) == (INFO,)
            await keeper.stop()
            with pytest.raises(RegistryLostError):
                await client.put(INFO, 60_000)
            with pytest.raises(RegistryLostError):
                await client.remove(INFO.worker_id, INFO.incarnation)
            await keeper.start()

            async def keep_putting() -> None:
                while True:
                    try:
                        return await client.put(INFO, 60_000)
                    except RegistryLostError:
                        await asyncio.sleep(0.1)

            async with asyncio.timeout(30):
                await keep_putting()
            assert await until(watch, bool) == (INFO,)
            await watch.aclose()  # type: ignore[attr-defined]
            await client.close()

    asyncio.run(scenario())


def test_an_entry_that_makes_no_sense_hides_no_other() -> None:
    async def scenario() -> None:
        async with running("redis") as keeper:
            assert isinstance(keeper, RedisKeeper)
            registry = keeper.client()
            await registry.put(INFO, 60_000)
            raw = Redis.from_url(keeper.url)
            await raw.zadd("neap:ids", {"decode-9": 1e12})
            await raw.hset("neap:worker:decode-9", "info", b"\xff\xff")
            assert await current(registry) == (INFO,)
            await raw.aclose()
            await registry.close()

    asyncio.run(scenario())


def test_the_address_says_which_keeper_it_is_and_errors_show_no_password() -> None:
    assert isinstance(connect("127.0.0.1:1"), RegistryClient)
    secret = connect("redis://:hunter2@127.0.0.1:1/0")
    assert isinstance(secret, RedisRegistry)
    with pytest.raises(RegistryLostError) as caught:
        asyncio.run(secret.put(INFO, 1000))
    assert "hunter2" not in str(caught.value)


def test_a_taken_port_is_an_os_error() -> None:
    async def scenario() -> None:
        server = RegistryServer()
        await server.start()
        with pytest.raises(OSError, match="cannot listen"):
            await RegistryServer(port=server.port).start()
        await server.stop()

    asyncio.run(scenario())
