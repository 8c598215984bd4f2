"""Runs one cluster: serves the registry, launches workers and router, waits until all are ready, restarts what dies.

Life cycle:
    1. backend started (Ray: some seconds) while the checkpoint is looked up or made; registry served
    2. router and workers launched; each worker puts itself into the registry, the router watches it
    3. ready: the router says so, and every worker once stood in the registry as ready
    4. supervised: what ends is told, taken out of the registry, and started again, later and later
    5. stopped: the router drains, then the workers, then the backend and the registry end

Nothing here is in the way of a request: if this process stalls, serving goes on.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.config import ClusterConfig
from cluster.config.environment import child_environment
from cluster.control.backend import Backend, LaunchError, Needs, Progress, WorkerStatus
from cluster.control.child import Child
from cluster.control.restarts import Restarts
from cluster.control.router_client import RouterClient, reachable
from cluster.registry.registry import RegistryServer
from cluster.spec import RouterSpec, WorkerSpec

POLL_S = 0.3
ROUTER = "router"
ROUTER_DRAIN_S = 30.0
ROUTER_HURRY_S = 5.0
WORKER_DRAIN_S = 10.0
log = logging.getLogger("neap.control")


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """A worker for people. state: "launching", then the registry's word, or "ended"."""

    worker_id: str
    role: str
    state: str
    node: str = ""
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where the whole start stands. `doing` is for people; `ready` is said once and stays."""

    doing: str
    ready: bool
    workers: tuple[WorkerView, ...]


def router_argv(spec: Path) -> list[str]:
    """The command line of a router's process."""
    return [sys.executable, "-m", "cluster.router", str(spec)]


