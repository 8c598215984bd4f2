"""Workers as plain child processes of this one, all on this machine."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import msgspec

from cluster.config.environment import child_environment
from cluster.control.backend import LaunchError, Needs, WorkerStatus
from cluster.control.child import Child
from cluster.spec import WorkerSpec


def worker_argv(spec: WorkerSpec, run_dir: Path) -> list[str]:
    """Write the spec where only this user can read it; the command line that runs it."""
    path = run_dir / f"{spec.worker_id}.json"
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(spec))
    return [sys.executable, "-m", "cluster.worker", str(path)]


def child_status(worker_id: str, node: str, child: Child) -> WorkerStatus:
    """What is known of a worker's process."""
    return WorkerStatus(
        worker_id=worker_id,
        alive=child.exit_code is None,
        pid=child.pid,
        node=node,
        progress=child.progress,
        failed=bool(child.failed),
        last_words="" if child.exit_code is None else f"{child.last_words()} (exit code {child.exit_code})",
        log=str(child.log),
    )


class ProcessBackend:
    """Implements control.backend.Backend."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._node = socket.gethostname()
        self._children: dict[str, Child] = {}

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """Nothing that the controller doesn't say."""
        return ()

    @property
    def own_address(self) -> str:
        """Workers are all on this machine."""
        return "127.0.0.1"

    async def start(self) -> None:
        """There is nothing to start."""

    async def launch(self, spec: WorkerSpec, needs: Needs) -> None:
        """Start the worker's process. Raises LaunchError. `needs` reserve nothing here."""
        if needs.accelerator_type:
            raise LaunchError(f"{spec.worker_id}: accelerator_type wants backend ray")
        host = self.own_address if spec.host == "auto" else spec.host
        spec = msgspec.structs.replace(spec, node=self._node, host=host)
        child = Child(
            worker_argv(spec, self._run_dir), log=self._run_dir / f"{spec.worker_id}.log", env=child_environment()
        )
        self._children[spec.worker_id] = child

    async def statuses(self) -> tuple[WorkerStatus, ...]:
        """One per launched worker."""
        return tuple(child_status(name, self._node, child) for name, child in self._children.items())

    async def stop(self, grace_s: float) -> None:
        """Drain all at once, kill what remains after grace_s."""
        await asyncio.gather(*(asyncio.to_thread(child.stop, grace_s) for child in self._children.values()))
        self._children.clear()
