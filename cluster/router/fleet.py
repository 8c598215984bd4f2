"""The workers as this router sees them: who is up, who is suspect, and how much of their load is ours.

A worker's load is its last heartbeat's, less our part at that moment (that is what others put there), plus our part
now: so what was dispatched since the heartbeat counts at once, and what has ended no longer does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.router.backlog import Backlog, Work
from cluster.router.predict import ms_per_prefill_token
from cluster.router.views import WorkerView
from cluster.types import Heartbeat, PeerRate, WorkerInfo
from cluster.worker.admission import decode_capacity
from engine.messages import Load

HUNG_STEP_S = 10.0
HUNG_HEARTBEATS = 2  # a worker that was stopped as a whole shows one old step when it wakes


@dataclass(slots=True, kw_only=True, eq=False)
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
    contexts: dict[str, int] = field(default_factory=dict)  # request id -> keys that its rows see
    backlog: Backlog = field(default_factory=Backlog)
    rates: dict[str, PeerRate] = field(default_factory=dict)  # as source, by receiver
    num_sequences: int = 0
    context_tokens: int = 0
    others_sequences: int = 0
    others_context: int = 0
    capacity: int = field(init=False)  # choices that it takes at once

    def __post_init__(self) -> None:
        self.capacity = decode_capacity(self.info)

    @property
    def usable(self) -> bool:
        """Whether it may get something to do."""
        return self.up and not self.hung and self.info.state == "ready"

    @property
    def num_assigned(self) -> int:
        """Choices that it decodes, ours and others'."""
        return self.num_sequences + self.others_sequences

    def has_room(self, *, pulls: bool) -> bool:
        """Whether it takes another choice. One whose KV it doesn't pull wants a row of its batch at once."""
        most = self.capacity if pulls else self.info.max_num_seqs
        return self.num_sequences + self.others_sequences < most

    def view(self, now: float, *, cached_tokens: int = 0, avoid: frozenset[str] = frozenset()) -> WorkerView:
        """Its load now. The rest is known of one request or one pair only."""
        load = self.load
        return WorkerView(
            info=self.info,
            num_sequences=self.num_sequences + self.others_sequences,
            queued_tokens=self.backlog.num_tokens,
            context_tokens=self.context_tokens + self.others_context,
            backlog_ms=self.backlog.ms(now),
            cached_tokens=cached_tokens,
            num_free_blocks=load.num_free_blocks if load.num_blocks else None,
            scales=(load.prefill_scale or 1.0, load.decode_scale or 1.0),
            avoid=avoid,
            rates=self.rates,
        )

    def assign(self, request_id: str, num_choices: int, num_tokens: int) -> None:
        """It decodes this request for us."""
        self.unassign(request_id)
        self.sequences[request_id] = num_choices
        self.contexts[request_id] = num_choices * num_tokens
        self.num_sequences += num_choices
        self.context_tokens += num_choices * num_tokens

    def unassign(self, request_id: str) -> None:
        """It does so no longer."""
        self.num_sequences -= self.sequences.pop(request_id, 0)
        self.context_tokens -= self.contexts.pop(request_id, 0)

    def hear(self, now: float, heartbeat: Heartbeat) -> bool:
        """Take a heartbeat of this incarnation. Returns whether the engine has just been found hung."""
        if heartbeat.info.epoch >= self.info.epoch:
            self.info = heartbeat.info
            self.capacity = decode_capacity(heartbeat.info)
        self.load = load = heartbeat.load
        self.others_sequences = max(0, load.num_assigned - self.num_sequences)
        self.others_context = max(0, load.context_tokens - self.context_tokens)
        rate = ms_per_prefill_token(self.info.profile, load.prefill_scale or 1.0)
        self.backlog.hear(now, load.queued_tokens, rate)
        self.rates = {peer.peer_id: peer for peer in heartbeat.peers}
        stands = heartbeat.step_count == self.step_count and heartbeat.step_age_ms >= HUNG_STEP_S * 1000
        self.step_count, self.step_age_ms = heartbeat.step_count, heartbeat.step_age_ms
        self.num_hung_heartbeats = self.num_hung_heartbeats + 1 if stands else 0
        was_hung, self.hung = self.hung, self.num_hung_heartbeats >= HUNG_HEARTBEATS or (self.hung and stands)
        return self.hung and not was_hung


class Fleet:
    """Workers by id. A new incarnation replaces the old one."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._by_id: list[tuple[str, Worker]] = []
        self._identity: str | None = None

    def up(self, info: WorkerInfo) -> Worker:
        """The link said Welcome. A hung engine stays hung until its steps move."""
        old = self.workers.get(info.worker_id)
        worker = Worker(info=info)
        if old is not None and old.info.incarnation == info.incarnation:
            worker.hung, worker.step_count = old.hung, old.step_count
        self.workers[info.worker_id] = worker
        self._by_id = sorted(self.workers.items())
        self.decoders()  # the first one's identity is what this router serves
        return worker

    def down(self, worker_id: str) -> Worker | None:
        """The link broke or is given up. Returns the worker if it was up."""
        worker = self.workers.get(worker_id)
        if worker is None or not worker.up:
            return None
        worker.up = False
        worker.sequences, worker.contexts = {}, {}
        worker.num_sequences = worker.context_tokens = 0
        worker.backlog.clear()
        return worker

    def decoders(self) -> list[Worker]:
        """Usable decode workers of the one identity that this router serves, by id."""
        usable = [worker for _, worker in self._by_id if worker.info.role == "decode" and worker.usable]
        serving = [worker for worker in usable if worker.info.identity == self._identity]
        if usable and not serving:
            self._identity = usable[0].info.identity
            serving = [worker for worker in usable if worker.info.identity == self._identity]
        return serving

    def sources(self, decoder: WorkerInfo) -> list[Worker]:
        """Usable prefill workers whose KV `decoder` can read, by id."""
        return [
            worker
            for _, worker in self._by_id
            if worker.info.role == "prefill"
            and worker.usable
            and worker.info.identity == decoder.identity
            and worker.info.kv_fingerprint == decoder.kv_fingerprint
        ]

    def has_source(self) -> bool:
        """Whether anybody is there to prefill for others."""
        return any(worker.info.role == "prefill" and worker.usable for worker in self.workers.values())

    def assign(
        self, now: float, request_id: str, decoder: str, num_choices: int, num_tokens: int, prefiller: str, work: Work
    ) -> None:
        """Count a dispatch: who decodes, and who computes the prompt (the same, or its first source)."""
        self.workers[decoder].assign(request_id, num_choices, num_tokens)
        self.workers[prefiller].backlog.add(now, request_id, work)

    def prefilled(self, now: float, request_id: str, prefiller: str | None) -> None:
        """The first token came: nothing more is to be computed for it."""
        if prefiller is not None and prefiller in self.workers:
            self.workers[prefiller].backlog.remove(now, request_id)

    def unassign(self, now: float, request_id: str, decoder: str, prefiller: str | None) -> None:
        """The attempt is over."""
        if decoder in self.workers:
            self.workers[decoder].unassign(request_id)
        self.prefilled(now, request_id, prefiller)
