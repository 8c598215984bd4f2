"""Workers as Ray actors: Ray places them, shows them in its dashboard, and tells when one is gone.

An actor holds no model. It starts `python -m cluster.worker` as its child in its own process group and reports on it,
so that a killed actor takes the worker with it (PDEATHSIG, stdin EOF, and Ray's kill of the group). Actors are started
again by the controller, not by Ray (max_restarts 0): it chooses the node anew and spaces the tries.

All calls of Ray's API run on one thread that lives as long as the backend: Ray's processes die with the thread that
started them (PDEATHSIG), and none of its calls may hold up the controller's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.environment import child_environment
from cluster.control.backend import LaunchError, Needs, WorkerStatus
from cluster.control.child import Child
from cluster.control.placement import Node, describe, place
from cluster.control.process_backend import child_status, worker_argv
from cluster.spec import WorkerSpec

ANSWER_S = 1.0  # how long an actor may take to answer before its last status is used
NAME_FREE_S = 10.0
RAY_END_S = 10.0
LOCAL_TRIES = 3
OBJECT_STORE_BYTES = 80 << 20  # nothing of ours goes through it; Ray's smallest
log = logging.getLogger("neap.control")
T = TypeVar("T")


class WorkerActor:
    """Supervises one worker process on its node. Runs inside Ray, one call at a time, on its process's main thread."""

    def __init__(self, spec_json: bytes, run_dir: str) -> None:
        self._spec = msgspec.json.decode(spec_json, type=WorkerSpec)
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._child: Child | None = None

    def __repr__(self) -> str:
        spec = self._spec
        return f"{spec.worker_id}@{spec.node}({spec.role} {spec.engine.served_model_name})"

    def start(self) -> None:
        """Start the worker's process, or start it again after it ended."""
        if self._child is not None:
            self._child.kill()
        argv = worker_argv(self._spec, self._run_dir)
        self._child = Child(argv, log=self._run_dir / f"{self._spec.worker_id}.log", env=child_environment())

    def status(self) -> WorkerStatus:
        """What is known of the worker's process."""
        if self._child is None:
            return WorkerStatus(worker_id=self._spec.worker_id, alive=True, node=self._spec.node)
        return child_status(self._spec.worker_id, self._spec.node, self._child)

    def stop(self, grace_s: float) -> None:
        """Drain, wait up to grace_s, then kill."""
        if self._child is not None:
            self._child.stop(grace_s)


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A launched worker. `handle` is None once its actor is dead."""

    handle: Any
    node: Node
    needs: Needs
    status: WorkerStatus


class RayBackend:
    """Implements control.backend.Backend on a local Ray started here, or on a running one at `address`.

    `token_path` is where Ray's token lies (config.environment.prepare_ray, called before this module is imported).
    """

    def __init__(
        self, run_dir: Path, *, address: str, dashboard_port: int, num_cpus: float, token_path: Path | None
    ) -> None:
        self._run_dir = run_dir
        self._address = address
        self._dashboard_port = dashboard_port
        self._num_cpus = num_cpus
        self._token_path = token_path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")
        self._dashboard = ""
        self._placed: dict[str, _Placed] = {}
        self._children_before: frozenset[int] = frozenset()

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """The dashboard and its token."""
        where = str(self._token_path) if self._token_path is not None else "in RAY_AUTH_TOKEN"
        return (("Ray dashboard", f"http://{self._dashboard}"), ("Ray token", where)) if self._dashboard else ()

    @property
    def own_address(self) -> str:
        """This machine's address as Ray knows it."""
        address: str = ray.util.get_node_ip_address()
        return address

    async def start(self) -> None:
        """Start or join Ray. Raises LaunchError."""
        await self._call(self._start)

    async def launch(self, spec: WorkerSpec, needs: Needs) -> None:
        """Place and start the worker's actor; an ended one of the same id is replaced. Raises LaunchError."""
        await self._call(lambda: self._launch(spec, needs))

    async def statuses(self) -> tuple[WorkerStatus, ...]:
        """One per launched worker. An actor that is slow to answer keeps its last status."""
        return await self._call(self._statuses)

    async def stop(self, grace_s: float) -> None:
        """Drain all workers, end their actors, then Ray if it was started here; leave no process behind."""
        await self._call(lambda: self._stop(grace_s))
        self._thread.shutdown()

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _start(self) -> None:
        local: dict[str, Any] = {
            "address": "local",
            "num_cpus": max(self._num_cpus, os.cpu_count() or 1),
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": self._dashboard_port or None,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        options = {"address": self._address} if self._address else local
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # what matters comes as exceptions, and is told by us
        self._children_before = frozenset(child.pid for child in psutil.Process().children())
        context = self._init(options, tries=1 if self._address else LOCAL_TRIES)
        self._dashboard = context.dashboard_url or ""

    def _init(self, options: dict[str, Any], tries: int) -> Any:
        """ray.init. A local start gives up after 30 s of its own; on a busy machine the second try may do."""
        while True:
            tries -= 1
            try:
                return ray.init(
                    namespace=self._run_dir.name,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    configure_logging=False,
                    **options,
                )
            except Exception as error:  # Ray raises plain Exceptions too
                self._shut_down()
                if not tries:
                    raise LaunchError(f"Ray did not start: {error}") from error
                log.warning("Ray did not start (%s); trying again", error)

    def _nodes(self) -> list[Node]:
        prefix = "accelerator_type:"
        return [
            Node(
                node_id=node["NodeID"],
                name=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                num_cpus=node["Resources"].get("CPU", 0.0),
                num_gpus=node["Resources"].get("GPU", 0.0),
                accelerators=frozenset(r.removeprefix(prefix) for r in node["Resources"] if r.startswith(prefix)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def _launch(self, spec: WorkerSpec, needs: Needs) -> None:
        placed = self._placed.get(spec.worker_id)
        if placed is not None and placed.handle is not None:
            placed.handle.start.remote()
            self._placed[spec.worker_id] = replace(placed, status=replace(placed.status, alive=True))
            return
        taken: dict[str, list[Needs]] = {}
        for other in self._placed.values():
            if other.handle is not None:
                taken.setdefault(other.node.node_id, []).append(other.needs)
        nodes = self._nodes()
        node = place(needs, nodes, taken)
        if node is None:
            raise LaunchError(f"{spec.worker_id}: {describe(needs, nodes)}")
        host = node.address if spec.host == "auto" else spec.host
        spec = msgspec.structs.replace(spec, node=node.name, host=host)
        status = WorkerStatus(worker_id=spec.worker_id, alive=True, node=node.name)
        handle = self._create(spec, needs, node)
        handle.start.remote()
        self._placed[spec.worker_id] = _Placed(handle=handle, node=node, needs=needs, status=status)

    def _create(self, spec: WorkerSpec, needs: Needs, node: Node) -> Any:
        """The worker's actor. Its name may still belong to a dead predecessor for a moment."""
        options = {
            "name": f"{spec.worker_id}@{node.name}",
            "num_cpus": needs.num_cpus,
            "num_gpus": needs.num_gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        }
        if needs.accelerator_type:
            options["accelerator_type"] = needs.accelerator_type
        remote_class = ray.remote(WorkerActor).options(**options)
        deadline = time.monotonic() + NAME_FREE_S
        while True:
            try:
                return remote_class.remote(msgspec.json.encode(spec), str(self._run_dir))
            except ValueError as error:
                if time.monotonic() > deadline:
                    raise LaunchError(f"{spec.worker_id}: {error}") from error
                time.sleep(0.1)

    def _statuses(self) -> tuple[WorkerStatus, ...]:
        asked = {name: p.handle.status.remote() for name, p in self._placed.items() if p.handle is not None}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        for name, answer in asked.items():
            placed = self._placed[name]
            try:
                self._placed[name] = replace(placed, status=ray.get(answer, timeout=0))
            except ray.exceptions.GetTimeoutError:
                log.debug("the actor of %s has not answered yet", name)
            except ray.exceptions.RayError as error:
                words = f"its Ray actor died: {type(error).__name__}"
                status = replace(placed.status, alive=False, last_words=words)
                self._placed[name] = replace(placed, handle=None, status=status)
                ray.kill(placed.handle)
        return tuple(placed.status for placed in self._placed.values())

    def _stop(self, grace_s: float) -> None:
        if not ray.is_initialized():
            return
        handles = [placed.handle for placed in self._placed.values() if placed.handle is not None]
        drained = [handle.stop.remote(grace_s) for handle in handles]
        if drained:
            ray.wait(drained, num_returns=len(drained), timeout=grace_s + ANSWER_S)
        for handle in handles:
            ray.kill(handle)
        self._placed.clear()
        self._shut_down()

    def _shut_down(self) -> None:
        """End Ray, and every process that it leaves behind: after a failed start it leaves all of them."""
        was_up = ray.is_initialized()
        left = self._processes()
        ray.shutdown()
        _, left = psutil.wait_procs(left, timeout=RAY_END_S if was_up else 0)
        for process in left:
            log.warning("process %d of Ray stayed behind; killed", process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=RAY_END_S)

    def _processes(self) -> list[psutil.Process]:
        """Every process of the Ray that was started here: children that came with it, and all below them."""
        found = []
        for child in psutil.Process().children():
            if child.pid not in self._children_before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += [child, *child.children(recursive=True)]
        return found
