"""The source's side of KVSource.Fetch, without I/O: who may have which KV, pieces out, and an end for every call.

Life cycle of a served call (the call is the lease: its blocks are pinned exactly as long as it lives):
1. `on_fetch`: incarnation, identity and layout must be ours, the range sane ("Refused" with words), and the receiver
   within its quota of pinned bytes ("Busy"). Then Serve to the rank.
2. Serving: "Accepted" with what is cached, how far it goes, the predicted wait, and the transport.
3. ServedPiece: cut to PIECE_BYTES and sent while less than WINDOW_BYTES are on their way; SendTaken opens the window.
   While nothing else is sent, News go out every NEWS_S, and at once when computing starts.
4. ServeDone and everything sent: OfferedAll. The receiver ends the call.
5. The call broken or closed, its deadline, a receiver that takes nothing for TAKE_LIMIT_S, a rank that does not step:
   EndServe, exactly once. A served call never calls Fetch.

Effects come in the order in which they are to be done. `next_timer` is an absolute monotonic second.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from cluster.timers import Timers
from cluster.types import (
    NEWS_S,
    FetchAccepted,
    FetchBusy,
    FetchMoved,
    FetchNews,
    FetchOfferedAll,
    FetchOpen,
    FetchRefused,
    FetchReply,
    FetchTaken,
    LocalMemory,
    Transport,
    WorkerInfo,
)
from cluster.worker.effects import Effect, EndCall, SendFetch, ToEngine
from cluster.worker.peer_rates import PeerRates
from cluster.worker.served_call import ServedCall
from engine.kv.layout import KVLayout
from engine.messages import (
    EndServe,
    Serve,
    ServeBusy,
    ServeDone,
    ServedPiece,
    ServeProgress,
    Serving,
    StepEvents,
)
from engine.scheduler.request_state import largest_id

TAKE_LIMIT_S = 10.0
ENGINE_SILENCE_S = 10.0
PIECE_BYTES = 8 << 20
WINDOW_BYTES = 64 << 20
PEER_FRACTION = 0.75  # of the pool, that calls of one receiver may pin
BUSY_RETRY_MS = 100
FINISH_MS = 20.0  # what is left of a call that a worker still computes when its role changes
TOKEN_BYTES = 4
_MAX_MS_PER_TOKEN = 1000.0
_SERVED = (Serving, ServeBusy, ServeProgress, ServedPiece, ServeDone)  # a union would be made anew for each reply
_SERVING_STATES = ("ready", "draining", "switching", "verifying")  # it holds KV that others may need meanwhile

_TimerKind = Literal["deadline", "news", "taken", "engine", "role"]
_KINDS: tuple[_TimerKind, ...] = ("deadline", "news", "taken", "engine", "role")


class PrefillMachine:
    """Every decision of a worker as source; see cluster/worker/effects.py for the calls and effects.

    `memory` is announced to receivers on this host; None offers "grpc" only. `info` may be replaced by the shell.
    `max_peer_bytes` caps what one receiver's calls may pin (default: PEER_FRACTION of the pool).
    """

    def __init__(
        self,
        info: WorkerInfo,
        layout: KVLayout,
        memory: LocalMemory | None,
        checksum_algorithm: str,
        *,
        max_peer_bytes: int | None = None,
    ) -> None:
        self.info = info
        self.counters: Counter[str] = Counter()
        self.peers = PeerRates()
        self._layout = layout
        self._memory = memory
        self._checksum_algorithm = checksum_algorithm
        self._max_peer_blocks = (max_peer_bytes or int(PEER_FRACTION * layout.total_bytes)) // layout.block_bytes
        self._piece_blocks = max(1, PIECE_BYTES // layout.block_bytes)
        self._window_blocks = max(self._piece_blocks, WINDOW_BYTES // layout.block_bytes)
        self._calls: dict[str, ServedCall] = {}
        self._timers: Timers[tuple[str, _TimerKind]] = Timers()
        self.next_timer = self._timers.next  # the absolute monotonic second at which on_timer is to be called, or None
        self._ms_per_token = 0.0
        self._last_step_at: float | None = None
        self._gives_away = False

    @property
    def num_calls(self) -> int:
        """Calls being served."""
        return len(self._calls)

    # ---- from receivers

    def on_fetch(self, now: float, call: FetchOpen) -> list[Effect]:
        """A call opened. A call id that is being served already is a duplicate and ignored."""
        self._timers.note(now)
        if call.call_id in self._calls:
            self.counters["duplicate_calls"] += 1
            return []
        if trouble := self._trouble(call):
            self.counters["refused"] += 1
            return self._turn_away(call.call_id, FetchRefused(code=trouble[0], message=trouble[1]))
        if self._gives_away and call.max_compute_tokens != 0:
            self.counters["sent_on"] += 1
            return self._turn_away(call.call_id, FetchMoved())
        num_blocks = self._layout.blocks_for(call.end)
        pinned = [c.num_blocks for c in self._calls.values() if c.open.receiver_id == call.receiver_id]
        if pinned and sum(pinned) + num_blocks > self._max_peer_blocks:
            self.counters["over_quota"] += 1
            return self._turn_away(call.call_id, FetchBusy(retry_ms=BUSY_RETRY_MS))
        self._calls[call.call_id] = ServedCall(open=call, num_blocks=num_blocks)
        self._timers.set((call.call_id, "deadline"), now + call.remaining_ms / 1000)
        self._timers.set((call.call_id, "news"), now + NEWS_S)  # also before it is accepted: a step may take long
        self._timers.watch((call.call_id, "engine"), now, ENGINE_SILENCE_S)
        serve = Serve(
            call_id=call.call_id,
            tokens=call.tokens,
            start=call.start,
            end=call.end,
            max_compute_tokens=call.max_compute_tokens,
            cache_salt=call.cache_salt,
        )
        return [ToEngine(command=serve)]

    def on_taken(self, now: float, taken: FetchTaken) -> list[Effect]:
        """The receiver holds all pieces up to an index."""
        self._timers.note(now)
        call = self._calls.get(taken.call_id)
        if call is None or not call.take(taken.piece_index):
            return []
        if call.timed is not None and taken.piece_index >= call.timed[0]:
            _, sent_at, num_bytes = call.timed
            self.peers.observe(call.open.receiver_id, call.transport, num_bytes, (now - sent_at) * 1000)
            call.timed = None
        self._timers.watch((call.call_id, "taken"), now, TAKE_LIMIT_S)
        return self._send_pieces(now, call)

    def on_call_broken(self, now: float, call_id: str) -> list[Effect]:
        """The receiver closed, or the connection broke: the same to us."""
        self._timers.note(now)
        call = self._calls.get(call_id)
        return [] if call is None else self._end(call)

    # ---- from the rank

    def on_events(self, now: float, events: StepEvents) -> list[Effect]:
        """What one step of the rank brought."""
        self._timers.note(now)
        self._measure(now, events)
        effects: list[Effect] = []
        for reply in events.replies:
            if isinstance(reply, _SERVED):
                call = self._calls.get(reply.call_id)
                if call is not None:
                    effects += self._on_reply(now, call, reply)
        for call in self._calls.values():
            if not call.done:
                self._timers.watch((call.call_id, "engine"), now, ENGINE_SILENCE_S)
        return effects

    def _on_reply(
        self, now: float, call: ServedCall, reply: Serving | ServeBusy | ServeProgress | ServedPiece | ServeDone
    ) -> list[Effect]:
        if isinstance(reply, Serving):
            return self._accept(now, call, reply)
        if isinstance(reply, ServeProgress):
            started = call.queued_tokens > 0 and reply.queued_tokens == 0
            call.computed_tokens, call.queued_tokens = reply.computed_tokens, reply.queued_tokens
            return self._news(now, call) if started else []
        if isinstance(reply, ServedPiece):
            call.cut(
                reply,
                self._layout,
                incarnation=self.info.incarnation,
                checksum_algorithm=self._checksum_algorithm,
                max_blocks=self._piece_blocks,
            )
            return self._send_pieces(now, call)
        if isinstance(reply, ServeDone):
            call.done = True
            call.queued_tokens = 0
            self._timers.clear((call.call_id, "engine"))
            self._timers.watch((call.call_id, "taken"), now, TAKE_LIMIT_S)
            return self._send_pieces(now, call)
        self.counters["rank_busy"] += 1
        self._forget(call)
        refused = FetchRefused(code="capacity", message="The prompt does not fit this source's quota.")
        return self._turn_away(call.call_id, refused if reply.never else FetchBusy(retry_ms=BUSY_RETRY_MS))

    # ---- the clock

    def on_timer(self, now: float) -> list[Effect]:
        """To be called when next_timer() has come; earlier does no harm."""
        effects: list[Effect] = []
        for call_id, kind in self._timers.due(now):
            call = self._calls.get(call_id)
            if call is None:
                continue  # an earlier timer of this round ended it
            if kind == "news":
                effects += self._news(now, call)
                continue
            if kind == "role":
                effects += self._send_on(call) if self._gives_away and not call.done else []
                continue
            self.counters[f"cut_off_{kind}"] += 1
            effects += [*self._end(call), EndCall(call_id=call_id)]
        return effects

    # ---- another role

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is computed for others. What they are still reading may be read under any role."""
        return all(call.done or call.open.max_compute_tokens == 0 for call in self._calls.values())

    def give_away(self, now: float) -> list[Effect]:
        """Compute no more for others: what is nearly done finishes, the rest ends with Moved; receivers keep what they
        have. Until `keep`.
        """
        self._timers.note(now)
        self._gives_away = True
        effects: list[Effect] = []
        for call in list(self._calls.values()):
            num_left = call.open.end - call.computed_tokens + call.queued_tokens
            if call.done or call.open.max_compute_tokens == 0:
                continue
            if num_left * self._ms_per_token <= FINISH_MS:
                self._timers.set((call.call_id, "role"), now + 2 * FINISH_MS / 1000)
            else:
                effects += self._send_on(call)
        return effects

    def _send_on(self, call: ServedCall) -> list[Effect]:
        self.counters["sent_on"] += 1
        moved = SendFetch(call_id=call.call_id, reply=FetchMoved())
        return [moved, EndCall(call_id=call.call_id), *self._end(call)]

    def keep(self) -> None:
        """Compute for others again."""
        self._gives_away = False

    # ---- inside

    def _trouble(self, call: FetchOpen) -> tuple[str, str] | None:
        mine = self.info
        if call.source_incarnation != mine.incarnation:
            return "incarnation", f"this is {mine.worker_id} {mine.incarnation}, not {call.source_incarnation}"
        if call.identity != mine.identity:
            return "identity", "another model, quantisation or KV dtype"
        if call.kv_fingerprint != mine.kv_fingerprint:
            return "kv_layout", "another KV layout"
        if mine.state not in _SERVING_STATES:
            return "state", f"the worker is {mine.state}"
        if self._transport(call) is None:
            return "transport", f"none of {', '.join(call.transports) or 'no transports'}"
        num_tokens = len(call.tokens) // TOKEN_BYTES
        if len(call.tokens) % TOKEN_BYTES or call.start % self._layout.block_size:
            return (
                "range",
                f"start {call.start} is not a multiple of {self._layout.block_size}, or tokens are malformed",
            )
        if not 0 <= call.start < call.end <= num_tokens or (mine.max_model_len and call.end > mine.max_model_len):
            return "range", f"[{call.start}, {call.end}) is not within {num_tokens} tokens and the context"
        if largest_id(call.tokens) >= (mine.vocab_size or 1 << 31):
            return "tokens", "a token id is outside the vocabulary"
        if call.remaining_ms <= 0:
            return "deadline", "the deadline has passed"
        return None

    def _transport(self, call: FetchOpen) -> Transport | None:
        usable: tuple[Transport, ...] = ("grpc",) if self._memory is None else ("local", "grpc")
        return next((transport for transport in call.transports if transport in usable), None)

    def _accept(self, now: float, call: ServedCall, serving: Serving) -> list[Effect]:
        transport = self._transport(call.open)
        assert transport is not None, "checked when the call was opened"
        call.accepted, call.transport = True, transport
        call.computed_tokens, call.queued_tokens = serving.cached_tokens, serving.queued_tokens
        accepted = FetchAccepted(
            cached_tokens=serving.cached_tokens,
            end_tokens=serving.end_tokens,
            queue_ms=self._queue_ms(call),
            transport=transport,
            local=self._memory if transport == "local" else None,
        )
        self.counters["accepted"] += 1
        return self._send(now, call, accepted)

    def _send_pieces(self, now: float, call: ServedCall) -> list[Effect]:
        effects: list[Effect] = []
        while call.waiting:
            num_blocks = len(call.waiting[0].block_ids)
            if call.untaken and call.num_untaken_blocks + num_blocks > self._window_blocks:
                break
            if not call.untaken:
                self._timers.watch((call.call_id, "taken"), now, TAKE_LIMIT_S)
            piece = call.waiting.popleft()
            if not call.untaken:
                num_tokens = piece.end_tokens - piece.first_block * self._layout.block_size
                call.timed = (piece.index, now, num_tokens * self._layout.token_bytes)
            call.untaken.append((piece.index, num_blocks))
            self.counters["pieces"] += 1
            effects += self._send(now, call, piece)
        if call.done and not call.waiting and not call.offered_all:
            call.offered_all = True
            effects += self._send(now, call, FetchOfferedAll())
        if not call.untaken and not call.done:
            self._timers.clear((call.call_id, "taken"))
        return effects

    def _news(self, now: float, call: ServedCall) -> list[Effect]:
        queue_ms = self._queue_ms(call) if call.accepted else max(1, self._queue_ms(call))
        news = FetchNews(computed_tokens=call.computed_tokens, queue_ms=queue_ms)
        return self._send(now, call, news)

    def _send(self, now: float, call: ServedCall, reply: FetchReply) -> list[Effect]:
        self._timers.set((call.call_id, "news"), now + NEWS_S)
        return [SendFetch(call_id=call.call_id, reply=reply)]

    def _queue_ms(self, call: ServedCall) -> int:
        return max(1, round(call.queued_tokens * self._ms_per_token)) if call.queued_tokens else 0

    def _measure(self, now: float, events: StepEvents) -> None:
        """Keep a moving average of milliseconds per token, for the predicted wait."""
        if events.num_tokens and self._last_step_at is not None:
            ms = min(_MAX_MS_PER_TOKEN, (now - self._last_step_at) * 1000 / events.num_tokens)
            self._ms_per_token += (ms - self._ms_per_token) * 0.2 if self._ms_per_token else ms
        busy = events.load.num_assigned or events.load.num_served
        self._last_step_at = now if busy else None  # time without work is nobody's step

    def _turn_away(self, call_id: str, reply: FetchBusy | FetchMoved | FetchRefused) -> list[Effect]:
        return [SendFetch(call_id=call_id, reply=reply), EndCall(call_id=call_id)]

    def _end(self, call: ServedCall) -> list[Effect]:
        self._forget(call)
        return [ToEngine(command=EndServe(call_id=call.call_id))]

    def _forget(self, call: ServedCall) -> None:
        del self._calls[call.call_id]
        for kind in _KINDS:
            self._timers.clear((call.call_id, kind))
