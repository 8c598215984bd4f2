"""The dispatcher's state as plain data, for /status and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.router.accuracy import Errors
from cluster.router.breakers import BreakerStatus
from cluster.router.decision import Decision
from cluster.router.fleet import Worker
from cluster.types import PeerRate, WorkerInfo
from engine.messages import Load


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker for /status."""

    info: WorkerInfo
    load: Load
    up: bool
    hung: bool
    num_sequences: int
    queued_tokens: int
    step_count: int
    step_age_ms: int
    peers: tuple[PeerRate, ...]


@dataclass(frozen=True, kw_only=True)
class DispatchStatus:
    """A snapshot for /status."""

    workers: tuple[WorkerStatus, ...]
    num_waiting: int
    num_running: int
    counters: dict[str, int]
    errors: Errors
    decisions: tuple[Decision, ...]  # newest first
    breakers: tuple[BreakerStatus, ...]


def worker_status(worker: Worker) -> WorkerStatus:
    """One worker as it is now."""
    return WorkerStatus(
        info=worker.info,
        load=worker.load,
        up=worker.up,
        hung=worker.hung,
        num_sequences=worker.num_assigned,
        queued_tokens=worker.backlog.num_tokens,
        step_count=worker.step_count,
        step_age_ms=worker.step_age_ms,
        peers=tuple(worker.rates.values()),
    )
