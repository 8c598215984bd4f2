"""The seam between the controller and what runs workers: plain processes here, or actors in a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.spec import WorkerSpec


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a worker's start is. stage "load" counts bytes, "warmup" shapes."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one worker reserves."""

    num_cpus: float = 1
    num_gpus: float = 0
    accelerator_type: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """What a backend knows of a worker that it launched. `last_words` say why it ended; `log` is where to read more."""

    worker_id: str
    alive: bool
    pid: int = 0
    node: str = ""
    progress: Progress | None = None
    failed: bool = False  # it said itself that trying again is of no use
    last_words: str = ""
    log: str = ""


class LaunchError(RuntimeError):
    """A worker cannot be placed or started, with the reason for people."""


class Backend(Protocol):
    """Runs worker processes. Every call is from the controller's event loop; one worker id runs at most once."""

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """What people should know of it, for the ready box: (name, value)."""
        ...

    @property
    def own_address(self) -> str:
        """This machine's address as workers on other machines reach it. Known after start()."""
        ...

    async def start(self) -> None:
        """Get ready to launch. Raises LaunchError."""
        ...

    async def launch(self, spec: WorkerSpec, needs: Needs) -> None:
        """Start a worker, or start it again after it ended. Raises LaunchError."""
        ...

    async def statuses(self) -> tuple[WorkerStatus, ...]:
        """One per launched worker."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Drain all workers at once, kill what remains after grace_s, and leave no process behind."""
        ...
