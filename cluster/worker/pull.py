"""How a request at the decode worker gets its prompt's KV before it runs: probe, call a source, reserve, copy, close.

Life cycle of a pull:
1. `begin`: Probe our own prefix cache. At most one block missing, or no source: the request runs without a pull.
2. The next source is called with start = what we hold. Busy, refused, silent, broken, or a piece that fails its
   fences: the one after it. None left: we compute the rest ourselves.
3. When a source says that it starts, all blocks are reserved at once. Those who wait for space wait in one line, so
   that a small prompt does not overtake a large one for ever. After RESERVE_WAIT_S the call is closed and the request
   queues again (what the source computed is in its prefix cache); after SPACE_WAIT_S in all: "busy" to the router.
4. Pieces are copied into the blocks and committed in order. A source is replaced only once its copies have reported;
   if they don't within COPY_WAIT_S the reservation is left to them, quarantined, and the request starts anew.
5. Everything landed, or no source is left: PullClosed(what we hold), and the request runs.

`advance` is idempotent: it looks at call, reservation and space and does what can be done next.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Protocol

from cluster.errors import BUSY
from cluster.timers import Timers
from cluster.types import (
    SILENCE_S,
    FetchAccepted,
    FetchBusy,
    FetchMoved,
    FetchNews,
    FetchOfferedAll,
    FetchOpen,
    FetchRefused,
    FetchReply,
    FetchTaken,
    Path,
    Piece,
    Transport,
    WorkerInfo,
)
from cluster.worker.decode_request import DecodeRequest, TimerKey, TimerKind, source_failure
from cluster.worker.effects import CloseFetch, Effect, OpenFetch, SendTaken, ToEngine
from cluster.worker.reservation import Reservation
from cluster.worker.source_call import SourceCall
from cluster.worker.space_line import SpaceLine
from engine.kv.layout import KVLayout
from engine.messages import Abort, NoSpace, Probe, Probed, PullClosed, Reserved

REQUEUE_S = 0.25
COPY_WAIT_S = 2.0
MAX_HOPS = 2


class PullOwner(Protocol):
    """Whom a pull reports to: the decode machine."""

    def run(self, now: float, request: DecodeRequest, path: Path, pulled: bool) -> list[Effect]:
        """The pull is over: run every choice; with `pulled` the first one is at the rank already."""
        ...

    def fail(self, request: DecodeRequest, code: str, message: str) -> list[Effect]:
        """End the request with an error."""
        ...

    def rename(self, request: DecodeRequest) -> None:
        """Give the request new engine ids: the old ones stay with blocks in quarantine."""
        ...


class Puller:
    """Drives the pulls of all requests of one decode worker; see the life cycle above."""

    def __init__(
        self,
        info: WorkerInfo,
        layout: KVLayout,
        checksum_algorithm: str | None,
        timers: Timers[TimerKey],
        counters: Counter[str],
        owner: PullOwner,
    ) -> None:
        self._info = info
        self._layout = layout
        self._checksum_algorithm = checksum_algorithm
        self._timers = timers
        self._counters = counters
        self._owner = owner
        self._calls: dict[str, DecodeRequest] = {}
        self._line = SpaceLine(layout, timers)
        self.on_free_blocks = self._line.on_free_blocks  # space may have come free
        self._copies: dict[int, tuple[Reservation, DecodeRequest]] = {}
        self._num_copies = 0
        self._remote_only: dict[str, None] = {}  # source incarnations whose memory we cannot open

    def begin(self, now: float, request: DecodeRequest) -> list[Effect]:
        """Step 1. The request's engine id is that of its first Add."""
        request.stage = "queued"
        if not request.sources:
            return self._finish(now, request)
        add = request.adds[0]
        probe = Probe(request_id=add.request_id, tokens=request.tokens, cache_salt=add.cache_salt)
        return [ToEngine(command=probe)]

    def drop(self, request: DecodeRequest) -> list[Effect]:
        """The request is over while it pulls: everything that it holds goes, blocks in flight into quarantine."""
        effects: list[Effect] = [ToEngine(command=Abort(request_id=request.adds[0].request_id))]
        effects += self._close_call(request)
        effects += self._line.leave(request)
        for kind in ("silence", "requeue", "copies"):
            self._timers.clear((request.request_id, kind))
        return effects + self._orphan(request)

    # ---- the engine's answers

    def on_reply(self, now: float, request: DecodeRequest, reply: Probed | Reserved | NoSpace) -> list[Effect]:
        """Route an answer of the rank for a request that still pulls."""
        if isinstance(reply, Probed):
            size = self._layout.block_size
            request.num_cached = min(reply.num_cached_tokens, request.num_wanted) // size * size
            return self.advance(now, request)
        if isinstance(reply, Reserved):
            return self._on_reserved(now, request, reply)
        return self._on_no_space(now, request, reply.never)

    def _on_reserved(self, now: float, request: DecodeRequest, reply: Reserved) -> list[Effect]:
        effects = self._line.leave(request)
        size = self._layout.block_size
        request.reservation = Reservation(
            engine_id=reply.request_id,
            num_tokens=request.num_wanted,
            block_ids=reply.block_ids,
            num_cached=min(reply.num_cached_tokens, request.num_wanted) // size * size,
            layout=self._layout,
        )
        request.stage = "prefilling"  # "waiting", until now, if there was no space at first
        call = request.call
        if call is not None and request.reservation.num_cached < call.start:
            # the match shrank since the probe: this call starts too late, its source answers a new one from its cache
            self._counters["calls_restarted"] += 1
            request.sources.appendleft(call.source)
            effects += self._close_call(request)
        return effects + self.advance(now, request)

    def _on_no_space(self, now: float, request: DecodeRequest, never: bool) -> list[Effect]:
        if never:
            request.sources.clear()
            return self._close_call(request) + self._finish(now, request)  # Add will say why it cannot run
        self._counters["no_space"] += 1
        request.stage = "waiting"
        if request.call is None:
            return self._line.leave(request) + self.advance(now, request)
        request.space = "queued"
        if request.space_expired:
            return self._queue_again(now, request)
        self._line.refused(now, request)
        return []

    def _queue_again(self, now: float, request: DecodeRequest) -> list[Effect]:
        self._counters["queued_again"] += 1
        effects = self._line.leave(request) + self._close_call(request)
        assert request.space_deadline is not None, "it waited for space"
        if now >= request.space_deadline:
            return effects + self._owner.fail(request, BUSY, "No room for the prompt.")
        self._timers.set((request.request_id, "requeue"), now + REQUEUE_S)
        return effects

    # ---- the source's answers

    def on_fetch_reply(self, now: float, call_id: str, reply: FetchReply) -> list[Effect]:
        """A message of a source. Messages of calls that we closed are late news."""
        request = self._calls.get(call_id)
        if request is None or request.call is None:
            return []
        call = request.call
        self._timers.watch((request.request_id, "silence"), now, SILENCE_S)
        trouble = ""
        if isinstance(reply, FetchAccepted):
            if reply.end_tokens <= call.start and call.source.max_compute_tokens >= 0:
                return self._drop_source(now, request, "sources_short")  # it holds no more than we do
            trouble = call.accept(reply)
            call.next_block = call.start // self._layout.block_size
            request.queue_ms = reply.queue_ms
            request.source_cached = max(request.source_cached, reply.cached_tokens)
            request.stage = "prefilling" if reply.queue_ms == 0 else "queued"
        elif isinstance(reply, FetchNews):
            request.queue_ms, request.computed_tokens = reply.queue_ms, reply.computed_tokens
            call.started = call.started or (call.accepted is not None and reply.queue_ms == 0)
            if call.started and request.stage == "queued":
                request.stage = "prefilling"
        elif isinstance(reply, Piece):
            trouble = call.take_piece(reply, self._layout, self._checksum_algorithm)
        elif isinstance(reply, FetchOfferedAll):
            call.offered_all = True
            self._timers.clear((request.request_id, "silence"))
        else:
            return self._turned_away(now, request, reply)
        if trouble:
            return self._drop_source(now, request, "source_protocol_errors")
        return self.advance(now, request)

    def on_fetch_broken(self, now: float, call_id: str) -> list[Effect]:
        """The source or the network ended the call."""
        request = self._calls.get(call_id)
        if request is None or request.call is None:
            return []
        return self._drop_source(now, request, "sources_broken")

    def on_local_unavailable(self, now: float, call_id: str) -> list[Effect]:
        """The source's memory cannot be opened here (another host): call it again, over gRPC from now on."""
        request = self._calls.get(call_id)
        if request is None or request.call is None:
            return []
        source = request.call.source
        self._remote_only[source.incarnation] = None
        if len(self._remote_only) > 1024:
            del self._remote_only[next(iter(self._remote_only))]
        request.sources.appendleft(source)
        return self._drop_source(now, request, "local_unavailable")

    def _turned_away(
        self, now: float, request: DecodeRequest, reply: FetchBusy | FetchMoved | FetchRefused
    ) -> list[Effect]:
        if isinstance(reply, FetchBusy):
            return self._drop_source(now, request, "sources_busy")
        if isinstance(reply, FetchRefused):
            this_prompt = reply.code in ("capacity", "deadline", "range", "tokens")
            return self._drop_source(now, request, "prompts_refused" if this_prompt else "sources_refused")
        if reply.to is not None and request.num_hops < MAX_HOPS:
            request.num_hops += 1
            request.sources.appendleft(reply.to)
        return self._drop_source(now, request, "sources_moved")

    # ---- copies and timers

    def on_copied(self, now: float, copy_id: int, ok: bool) -> list[Effect]:
        """A copy reached its terminal state."""
        reservation, request = self._copies.pop(copy_id)
        good = reservation.report(copy_id, ok)
        if request.reservation is not reservation:
            return self._close_orphan(reservation)
        effects = self._commit(request)
        if not good:
            self._counters["checksum_failures"] += 1
            if request.call is not None:
                return effects + self._drop_source(now, request, "sources_spoiled")
        return effects + self.advance(now, request)

    def on_timer(self, now: float, request: DecodeRequest, kind: TimerKind) -> list[Effect]:
        """One of this request's timers passed."""
        if kind == "silence":
            if request.call is None:
                return []  # another timer of this round has closed it
            return self._drop_source(now, request, "sources_silent")
        if kind == "retry":
            return self._line.ask()
        if kind == "requeue":
            request.sources = deque(request.dispatch.sources)
            return self.begin(now, request)
        if kind == "space":
            request.space_expired = True
            return self._queue_again(now, request) if request.space == "queued" else []
        assert kind == "copies", f"{kind} is not a pull's timer"
        if request.reservation is None:
            return []
        self._counters["copies_stuck"] += 1
        effects: list[Effect] = [ToEngine(command=Abort(request_id=request.adds[0].request_id))]
        effects += self._orphan(request)
        self._owner.rename(request)
        return effects + self.begin(now, request)

    # ---- inside

    def advance(self, now: float, request: DecodeRequest) -> list[Effect]:
        """Do what can be done next; nothing when something is awaited."""
        reservation, call = request.reservation, request.call
        if reservation is not None and reservation.complete and reservation.idle:
            return self._finish(now, request)
        if call is None:
            return self._without_call(now, request)
        if reservation is None:
            if call.started and request.space == "none":
                return self._line.enter(now, request)
            return []
        effects: list[Effect] = []
        while call.buffered:
            self._num_copies += 1
            started = reservation.start(self._num_copies, call.buffered.popleft())
            if started:
                request.stage = "transferring"
                self._copies[self._num_copies] = (reservation, request)
            effects += started
        effects += self._commit(request)
        if reservation.complete and reservation.idle:
            return effects + self._finish(now, request)
        if call.offered_all and reservation.num_landing == 0:
            effects += self._drop_source(now, request, "sources_short")
        return effects

    def _without_call(self, now: float, request: DecodeRequest) -> list[Effect]:
        reservation = request.reservation
        if reservation is not None and not reservation.idle:
            if (request.request_id, "copies") not in self._timers:
                self._timers.set((request.request_id, "copies"), now + COPY_WAIT_S)
            return []
        self._timers.clear((request.request_id, "copies"))
        held = request.num_cached if reservation is None else reservation.held_tokens
        worth_it = request.num_wanted - held > self._layout.block_size
        if worth_it and request.sources:
            return self._open(now, request, held)
        if request.space == "asked":
            return []  # the rank's answer decides: Reserved is closed with what we hold, NoSpace is forgotten
        return self._finish(now, request)

    def _open(self, now: float, request: DecodeRequest, start: int) -> list[Effect]:
        source = request.sources.popleft()
        request.num_calls += 1
        dispatch = request.dispatch
        transports: tuple[Transport, ...] = ("grpc",) if source.incarnation in self._remote_only else ("local", "grpc")
        call = SourceCall(
            call_id=f"{request.adds[0].request_id}:{request.num_calls}:{self._info.incarnation}",
            source=source,
            start=start,
            end=request.num_wanted,
        )
        request.call = call
        self._calls[call.call_id] = request
        self._timers.watch((request.request_id, "silence"), now, SILENCE_S)
        message = FetchOpen(
            call_id=call.call_id,
            request_id=request.request_id,
            attempt=dispatch.attempt,
            source_incarnation=source.incarnation,
            receiver_id=self._info.worker_id,
            receiver_incarnation=self._info.incarnation,
            identity=self._info.identity,
            kv_fingerprint=self._info.kv_fingerprint,
            tokens=request.tokens,
            start=call.start,
            end=call.end,
            max_compute_tokens=source.max_compute_tokens,
            remaining_ms=max(1, math.ceil((request.deadline - now) * 1000)),  # ours passes first
            cache_salt=dispatch.cache_salt,
            transports=transports,
        )
        return [OpenFetch(source=source, open=message)]

    def _commit(self, request: DecodeRequest) -> list[Effect]:
        assert request.reservation is not None, "commit without a reservation"
        effects, last = request.reservation.commit()
        if last >= 0 and request.call is not None:
            effects.append(SendTaken(taken=FetchTaken(call_id=request.call.call_id, piece_index=last)))
        return effects

    def _drop_source(self, now: float, request: DecodeRequest, reason: str) -> list[Effect]:
        self._counters[reason] += 1
        return source_failure(request, reason) + self._close_call(request) + self.advance(now, request)

    def _close_call(self, request: DecodeRequest) -> list[Effect]:
        if request.call is None:
            return []
        call_id = request.call.call_id
        request.call = None
        del self._calls[call_id]
        self._timers.clear((request.request_id, "silence"))
        return [CloseFetch(call_id=call_id)]

    def _finish(self, now: float, request: DecodeRequest) -> list[Effect]:
        effects = self._close_call(request) + self._line.leave(request)
        reservation = request.reservation
        request.pulling = False
        request.stage = "prefilling"
        if reservation is None:
            return effects + self._owner.run(now, request, "decode-only", False)
        request.reservation = None
        closed = PullClosed(request_id=reservation.engine_id, num_computed_tokens=reservation.held_tokens)
        path: Path = "prefill-decode" if reservation.num_pulled else "decode-only"
        if reservation.num_pulled and reservation.num_tokens - reservation.held_tokens > 0:
            path = "prefill-decode+local"
        return [*effects, ToEngine(command=closed), *self._owner.run(now, request, path, True)]

    def _orphan(self, request: DecodeRequest) -> list[Effect]:
        reservation, request.reservation = request.reservation, None
        return [] if reservation is None else self._close_orphan(reservation)

    def _close_orphan(self, reservation: Reservation) -> list[Effect]:
        if not reservation.idle:
            return []
        return [ToEngine(command=PullClosed(request_id=reservation.engine_id, num_computed_tokens=0))]
