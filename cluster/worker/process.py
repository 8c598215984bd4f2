"""The worker's process: signals, heartbeats, the registry, and the order in which things end.

    SIGTERM, SIGINT      drain (DRAIN_S at most; a second signal ends it), leave the registry, exit 0
    parent gone          the same without the drain
    rank gone            links broken (their routers fail or move the requests), leave the registry, exit 1
News for whoever started us go to stdout, one JSON object a line, by its key: "progress", "listening" or "failed".
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable
from functools import partial

from cluster.registry.connect import connect
from cluster.registry.registry import RegistryLostError
from cluster.spec import WorkerSpec
from cluster.types import HEARTBEAT_S, WorkerInfo
from cluster.worker.lifeline import is_pipe, watch_pipe
from cluster.worker.service import WorkerService
from engine.messages import RankProgress

_log = logging.getLogger(__name__)
DRAIN_S = 5.0
DRAIN_POLL_S = 0.05
REGISTRY_TTL_MS = 4000
REGISTRY_PUT_S = 1.0


class WorkerProcess:
    """One run of a worker, from start to exit code. `say` gets the news."""

    def __init__(self, spec: WorkerSpec, say: Callable[[dict[str, object]], None]) -> None:
        self._spec = spec
        self._say = say
        self._registry = connect(spec.registry) if spec.registry else None
        self._info: WorkerInfo | None = None
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._num_signals = 0
        self._orphaned = False
        self._death: str | None = None

    async def run(self) -> int:
        """Serve until told to stop or the rank dies. Returns the exit code. Raises OSError if the port is taken."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if is_pipe(sys.stdin.fileno()):
            watch_pipe(sys.stdin.fileno(), partial(loop.call_soon_threadsafe, self._on_orphaned))
        service = WorkerService(
            self._spec, on_state=self._on_state, on_progress=self._on_progress, on_dead=self._on_dead
        )
        await service.start()
        assert self._info is not None, "start() tells what the worker is"
        self._say({"listening": self._info.address})
        beat, publish = loop.create_task(self._beat(service)), loop.create_task(self._publish())
        await self._stop.wait()
        await _end(publish)
        await self._leave_registry()
        if self._death is None and not self._orphaned:
            await self._drain(service)
        await _end(beat)
        await service.close(self._death or "the worker is shutting down")
        return 0 if self._death is None else 1

    # ---- what happens to us

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop.set()

    def _on_orphaned(self) -> None:
        self._orphaned = True
        self._stop.set()

    def _on_dead(self, reason: str) -> None:
        _log.error("the rank is gone: %s", reason)
        self._say({"failed": reason})
        self._death = reason
        self._stop.set()

    def _on_state(self, info: WorkerInfo) -> None:
        _log.info("%s %s: %s at %s", info.worker_id, info.role, info.state, info.address)
        self._info = info
        self._changed.set()

    def _on_progress(self, progress: RankProgress) -> None:
        self._say({"progress": {"stage": progress.stage, "done": progress.done, "total": progress.total}})

    # ---- what we do meanwhile

    async def _beat(self, service: WorkerService) -> None:
        while True:
            service.beat()
            await asyncio.sleep(HEARTBEAT_S)

    async def _publish(self) -> None:
        """Keep our entry in the registry alive. A registry that is away is no trouble: the links carry what matters."""
        reachable = True
        while self._registry is not None:
            self._changed.clear()
            try:
                assert self._info is not None, "published after start"
                await self._registry.put(self._info, REGISTRY_TTL_MS)
                reachable = True
            except RegistryLostError as error:
                if reachable:
                    _log.warning("%s", error)
                reachable = False
            try:
                await asyncio.wait_for(self._changed.wait(), REGISTRY_PUT_S)
            except TimeoutError:
                continue

    async def _drain(self, service: WorkerService) -> None:
        await service.begin_drain()
        deadline = asyncio.get_running_loop().time() + DRAIN_S
        signals = self._num_signals
        while service.num_live and self._num_signals == signals and self._death is None:
            if asyncio.get_running_loop().time() > deadline:
                _log.warning("%d requests are not over after %g s", service.num_live, DRAIN_S)
                return
            await asyncio.sleep(DRAIN_POLL_S)

    async def _leave_registry(self) -> None:
        if self._registry is None or self._info is None:
            return
        try:
            await self._registry.remove(self._info.worker_id, self._info.incarnation)
        except RegistryLostError as error:
            _log.info("%s", error)
        await self._registry.close()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s failed", task.get_coro(), exc_info=error)


def say(news: dict[str, object]) -> None:
    """One line of news on stdout. Nobody may be reading any more."""
    try:
        print(json.dumps(news), flush=True)
    except BrokenPipeError:
        _log.info("nobody reads: %s", news)
