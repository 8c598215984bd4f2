"""The workers as this router sees them: who is up, who is suspect, and how much of their load is ours.

A worker's load is its last heartbeat's, less our part at that moment (that is what others put there), plus our part
now: so what was dispatched since the heartbeat counts at once, and what has ended no longer does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.router.policies import WorkerView
from cluster.types import Heartbeat, WorkerInfo
from engine.messages import Load

HUNG_STEP_S = 10.0
HUNG_HEARTBEATS = 2  # a worker that was stopped as a whole shows one old step when it wakes


@dataclass(kw_only=True, eq=False)
class Worker:
    """One worker whose link is, or was, up."""

    info: WorkerInfo
    up: bool = True
    hung: bool = False
    load: Load = field(default_factory=Load)
    step_count: int = -1
    step_age_ms: int = 0
    num_hung_heartbeats: int = 0
    sequences: dict[str, int] = field(default_factory=dict)  # request id -> choices that it decodes for us
    prefilling: dict[str, int] = field(default_factory=dict)  # request id -> prompt tokens that it computes for us
    others_sequences: int = 0
    others_tokens: int = 0

    @property
    def usable(self) -> bool:
        """Whether it may get something to do."""
        return self.up and not self.hung and self.info.state == "ready"

    def view(self) -> WorkerView:
        """Its load now."""
        return WorkerView(
            info=self.info,
            num_sequences=sum(self.sequences.values()) + self.others_sequences,
            queued_tokens=sum(self.prefilling.values()) + self.others_tokens,
        )

    def hear(self, heartbeat: Heartbeat) -> bool:
        """Take a heartbeat of this incarnation. Returns whether the engine has just been found hung."""
        if heartbeat.info.epoch >= self.info.epoch:
            self.info = heartbeat.info
        self.load = load = heartbeat.load
        self.others_sequences = max(0, load.num_running + load.num_waiting - sum(self.sequences.values()))
        self.others_tokens = max(0, load.queued_tokens - sum(self.prefilling.values()))
        stands = heartbeat.step_count == self.step_count and heartbeat.step_age_ms >= HUNG_STEP_S * 1000
        self.step_count, self.step_age_ms = heartbeat.step_count, heartbeat.step_age_ms
        self.num_hung_heartbeats = self.num_hung_heartbeats + 1 if stands else 0
        was_hung, self.hung = self.hung, self.num_hung_heartbeats >= HUNG_HEARTBEATS or (self.hung and stands)
        return self.hung and not was_hung


class Fleet:
    """Workers by id. A new incarnation replaces the old one."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._identity: str | None = None

    def up(self, info: WorkerInfo) -> None:
        """The link said Welcome. A hung engine stays hung until its steps move."""
        old = self.workers.get(info.worker_id)
        worker = Worker(info=info)
        if old is not None and old.info.incarnation == info.incarnation:
            worker.hung, worker.step_count = old.hung, old.step_count
        self.workers[info.worker_id] = worker
        self.decoders()  # the first one's identity is what this router serves

    def down(self, worker_id: str) -> Worker | None:
        """The link broke or is given up. Returns the worker if it was up."""
        worker = self.workers.get(worker_id)
        if worker is None or not worker.up:
            return None
        worker.up = False
        worker.sequences, worker.prefilling = {}, {}
        return worker

    def decoders(self) -> list[Worker]:
        """Usable decode workers of the one identity that this router serves, by id."""
        usable = [
            worker for _, worker in sorted(self.workers.items()) if worker.usable and worker.info.role == "decode"
        ]
        if usable and self._identity not in {worker.info.identity for worker in usable}:
            self._identity = usable[0].info.identity
        return [worker for worker in usable if worker.info.identity == self._identity]

    def sources(self, decoder: WorkerInfo) -> list[Worker]:
        """Usable prefill workers whose KV `decoder` can read, by id."""
        return [
            worker
            for _, worker in sorted(self.workers.items())
            if worker.usable
            and worker.info.role == "prefill"
            and (worker.info.identity, worker.info.kv_fingerprint) == (decoder.identity, decoder.kv_fingerprint)
        ]

    def assign(self, request_id: str, decoder: str, num_choices: int, source: str | None, num_tokens: int) -> None:
        """Count a dispatch."""
        self.workers[decoder].sequences[request_id] = num_choices
        if source is not None:
            self.workers[source].prefilling[request_id] = num_tokens

    def prefilled(self, request_id: str, source: str | None) -> None:
        """The first token came: the source has nothing more to do for it."""
        if source is not None and source in self.workers:
            self.workers[source].prefilling.pop(request_id, None)

    def unassign(self, request_id: str, decoder: str, source: str | None) -> None:
        """The attempt is over."""
        if decoder in self.workers:
            self.workers[decoder].sequences.pop(request_id, None)
        self.prefilled(request_id, source)
