"""Requests that lost their decode worker, or were given away: where they may go on, and what old workers keep for them.

Life cycle of a request whose decode worker is lost or gives it away:
1. It is placed again at its last accepted position, ahead of new requests: attempt + 1, elsewhere if possible.
2. Given away (`Moved`): the old worker pins the KV, so it is the first source, asked for nothing but what it holds. It
   is told `Release` at the first token of the new attempt, or at the request's end.
3. The worker *crashed* under it (its link broke, or its engine hung; a worker that is merely silent has not crashed):
   the request may be the reason. It is a suspect until it has made PROBATION_TOKENS tokens elsewhere. A worker runs one
   suspect at a time, and nothing new beside it, so one crash is pinned on one request.
4. A second crash: it waits VERDICT_S for one of the two to turn out to be a mere break of the connection (the same
   incarnation comes back), then ends with "decode_worker_lost".

At most MAX_RECOVERING requests without a token of their new attempt are at one worker: those that lost their worker
together don't overrun the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.router.fleet import Fleet, Worker
from cluster.router.tracked import Tracked
from cluster.types import Moved, Release, SourceRef, WorkerInfo

PROBATION_TOKENS = 4
MAX_RECOVERING = 4
MAX_CRASHES = 2
VERDICT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """KV that an old decode worker pins for a request until Release."""

    worker_id: str
    incarnation: str
    attempt: int
    num_tokens: int


@dataclass(kw_only=True)
class Trial:
    """What happened to one request that is being taken up again."""

    crashes: set[tuple[str, str]] = field(default_factory=set)  # (worker, incarnation) that crashed under it
    num_since: int = 0  # tokens accepted in this attempt
    held: Held | None = None
    verdict_at: float = 0.0  # waits until then for its crashes to be forgiven


class Recovery:
    """The trials of one router's requests. Requests that never lost a worker have none and cost nothing."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._trials: dict[str, Trial] = {}
        self._recovering: dict[str, dict[str, bool]] = {}  # worker -> request id -> whether it is a suspect

    # ---- what happened

    def crashed(self, now: float, request: Tracked, info: WorkerInfo) -> None:
        """Its decode worker crashed under it."""
        trial = self._trials.setdefault(request.request_id, Trial())
        trial.crashes.add((info.worker_id, info.incarnation))
        if len(trial.crashes) >= MAX_CRASHES:
            trial.verdict_at = now + VERDICT_S

    def silent(self, request: Tracked) -> None:
        """Its decode worker was given up, but need not be dead."""
        self._trials.setdefault(request.request_id, Trial())

    def moved(self, request: Tracked, worker: Worker, moved: Moved) -> list[tuple[str, Release]]:
        """Its decode worker gave it away. Returns a Release for what an older one held."""
        effects = self.release(request.request_id)
        trial = self._trials.setdefault(request.request_id, Trial())
        trial.held = Held(
            worker_id=worker.info.worker_id,
            incarnation=worker.info.incarnation,
            attempt=moved.attempt,
            num_tokens=moved.held_tokens,
        )
        return effects

    def came_back(self, info: WorkerInfo) -> None:
        """A link stands again: if it is the same incarnation, it had not crashed."""
        for trial in self._trials.values():
            trial.crashes.discard((info.worker_id, info.incarnation))

    def accepted(self, request: Tracked, num_tokens: int) -> list[tuple[str, Release]]:
        """Tokens of the current attempt. Returns the Release of what the old worker held, with the first of them."""
        trial = self._trials.get(request.request_id)
        if trial is None:
            return []
        trial.num_since += num_tokens
        if request.worker_id is not None and (trial.num_since >= PROBATION_TOKENS or not trial.crashes):
            self._recovering.get(request.worker_id, {}).pop(request.request_id, None)
        return self.release(request.request_id)

    def release(self, request_id: str) -> list[tuple[str, Release]]:
        """Let the old worker free what it holds: (worker, message), at most one."""
        trial = self._trials.get(request_id)
        if trial is None or trial.held is None:
            return []
        held, trial.held = trial.held, None
        return [(held.worker_id, Release(request_id=request_id, attempt=held.attempt))] if self._stands(held) else []

    def forget(self, request_id: str) -> list[tuple[str, Release]]:
        """The request is over."""
        releases = self.release(request_id)
        self._trials.pop(request_id, None)
        return releases

    # ---- where it may go

    def is_condemned(self, request: Tracked) -> bool:
        """Two workers crashed under it; it runs nowhere."""
        trial = self._trials.get(request.request_id)
        return trial is not None and len(trial.crashes) >= MAX_CRASHES

    def verdict_at(self, request: Tracked) -> float | None:
        """When a condemned request ends, or None."""
        return self._trials[request.request_id].verdict_at if self.is_condemned(request) else None

    def allowed(self, request: Tracked, decoders: Iterable[Worker]) -> list[Worker]:
        """The decode workers that may take it now."""
        trial = self._trials.get(request.request_id)
        if trial is None and not any(self._recovering.values()):
            return list(decoders)  # most often
        if trial is None:
            return [w for w in decoders if True not in self._recovering.get(w.info.worker_id, {}).values()]
        if len(trial.crashes) >= MAX_CRASHES:
            return []
        suspect = bool(trial.crashes)
        return [worker for worker in decoders if self._takes(worker, suspect)]

    def _takes(self, worker: Worker, suspect: bool) -> bool:
        recovering = self._recovering.get(worker.info.worker_id, {})
        if suspect and True in recovering.values():
            return False
        return len(recovering) < MAX_RECOVERING

    def placed(self, request: Tracked, worker_id: str) -> bool:
        """It is dispatched there. Returns whether it is a continuation that another worker gave away."""
        trial = self._trials.get(request.request_id)
        if trial is None:
            return False
        trial.num_since = 0
        self._recovering.setdefault(worker_id, {})[request.request_id] = bool(trial.crashes)
        return trial.held is not None

    def unplaced(self, request: Tracked) -> None:
        """Its attempt is over."""
        if request.worker_id is not None:
            self._recovering.get(request.worker_id, {}).pop(request.request_id, None)

    def lost(self, worker_id: str) -> None:
        """Nothing is at this worker any more, and it holds nothing."""
        self._recovering.pop(worker_id, None)
        for trial in self._trials.values():
            if trial.held is not None and trial.held.worker_id == worker_id:
                trial.held = None

    def held_source(self, request: Tracked, decoder: WorkerInfo) -> SourceRef | None:
        """The old worker as source of what it pins, if it stands and is not the new decode worker itself."""
        trial = self._trials.get(request.request_id)
        held = trial.held if trial is not None else None
        if held is None or not held.num_tokens or held.worker_id == decoder.worker_id or not self._stands(held):
            return None
        info = self._fleet.workers[held.worker_id].info
        if (info.identity, info.kv_fingerprint) != (decoder.identity, decoder.kv_fingerprint):
            return None
        return SourceRef(
            worker_id=info.worker_id, incarnation=info.incarnation, address=info.address, max_compute_tokens=0
        )

    def _stands(self, held: Held) -> bool:
        worker = self._fleet.workers.get(held.worker_id)
        return worker is not None and worker.up and worker.info.incarnation == held.incarnation
