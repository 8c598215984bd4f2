"""Which worker gets which request, and what its answers mean. No I/O: see cluster/router/effects.py.

Life cycle of a request at the router:
1. `on_submit`: it joins the queue (bounded) and is placed as soon as a decode worker has room, in order of arrival;
   those that were placed before go first.
2. choosing.py names the decode worker and a ranked list of sources. Each placement is a new attempt.
3. "refused" and "busy" from the worker, its loss, or `Moved`: placed again, elsewhere if possible, after a jittered
   backoff (none after `Moved`), at the position up to which tokens were accepted; see recovery.py.
4. Tokens are accepted only from the current attempt at exactly the next position: a duplicate is dropped, a gap ends
   the request ("internal_error"), never a hole in the text.
5. The end, once: every choice finished, an error, or the deadline ("deadline_exceeded", with an Abort down). After
   `on_cancel` nothing is said about the request any more, `Ended` included.

A worker whose link breaks, that is silent for SILENCE_S, or whose engine stands still, is given up with everything it
has. `next_timer` is an absolute monotonic second.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from random import Random
from typing import Literal

from cluster.errors import BUSY, ERRORS, REFUSED
from cluster.router.choosing import Chooser
from cluster.router.effects import Deliver, DeliverScores, DropLink, Ended, Progress, RouterEffect, Submit, ToWorker
from cluster.router.fleet import Fleet, Worker
from cluster.router.policies import Policy
from cluster.router.recovery import Recovery
from cluster.router.snapshot import DispatchStatus, worker_status
from cluster.router.tracked import HistoryItem, Tracked, track
from cluster.router.waiting_line import WaitingLine
from cluster.timers import Timers
from cluster.types import (
    SILENCE_S,
    AbortRequest,
    CacheNews,
    Entry,
    Failed,
    Heartbeat,
    Moved,
    News,
    PromptScores,
    Release,
    SourceFailed,
    SourceRef,
    Tokens,
    WorkerInfo,
)

NO_WORKER_S = 10.0
RETRY_S = 0.02  # doubled with each retry
MAX_RETRY_S = 1.0
MAX_EXPLAINED = 256

_TimerKind = Literal["deadline", "retry", "no_worker", "silence", "verdict"]


class Dispatcher:
    """Every decision of a router about requests and workers. `rng` breaks ties and jitters backoffs."""

    def __init__(self, policy: Policy, rng: Random, *, max_waiting: int = 1024, may_be_alone: bool = True) -> None:
        self.counters: Counter[str] = Counter()
        self.fleet = Fleet()
        self.recovery = Recovery(self.fleet)
        self.chooser = Chooser(policy, self.fleet, rng, self.counters, may_be_alone=may_be_alone)
        self._rng = rng
        self._max_waiting = max_waiting
        self._requests: dict[str, Tracked] = {}
        self._waiting_again = WaitingLine()
        self._waiting = WaitingLine()
        self._timers: Timers[tuple[str, _TimerKind]] = Timers()
        self.next_timer = self._timers.next  # the absolute monotonic second at which on_timer is to be called, or None
        self._explained: OrderedDict[str, tuple[HistoryItem, ...]] = OrderedDict()

    # ---- from HTTP

    def on_submit(self, now: float, submit: Submit) -> list[RouterEffect]:
        """Step 1."""
        self._timers.note(now)
        assert submit.request_id not in self._requests, "request ids are made by the server and never reused"
        if now >= submit.deadline:
            return [Ended(request_id=submit.request_id, code="deadline_exceeded")]
        if len(self._waiting) + len(self._waiting_again) >= self._max_waiting:
            self.counters["overloaded"] += 1
            return [Ended(request_id=submit.request_id, code="overloaded")]
        request = track(submit, now)
        request.note(now, "submitted")
        self._requests[submit.request_id] = request
        self._waiting.add(request)
        self._timers.set((submit.request_id, "deadline"), submit.deadline)
        self._timers.set((submit.request_id, "no_worker"), now + NO_WORKER_S)
        return self._place_waiting(now)

    def on_cancel(self, now: float, request_id: str) -> list[RouterEffect]:
        """The client is gone, or wants no more. No Ended follows. Unknown ids have just ended."""
        self._timers.note(now)
        request = self._requests.get(request_id)
        if request is None:
            return []
        self.counters["cancelled"] += 1
        request.note(now, "cancelled")
        effects = [*self._abort(request), *self._forget(now, request)]
        return effects + self._place_waiting(now)

    # ---- from the links

    def on_worker_up(self, now: float, info: WorkerInfo) -> list[RouterEffect]:
        """The link said Welcome."""
        self._timers.note(now)
        old = self.fleet.workers.get(info.worker_id)
        self._lose(now, info.worker_id, crashed=old is not None and old.info.incarnation != info.incarnation)
        if (before := self.fleet.workers.get(info.worker_id)) and before.info.incarnation != info.incarnation:
            self.chooser.worker_replaced(before.info.incarnation)
        if not self.fleet.up(info).hung:
            self.recovery.came_back(info)
        self._timers.watch((info.worker_id, "silence"), now, SILENCE_S)
        return self._place_waiting(now)

    def on_worker_down(self, now: float, worker_id: str) -> list[RouterEffect]:
        """The link broke."""
        self._timers.note(now)
        self._lose(now, worker_id, crashed=True)
        return self._place_waiting(now)

    def on_heartbeat(self, now: float, heartbeat: Heartbeat) -> list[RouterEffect]:
        """Load and liveness of a worker. One of another incarnation is late news."""
        self._timers.note(now)
        worker = self.fleet.workers.get(heartbeat.info.worker_id)
        if worker is None or not worker.up or worker.info.incarnation != heartbeat.info.incarnation:
            return []
        self._timers.watch((heartbeat.info.worker_id, "silence"), now, SILENCE_S)
        if worker.hear(now, heartbeat):
            self.counters["hung_workers"] += 1
            return self._drop_link(now, worker, f"its engine has stood at step {heartbeat.step_count}", crashed=True)
        return self._place_waiting(now)

    def on_entries(self, now: float, worker_id: str, entries: tuple[Entry, ...]) -> list[RouterEffect]:
        """One message of a worker: what one step of its engine brought for us."""
        self._timers.note(now)
        worker = self.fleet.workers.get(worker_id)
        if worker is not None and worker.up:
            self._timers.watch((worker_id, "silence"), now, SILENCE_S)
        effects: list[RouterEffect] = []
        for entry in entries:
            if isinstance(entry, (CacheNews, SourceFailed)):
                self._on_side_news(now, worker_id, entry)
                continue
            request = self._requests.get(entry.request_id)
            if request is None or request.worker_id != worker_id or request.attempt != entry.attempt:
                self.counters["stale_entries"] += 1
            elif isinstance(entry, Tokens):
                effects += self._on_tokens(now, request, entry)
            elif isinstance(entry, News):
                effects.append(Progress(request_id=request.request_id, stage=entry.stage, worker_id=worker_id))
            elif isinstance(entry, PromptScores):
                effects += self._on_scores(now, request, entry)
            elif isinstance(entry, Moved):
                effects += self._on_moved(now, request, entry)
            else:
                effects += self._on_failed(now, request, entry)
        return effects + self._place_waiting(now)

    def _on_side_news(self, now: float, worker_id: str, entry: CacheNews | SourceFailed) -> None:
        """What a worker says beside the answers."""
        if isinstance(entry, CacheNews):
            self.chooser.on_cache_news(worker_id, entry)
            return
        self.chooser.on_source_failed(now, worker_id, entry)
        request = self._requests.get(entry.request_id)
        if request is not None and request.attempt == entry.attempt:
            request.note(now, f"source {entry.reason}", entry.source_id)

    def on_timer(self, now: float) -> list[RouterEffect]:
        """To be called when next_timer() has come; earlier does no harm."""
        effects: list[RouterEffect] = []
        for key, kind in self._timers.due(now):
            if kind == "silence":
                worker = self.fleet.workers.get(key)
                if worker is not None and worker.up:
                    self.counters["silent_workers"] += 1
                    words = f"nothing was heard of it for {SILENCE_S:g} s"
                    effects += self._drop_link(now, worker, words, crashed=False)
                continue
            request = self._requests.get(key)
            if request is None:
                continue  # an earlier timer of this round ended it
            if kind == "deadline":
                effects += [*self._abort(request), *self._end(now, request, "deadline_exceeded")]
            elif kind == "verdict" and self.recovery.is_condemned(request):
                effects += self._end(now, request, "decode_worker_lost")
            elif kind == "no_worker" and request.worker_id is None:
                if not self.fleet.decoders():
                    effects += self._end(now, request, "no_worker")
                else:
                    self._timers.set((key, "no_worker"), now + NO_WORKER_S)
        return effects + self._place_waiting(now)

    # ---- for people

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def status(self) -> DispatchStatus:
        """A snapshot."""
        num_waiting = len(self._waiting) + len(self._waiting_again)
        return DispatchStatus(
            workers=tuple(worker_status(worker) for _, worker in sorted(self.fleet.workers.items())),
            num_waiting=num_waiting,
            num_running=len(self._requests) - num_waiting,
            counters=dict(self.counters),
            errors=self.chooser.accuracy.errors(),
            decisions=self.chooser.decisions(),
            breakers=self.chooser.breakers.status(),
        )

    def history(self, request_id: str) -> tuple[HistoryItem, ...]:
        """What happened to a live or recent request; empty when it is forgotten."""
        request = self._requests.get(request_id)
        return tuple(request.history) if request is not None else self._explained.get(request_id, ())

    # ---- placing

    def _place_waiting(self, now: float) -> list[RouterEffect]:
        effects: list[RouterEffect] = []
        if not (self._waiting.requests or self._waiting_again.requests):
            return effects  # most often: every heartbeat and every entry of every worker asks
        usable, has_source = self.fleet.decoders(), self.fleet.has_source()
        for line in (self._waiting_again, self._waiting):
            for request in line.in_order():
                if request.retry_at > now:
                    continue  # it waits for its own time and holds nobody up
                decoders = [one for one in usable if one.has_room(pulls=has_source or line is self._waiting_again)]
                if not decoders:
                    return effects
                allowed = self.recovery.allowed(request, decoders)
                if not allowed:
                    continue
                line.serve(request)
                effects += self._place(now, request, allowed)
        return effects

    def _place(self, now: float, request: Tracked, decoders: list[Worker]) -> list[RouterEffect]:
        fresh = [worker for worker in decoders if worker.info.worker_id not in request.avoid]
        decision = self.chooser.choose(now, request, self._same_class(request, fresh or decoders))
        decoder = self.fleet.workers[decision.placement.decode].info
        refs = [_source(self.fleet.workers[source]) for source in decision.sources]
        if (held := self.recovery.held_source(request, decoder)) is not None:
            refs = [held, *(ref for ref in refs if ref.worker_id != held.worker_id)]
        request.attempt += 1
        request.answered = False
        request.worker_id = decoder.worker_id
        request.note(now, "dispatched", decoder.worker_id)
        self._timers.clear((request.request_id, "retry"))
        self._timers.clear((request.request_id, "no_worker"))
        self.counters["dispatched"] += 1
        moved = self.recovery.placed(request, decoder.worker_id)
        dispatch = request.dispatch(now, decoder, refs, moved=moved)
        return [ToWorker(worker_id=decoder.worker_id, message=dispatch)]

    def _same_class(self, request: Tracked, decoders: list[Worker]) -> list[Worker]:
        """Those that continue a text bit by bit as it was begun, if there are any; else all, and that is counted."""
        if not request.num_outputs:
            return decoders
        same = [worker for worker in decoders if worker.info.numerics_class == request.numerics_class]
        if not same:
            self.counters["numerics_class_changed"] += 1
        return same or decoders

    def _place_again(self, now: float, request: Tracked, delay_s: float, reason: str) -> None:
        """Take an attempt back and queue for the next one."""
        assert request.worker_id is not None, "only a placed request is placed again"
        request.note(now, reason, request.worker_id)
        request.avoid.add(request.worker_id)
        if len(request.avoid) >= len(self.fleet.decoders()):
            request.avoid = {request.worker_id}
        self._unassign(now, request)
        request.retry_at = now + delay_s * (0.5 + self._rng.random()) if delay_s else now
        verdict_at = self.recovery.verdict_at(request)
        if verdict_at is not None:
            self._timers.set((request.request_id, "verdict"), verdict_at)
        self._waiting_again.add(request)
        self._timers.set((request.request_id, "retry"), request.retry_at)
        self._timers.set((request.request_id, "no_worker"), now + NO_WORKER_S)

    # ---- what workers say

    def _on_tokens(self, now: float, request: Tracked, tokens: Tokens) -> list[RouterEffect]:
        verdict = request.judge(tokens)
        if verdict == "duplicate":
            self.counters["duplicate_tokens"] += 1
            return []
        if verdict == "gap":
            self.counters["gaps"] += 1
            message = f"choice {tokens.choice}: position {tokens.position} does not follow"
            return [*self._abort(request), *self._end(now, request, "internal_error", message)]
        if not request.answered:
            self.fleet.prefilled(now, request.request_id, request.prefiller_id)
            self.chooser.first_token(now, request, tokens)
            request.num_retries = 0
            request.note(now, f"first token, {tokens.path or 'continued'}", request.worker_id or "")
            request.numerics_class = self.fleet.workers[request.worker_id or ""].info.numerics_class
        request.accept(tokens)
        effects: list[RouterEffect] = [Deliver(tokens=tokens, path=tokens.path)]
        effects += _down(self.recovery.accepted(request, len(tokens.token_ids)))
        if not request.finished:
            return effects
        self.chooser.ended(now, request)
        return effects + self._end(now, request, None)

    def _on_scores(self, now: float, request: Tracked, scores: PromptScores) -> list[RouterEffect]:
        fresh = request.accept_scores(scores)
        if fresh is None:
            self.counters["gaps"] += 1
            message = f"prompt logprobs from {scores.first_position} on do not follow"
            return [*self._abort(request), *self._end(now, request, "internal_error", message)]
        return [DeliverScores(scores=fresh)] if fresh.logprobs else []

    def _on_failed(self, now: float, request: Tracked, failed: Failed) -> list[RouterEffect]:
        if failed.code in (BUSY, REFUSED) and not request.answered:
            self.counters[f"attempts_{failed.code}"] += 1
            delay_s = min(MAX_RETRY_S, RETRY_S * 2 ** min(16, request.num_retries))
            request.num_retries += 1
            self._place_again(now, request, delay_s, failed.code)
            return []
        if failed.code in ERRORS:
            return self._end(now, request, failed.code, failed.message)
        return self._end(now, request, "internal_error", f"a worker failed with {failed.code!r}")

    def _on_moved(self, now: float, request: Tracked, moved: Moved) -> list[RouterEffect]:
        assert request.worker_id is not None, "an entry of the current attempt comes from where it is"
        self.counters["moved"] += 1
        releases = self.recovery.moved(request, self.fleet.workers[request.worker_id], moved)
        self._place_again(now, request, 0.0, "given away")
        return _down(releases)

    def _drop_link(self, now: float, worker: Worker, reason: str, *, crashed: bool) -> list[RouterEffect]:
        self._lose(now, worker.info.worker_id, crashed=crashed)
        return [DropLink(worker_id=worker.info.worker_id, reason=reason), *self._place_waiting(now)]

    def _lose(self, now: float, worker_id: str, *, crashed: bool) -> None:
        worker = self.fleet.down(worker_id)
        if worker is None:
            return
        self.counters["lost_workers"] += 1
        self.chooser.worker_lost(worker_id)
        self.recovery.lost(worker_id)
        self._timers.clear((worker_id, "silence"))
        for request in [r for r in self._requests.values() if r.worker_id == worker_id]:
            self.counters["taken_over"] += 1
            if crashed:
                self.recovery.crashed(now, request, worker.info)
            else:
                self.recovery.silent(request)
            self._place_again(now, request, RETRY_S, "decode worker lost")

    # ---- ends

    def _abort(self, request: Tracked) -> list[RouterEffect]:
        if request.worker_id is None:
            return []
        abort = AbortRequest(request_id=request.request_id, attempt=request.attempt)
        return [ToWorker(worker_id=request.worker_id, message=abort)]

    def _end(self, now: float, request: Tracked, code: str | None, message: str = "") -> list[RouterEffect]:
        self.counters["finished" if code is None else f"failed_{code}"] += 1
        request.note(now, code or "finished", request.worker_id or "")
        releases = self._forget(now, request)
        return [*releases, Ended(request_id=request.request_id, code=code, message=message)]

    def _unassign(self, now: float, request: Tracked) -> None:
        if request.worker_id is not None:
            self.recovery.unplaced(request)
            self.fleet.unassign(now, request.request_id, request.worker_id, request.prefiller_id)
            request.worker_id = request.prefiller_id = None

    def _forget(self, now: float, request: Tracked) -> list[RouterEffect]:
        self._unassign(now, request)
        request_id = request.request_id
        del self._requests[request_id]
        self._waiting.discard(request_id)
        self._waiting_again.discard(request_id)
        for kind in ("deadline", "retry", "no_worker", "verdict"):
            self._timers.clear((request_id, kind))
        self._explained[request_id] = tuple(request.history)
        if len(self._explained) > MAX_EXPLAINED:
            self._explained.popitem(last=False)
        return _down(self.recovery.forget(request_id))


def _source(worker: Worker) -> SourceRef:
    info = worker.info
    return SourceRef(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address)


def _down(releases: list[tuple[str, Release]]) -> list[RouterEffect]:
    return [ToWorker(worker_id=worker_id, message=release) for worker_id, release in releases]
