"""Runs one cluster: serves the registry, launches workers and routers, waits until all are ready, restarts what dies.

Life cycle:
    1. backend started (Ray: some seconds) while the checkpoint is looked up or made; registry served, or Redis followed
    2. routers and workers launched; each worker puts itself into the registry, the routers watch it
    3. ready: every router says so, and every worker once stood in the registry as ready
    4. supervised: what ends is told, taken out of the registry, and started again, later and later; and roles are
       changed as the traffic asks for it, or people (roles.py, admin.py)
    5. stopped: the routers drain, then the workers, then the backend and the registry end

Nothing here is in the way of a request: if this process stalls, serving goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.control.admin_server import AdminServer
from cluster.control.backend import Backend, LaunchError, Needs, Progress, WorkerStatus
from cluster.control.membership import Membership, RedisMembership
from cluster.control.restarts import Restarts
from cluster.control.roles import Roles
from cluster.control.router_client import RouterClient
from cluster.control.routers import Routers, router_argv
from cluster.registry.registry import RegistryServer
from cluster.spec import RouterSpec, WorkerSpec

POLL_S = 0.3
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
        self._clock = clock
        self._registry = _membership(config)
        self._routers = Routers(run_dir, router_argv)
        self._restarts = Restarts()
        self.roles = Roles(
            config.roles_spec(),
            routers=self.router_clients,
            infos=self._registry.workers,
            wants_prefill=any(pool.role == "prefill" for pool in config.pools),
            needs_prefill=bool(config.router.model_dump()["require_prefill"]),
            tell=tell,
            clock=clock,
        )
        self.admin = AdminServer(config.admin, self.roles, self._router_urls, run_dir=run_dir)
        self._specs: dict[str, WorkerSpec] = {}
        self._statuses: dict[str, WorkerStatus] = {}
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
        """Talks to the first router; None until its port is bound."""
        return next(iter(self.router_clients()), None)

    def router_clients(self) -> tuple[RouterClient, ...]:
        """Talk to the routers whose ports are bound."""
        clients = (self._routers.client(name) for name in self._routers.names)
        return tuple(client for client in clients if client is not None)

    def _router_urls(self) -> tuple[str, ...]:
        return tuple(client.url for client in self.router_clients())

    async def start(self, model_path: Awaitable[str]) -> None:
        """Launch everything; ready comes later. Raises LaunchError, OSError (a port), ValueError (the checkpoint)."""
        self._doing = "starting Ray" if self._config.backend == "ray" else "preparing the model"
        path, _ = await asyncio.gather(model_path, self._backend.start())
        await self._registry.start()  # not before Ray: it forks, which a process with gRPC running had better not
        await self.admin.start()
        address = self._registry.address
        if self._config.worker_host == "auto" and isinstance(self._registry, RegistryServer):
            address = f"{self._backend.own_address}:{self._registry.port}"
        specs = self._config.router_specs(model_path=path, registry=address)
        self.router_spec = specs[0]
        self._routers.add(specs)
        for name in self._routers.names:
            self._launch_router(name)
        workers = self._config.worker_specs(model_path=path, registry=address, log_dir=str(self._run_dir))
        self._specs = {spec.worker_id: spec for spec in workers}
        self._doing = "workers are starting"
        for spec in workers:
            self._restarts.on_started(spec.worker_id, self._clock())
            await self._backend.launch(spec, self._needs(spec))

    async def run(self) -> None:
        """Supervise for ever. Raises LaunchError when a process that has never been ready fails for good."""
        planning: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(POLL_S)
                await self._supervise()
                self.admin.write_note()
                if self._ready and planning is None:
                    planning = asyncio.create_task(self.roles.run())
        finally:
            if planning is not None:
                planning.cancel()

    async def _supervise(self) -> None:
        """One round."""
        for status in await self._backend.statuses():
            self._statuses[status.worker_id] = status
            if not status.alive:
                self._worker_ended(status)
        for router in self._routers.ended():
            self._ended(router.name, router.failed, router.words, router.log)
        await self._start_what_is_due()
        await self._check_ready()

    async def stop(self, *, hurry: asyncio.Event) -> None:
        """Drain the routers, then the workers; `hurry` cuts the waiting short. Leaves no process behind."""
        self._doing = "draining"
        await self.admin.stop()
        await self.roles.close()
        await self._routers.stop(hurry)
        await self._backend.stop(0.5 if hurry.is_set() else WORKER_DRAIN_S)
        await self._registry.stop()

    def _needs(self, spec: WorkerSpec) -> Needs:
        pool = self._config.pool(spec.pool)
        return Needs(
            num_cpus=self._config.num_cpus(pool), num_gpus=pool.num_gpus, accelerator_type=pool.accelerator_type
        )

    def _launch_router(self, name: str) -> None:
        self._restarts.on_started(name, self._clock())
        self._routers.launch(name)

    def _worker_ended(self, status: WorkerStatus) -> None:
        for info in self._registry.workers():
            if info.worker_id == status.worker_id:
                self._registry.remove_worker(info.worker_id, info.incarnation)
                self.roles.on_worker_lost(info.worker_id)
        self._ended(status.worker_id, status.failed, status.last_words, status.log)

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
            if process_id in self._routers.names:
                self._launch_router(process_id)
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
        for name in self._routers.names:
            client = self._routers.client(name)
            if client is None:
                self._doing = f"the {name} is starting"
                return
            readiness = await client.readiness()
            self._doing = readiness.reason or f"the {name} is starting"
            if not readiness.ready:
                return
            self._restarts.on_ready(name)
        self._ready, self._doing = True, "serving"


def _membership(config: ClusterConfig) -> Membership:
    if config.registry:
        return RedisMembership(config.registry)
    return RegistryServer(host="0.0.0.0" if config.worker_host == "auto" else config.worker_host)
