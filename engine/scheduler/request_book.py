"""All own requests by state, with the moves between states that everybody needs: admit to the queue, preempt, finish.

waiting  no seat                      Add, or preempted (in front)
pulling  blocks, no row, no steps     Reserve .. PullClosed
landed   blocks, no row, no steps     PullClosed .. a row is free
running  seat, steps                  admitted, or landed
pausing  seat, one step in flight     Pause
paused   no seat, pinned blocks       nothing is in flight any more .. Abort
"""

from __future__ import annotations

from collections import deque
from operator import attrgetter

from engine.kv.prefix_cache import HashChain, root_key
from engine.messages import Add
from engine.scheduler.request_state import Counters, ModelLimits, Request, parse_tokens
from engine.scheduler.seats import Seats

# a request is admitted at the latest when so many later arrivals of better priority were: nobody starves
MAX_OVERTAKEN = 64
_BY_ORDER = attrgetter("order")
_BY_ARRIVAL = attrgetter("arrival")


class RequestRefusedError(ValueError):
    """A request that can never run here. `code` is a catalogue code."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class RequestBook:
    """The queues. Everything goes by (priority, arrival); the last in that order is preempted first."""

    def __init__(self, limits: ModelLimits, seats: Seats, counters: Counters) -> None:
        self.limits = limits
        self.seats = seats
        self.counters = counters
        self.waiting: deque[Request] = deque()  # in the order of admission
        self.pulling: dict[str, Request] = {}
        self.landed: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.pausing: dict[str, Request] = {}
        self.paused: dict[str, Request] = {}
        self._eos_ids = frozenset(limits.eos_token_ids)
        self._root = root_key(limits.identity)
        self._num_arrivals = 0
        self._has_priorities = False  # any request so far had one

    def __contains__(self, request_id: str) -> bool:
        return self.find(request_id) is not None

    def find(self, request_id: str) -> Request | None:
        """The request with this id in any state."""
        for state in (self.running, self.pulling, self.landed, self.pausing, self.paused):
            if request_id in state:
                return state[request_id]
        return next((request for request in self.waiting if request.request_id == request_id), None)

    def chain(self, cache_salt: bytes) -> HashChain:
        """A new hash chain under this model's identity."""
        root = root_key(self.limits.identity, cache_salt) if cache_salt else self._root
        return HashChain(root, self.seats.blocks.block_size)

    def parse(self, add: Add) -> Request:
        """Check and convert. Raises ValueError for bad tokens, RequestRefusedError for what can never fit."""
        if add.request_id in self:
            raise ValueError(f"request id {add.request_id!r} is in use")
        prompt = parse_tokens(add.prompt, self.limits.vocab_size)
        outputs = parse_tokens(add.outputs, self.limits.vocab_size)
        if not len(prompt):
            raise ValueError("prompt must hold at least one token")
        blocks = self.seats.blocks
        room_context = self.limits.max_model_len - len(prompt)
        if room_context < 1 or len(outputs) > room_context:
            raise RequestRefusedError("context_length_exceeded", f"{len(prompt)} prompt tokens do not fit the context")
        # the last output's KV is never needed, so a pool of exactly the prompt's size still gives one token
        room_pool = blocks.num_usable * blocks.block_size - len(prompt) + 1
        if room_pool < 1 or len(outputs) > room_pool:
            raise RequestRefusedError("kv_capacity_exceeded", f"{len(prompt)} prompt tokens do not fit the KV pool")
        max_tokens = add.params.max_tokens
        params = add.params
        stop_ids = frozenset() if params.ignore_eos else self._eos_ids
        if params.stop_token_ids:
            stop_ids = stop_ids.union(params.stop_token_ids)
        self._num_arrivals += 1
        self._has_priorities = self._has_priorities or add.priority != 0
        return Request(
            request_id=add.request_id,
            prompt=prompt,
            params=params,
            seed=add.seed,
            choice=add.choice,
            outputs=outputs.tolist(),
            stop_ids=stop_ids,
            max_outputs=min(room_context, room_pool, room_context if max_tokens is None else max_tokens),
            chain=self.chain(add.cache_salt),
            arrival=self._num_arrivals,
            priority=add.priority,
        )

    def in_order(self) -> list[Request]:
        """Running requests in the order of scheduling: priority, then arrival."""
        if len(self.running) < 2:
            return list(self.running.values())
        return sorted(self.running.values(), key=_BY_ORDER if self._has_priorities else _BY_ARRIVAL)

    def last_in_order(self) -> Request:
        """The request that is preempted first: running, or waiting for a row with blocks of its own."""
        return max((*self.running.values(), *self.landed.values()), key=_BY_ORDER)

    def first_landed(self) -> Request:
        """The one that gets the next free row."""
        return min(self.landed.values(), key=_BY_ORDER)

    def run(self, request: Request) -> None:
        """Let one that has landed have a row; see Seats.num_free_rows."""
        assert request.seat is not None, f"{request.request_id} landed without blocks"
        del self.landed[request.request_id]
        self.seats.take_row(request.seat)
        self.running[request.request_id] = request

    def enqueue(self, request: Request) -> None:
        """Let a request wait, at its place in the order of admission (most often the end)."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].queue_order > request.queue_order:
            place -= 1
        self.waiting.insert(place, request)

    def note_admitted(self, request: Request) -> None:
        """Count whom this admission has overtaken; whoever that happens to too often goes first from now on."""
        if not self._has_priorities:
            return
        passed = [one for one in self.waiting if one.arrival < request.arrival and not one.urgent]
        for one in passed:
            one.num_overtaken += 1
            if one.num_overtaken >= MAX_OVERTAKEN:
                one.urgent = True
                self.waiting.remove(one)
                self.enqueue(one)

    def must_wait(self, request: Request) -> bool:
        """Whether a request that waits has a better right to free blocks than one that asks for some now."""
        return any(one.preempted or one.urgent or one.priority < request.priority for one in self.waiting)

    def take_out(self, request: Request) -> None:
        """Of the running, or of those that landed; its seat is the caller's to deal with."""
        del (self.running if request.request_id in self.running else self.landed)[request.request_id]

    def preempt(self, request: Request) -> None:
        """Take a running or landed request's seat; its outputs stay, what is in flight is dropped and sampled again."""
        assert request.seat is not None, f"{request.request_id} is preempted without a seat"
        self.take_out(request)
        self.seats.close(request.seat)
        request.seat = None
        request.preempted = True
        request.pulled = False
        self.enqueue(request)
        self.counters.num_preemptions += 1

    def remove(self, request: Request) -> None:
        """Forget a request whose pull is not open (finished or aborted); give up its seat, or what it holds paused."""
        for state in (self.running, self.landed, self.pausing, self.paused):
            if state.pop(request.request_id, None) is not None:
                break
        else:
            self.waiting.remove(request)
        if request.seat is not None:
            self.seats.close(request.seat)
            request.seat = None
        self.seats.blocks.release(request.held_blocks)
        request.held_blocks = []

    def count_admission(self, request: Request, num_cached_tokens: int) -> None:
        """Prefix cache statistics and the request's own num_cached_tokens (of its first admission)."""
        self.counters.prefix_cache_queries += request.num_tokens
        self.counters.prefix_cache_hits += num_cached_tokens
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_cached_tokens
            self.counters.prompt_tokens += len(request.prompt)

    @property
    def headroom(self) -> int:
        """Blocks to leave free when admitting: each running request may soon want one, and preemption is dearer."""
        return len(self.running)
