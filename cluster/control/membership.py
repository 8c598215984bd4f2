"""The controller's view of the registry: the map that it serves itself, or one in Redis that it only follows."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from cluster.control.backend import LaunchError
from cluster.registry.redis_registry import RedisRegistry
from cluster.registry.registry import RegistryLostError
from cluster.types import WorkerInfo

log = logging.getLogger("neap.control")


class Membership(Protocol):
    """What the controller needs; registry.RegistryServer is one."""

    @property
    def address(self) -> str:
        """Where processes on this machine find the registry. Known after start()."""
        ...

    async def start(self) -> None:
        """Begin to serve or to follow. Raises OSError or LaunchError."""
        ...

    async def stop(self) -> None:
        """End it."""
        ...

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The map as last seen."""
        ...

    def remove_worker(self, worker_id: str, incarnation: str) -> None:
        """Take out a worker whose process is known to be gone."""
        ...


class RedisMembership:
    """Follows a Redis; while it is away the map seen last holds."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._registry = RedisRegistry(address)
        self._workers: tuple[WorkerInfo, ...] = ()
        self._following: asyncio.Task[None] | None = None
        self._removals: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to follow. Raises LaunchError when it can't be reached: at the start that is a wrong address."""
        try:
            self._workers = await self._registry.workers()
        except (RegistryLostError, ValueError) as error:
            raise LaunchError(str(error)) from error
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Follow no more."""
        tasks = [*self._removals, *([self._following] if self._following else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._registry.close()

    def workers(self) -> tuple[WorkerInfo, ...]:
        """See Membership."""
        return self._workers

    def remove_worker(self, worker_id: str, incarnation: str) -> None:
        """See Membership. An entry that can't be removed now expires by itself."""
        self._workers = tuple(info for info in self._workers if info.incarnation != incarnation)
        task = asyncio.create_task(self._remove(worker_id, incarnation))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove(self, worker_id: str, incarnation: str) -> None:
        try:
            await self._registry.remove(worker_id, incarnation)
        except RegistryLostError as error:
            log.warning("%s", error)

    async def _follow(self) -> None:
        async for workers in self._registry.watch():
            self._workers = workers