class Controller:
    """One cluster, from start() to stop(). `tell` gets one line for people per event."""

    def __init__(
        self,
        config: ClusterConfig,
        backend: Backend,
        *,
        run_dir: Path,
        tell: Callable[[str], None],
        router_argv: Callable[[Path], list[str]] = router_argv,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._backend = backend
        self._run_dir = run_dir
        self._tell = tell
        self._router_argv = router_argv
        self._clock = clock
        self._registry = RegistryServer(host="0.0.0.0" if config.worker_host == "auto" else config.worker_host)
        self._restarts = Restarts()
        self._specs: dict[str, WorkerSpec] = {}
        self._statuses: dict[str, WorkerStatus] = {}
        self._router: Child | None = None
        self.router_spec: RouterSpec | None = None
        self._doing = "starting"
        self._ready = False

    def snapshot(self) -> Snapshot:
        """Where the start stands now."""
        infos = {info.worker_id: info for info in self._registry.workers()}
        views = []
        for worker_id, spec in self._specs.items():
            status, info = self._statuses.get(worker_id), infos.get(worker_id)
            state: str = "launching" if info is None else info.state
            if status is not None and not status.alive:
                state = "ended"
            views.append(
                WorkerView(
                    worker_id=worker_id,
                    role=spec.role if info is None else info.role,
                    state=state,
                    node=status.node if status else "",
                    progress=status.progress if status else None,
                )
            )
        return Snapshot(doing=self._doing, ready=self._ready, workers=tuple(views))

    def router_client(self) -> RouterClient | None:
        """Talks to the router; None until its port is bound."""
        spec = self.router_spec
        if spec is None or self._router is None or not self._router.listening:
            return None
        port = int(self._router.listening.rpartition(":")[2])
        return RouterClient(host=reachable(spec.host), port=port, api_key=spec.api_key)

    async def start(self, model_path: Awaitable[str]) -> None:
        """Launch everything; ready comes later. Raises LaunchError, OSError (a port), ValueError (the checkpoint)."""
        self._doing = "starting Ray" if self._config.backend == "ray" else "preparing the model"
        path, _ = await asyncio.gather(model_path, self._backend.start())
        await self._registry.start()  # not before Ray: it forks, which a process with gRPC running had better not
        address = self._registry.address
        if self._config.worker_host == "auto":
            address = f"{self._backend.own_address}:{self._registry.port}"
        self.router_spec = self._config.router_spec(model_path=path, registry=address)
        self._launch_router()
        specs = self._config.worker_specs(model_path=path, registry=address, log_dir=str(self._run_dir))
        self._specs = {spec.worker_id: spec for spec in specs}
        self._doing = "workers are starting"
        for spec in specs:
            self._restarts.on_started(spec.worker_id, self._clock())
            await self._backend.launch(spec, self._needs(spec))

    async def run(self) -> None:
        """Supervise for ever. Raises LaunchError when a process that has never been ready fails for good."""
        while True:
            await asyncio.sleep(POLL_S)
            for status in await self._backend.statuses():
                self._statuses[status.worker_id] = status
                if not status.alive:
                    self._worker_ended(status)
            self._check_router()
            await self._start_what_is_due()
            await self._check_ready()

    async def stop(self, *, hurry: asyncio.Event) -> None:
        """Drain the router, then the workers; `hurry` cuts the waiting short. Leaves no process behind."""
        self._doing = "draining"
        if self._router is not None:
            self._router.terminate()
            drained = asyncio.create_task(asyncio.to_thread(self._router.wait, ROUTER_DRAIN_S))
            hurried = asyncio.create_task(hurry.wait())
            await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            if hurry.is_set():  # the second signal lets it end its streams with an error event, without waiting
                self._router.terminate()
                await asyncio.to_thread(self._router.wait, ROUTER_HURRY_S)
            self._router.kill()
            await drained
            self._router = None
        await self._backend.stop(0.5 if hurry.is_set() else WORKER_DRAIN_S)
        await self._registry.stop()

    def _needs(self, spec: WorkerSpec) -> Needs:
        pool = self._config.pool(spec.pool)
        return Needs(
            num_cpus=self._config.num_cpus(pool), num_gpus=pool.num_gpus, accelerator_type=pool.accelerator_type
        )

    def _launch_router(self) -> None:
        assert self.router_spec is not None, "the router's spec is made before it is launched"
        path = self._run_dir / "router.json"
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode(self.router_spec))
        self._restarts.on_started(ROUTER, self._clock())
        self._router = Child(self._router_argv(path), log=self._run_dir / "router.log", env=child_environment())

    def _worker_ended(self, status: WorkerStatus) -> None:
        for info in self._registry.workers():
            if info.worker_id == status.worker_id:
                self._registry.remove_worker(info.worker_id, info.incarnation)
        self._ended(status.worker_id, status.failed, status.last_words, status.log)

    def _check_router(self) -> None:
        assert self._router is not None, "run() comes after start() and before stop()"
        if self._router.exit_code is not None:
            words = f"{self._router.last_words()} (exit code {self._router.exit_code})"
            self._ended(ROUTER, bool(self._router.failed), words, str(self._router.log))

    def _ended(self, process_id: str, failed: bool, words: str, log_path: str) -> None:
        """Tell it once and plan the restart. Raises LaunchError if the cluster is not up and trying again is no use."""
        if self._restarts.waits(process_id):
            return
        pause = self._restarts.on_ended(process_id, self._clock())
        if pause is None or (failed and not self._ready):
            raise LaunchError(f"{process_id} does not start: {words}; its log: {log_path}")
        self._tell(f"{process_id} ended: {words}; starting it again in {pause:g} s (log: {log_path})")

    async def _start_what_is_due(self) -> None:
        for process_id in self._restarts.due(self._clock()):
            if process_id == ROUTER:
                self._launch_router()
                continue
            self._restarts.on_started(process_id, self._clock())
            self._statuses.pop(process_id, None)
            spec = self._specs[process_id]
            try:
                await self._backend.launch(spec, self._needs(spec))
            except LaunchError as error:
                self._statuses[process_id] = WorkerStatus(worker_id=process_id, alive=False, last_words=str(error))

    async def _check_ready(self) -> None:
        """Note what became ready; the cluster is once the router and all workers are at the same time."""
        ready = {info.worker_id for info in self._registry.workers() if info.state == "ready"}
        for worker_id in ready & self._specs.keys():
            self._restarts.on_ready(worker_id)
        if self._ready:
            return
        if ready < self._specs.keys():
            self._doing = "workers are starting"
            return
        client = self.router_client()
        if client is None:
            self._doing = "the router is starting"
            return
        readiness = await client.readiness()
        self._doing = readiness.reason or "the router is starting"
        if readiness.ready:
            self._restarts.on_ready(ROUTER)
            self._ready, self._doing = True, "serving"
