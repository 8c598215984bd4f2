"""Decides what every step computes. Handles counts, never token values, so it can plan a step while one is in flight.

One step of life:

    1. commands (add, reserve, abort, serve, ...) change the queues, between steps
    2. schedule():  decode rows first; then prefill chunks within what time and tokens are left
    3. update():    a step has landed: blocks are committed, tokens appended, stops found, served pieces offered

On role "prefill" served calls take their chunks before own prefills, on role "decode" after them; own decode rows and
just pulled requests come first on both (they are cheap, and cannot wait). Torch-free, clock-free.
"""

from __future__ import annotations

from collections import deque

from engine.config import EngineConfig, Role
from engine.kv.block_manager import BlockManager
from engine.messages import (
    Abort,
    Add,
    Commit,
    EndServe,
    Load,
    NewTokens,
    NoSpace,
    Pause,
    Paused,
    Probe,
    Probed,
    PullClosed,
    Reserve,
    Reserved,
    Serve,
)
from engine.request import FinishReason
from engine.scheduler.batch import Runner, ScheduledBatch, StepResult
from engine.scheduler.batch_builder import BatchBuilder
from engine.scheduler.decode import schedule_decode
from engine.scheduler.landing import Landed, land_step
from engine.scheduler.pauses import pause
from engine.scheduler.prefill import admit_waiting, schedule_running_prefills, start_landed, usable_match
from engine.scheduler.profile import Scales
from engine.scheduler.pulls import Pulls
from engine.scheduler.request_book import RequestBook, RequestRefusedError
from engine.scheduler.request_state import Counters, LaunchedStep, ModelLimits, Request, parse_tokens
from engine.scheduler.seats import Seats
from engine.scheduler.served import ServedCalls, ServeNews
from engine.scheduler.step_cost import StepCost


class Scheduler:
    """Owns the requests, the served calls and, through the block manager, the KV pool.

    Rows given to the runner: [0, max_num_seqs) for own requests, the next max_num_served for served calls.
    `role` and `step_cost` may be changed between steps.
    """

    def __init__(self, config: EngineConfig, *, limits: ModelLimits, blocks: BlockManager, step_cost: StepCost) -> None:
        self.role: Role = config.role
        self.step_cost = step_cost
        self.scales: Scales = (1.0, 1.0)  # set by whoever times the steps (engine/scheduler/profile.py)
        self.blocks = blocks
        self.limits = limits
        self._config = config
        self._counters = Counters()
        self._seats = Seats(blocks, config.max_num_seqs, config.max_num_served)
        self._book = RequestBook(limits, self._seats, self._counters)
        self._pulls = Pulls(self._book)
        self._served = ServedCalls(self._book)
        self._in_flight: deque[LaunchedStep] = deque()
        self._step = 0
        self._news: list[ServeNews] = []

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not landed."""
        return len(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        """Whether anything could want a step: pulls, paused requests and fully offered calls do not."""
        book = self._book
        return bool(book.waiting or book.running or book.landed or self._served.wants_compute)

    def lacks_row(self, request_id: str) -> bool:
        """Whether a request waits for its turn in the batch: its KV is here, or it is to compute it."""
        request = self._book.find(request_id)
        return request is not None and (request_id in self._book.landed or request in self._book.waiting)

    @property
    def num_served_started(self) -> int:
        """Served calls that were ever started."""
        return self._served.num_started

    # -- commands, between steps ------------------------------------------------------------------------------------

    def add(self, command: Add) -> list[NewTokens]:
        """Queue a request; one that can never fit or has nothing left to generate ends at once.

        Raises ValueError for malformed tokens and for an id in use.
        """
        try:
            request = self._book.parse(command)
        except RequestRefusedError as refusal:
            return [ended(command.request_id, FinishReason.ABORT, len(command.outputs) // 4, refusal.code)]
        if not request.wants_compute:
            return [ended(command.request_id, FinishReason.LENGTH, len(request.outputs))]
        self._book.enqueue(request)
        return []

    def probe(self, command: Probe) -> Probed:
        """What the prefix cache holds now; nothing is pinned. Raises ValueError for malformed tokens."""
        tokens = parse_tokens(command.tokens, self.limits.vocab_size)
        matched = usable_match(self._seats, self._book.chain(command.cache_salt), tokens) if len(tokens) else []
        return Probed(request_id=command.request_id, num_cached_tokens=len(matched) * self.blocks.block_size)

    def reserve(self, command: Reserve) -> Reserved | NoSpace:
        """See engine/messages.py. Raises ValueError for malformed tokens and for an id in use."""
        return self._pulls.reserve(command)

    def commit(self, command: Commit) -> None:
        """See engine/messages.py. Raises ValueError for blocks that the pull does not complete."""
        self._pulls.commit(command)

    def pull_closed(self, command: PullClosed) -> None:
        """See engine/messages.py. Raises ValueError (the request is gone then) for an impossible count."""
        self._pulls.closed(command)

    def abort(self, command: Abort) -> None:
        """Drop a request in whatever state; unknown ids are ignored."""
        request = self._book.find(command.request_id)
        if request is None:
            return
        if request.request_id in self._book.pulling:
            self._pulls.abort(request)
        else:
            self._book.remove(request)

    def pause(self, command: Pause) -> list[Paused]:
        """See engine/scheduler/pauses.py; unknown ids are ignored. Raises ValueError while its pull is open."""
        request = self._book.find(command.request_id)
        return [] if request is None else pause(self._book, request)

    def serve(self, command: Serve) -> list[ServeNews]:
        """Accept or refuse a served call. Raises ValueError for a range or tokens that make no sense."""
        return self._served.serve(command, self._own_tokens_ahead())

    def end_serve(self, command: EndServe) -> None:
        """Unpin; unknown ids are ignored."""
        self._served.end(command.call_id)

    # -- steps --------------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None when nothing can run now (see `num_in_flight`: landing may change that)."""
        assert len(self._in_flight) <= self._config.steps_in_flight, "a step must land before another is scheduled"
        if not self.has_unfinished:
            return None
        book, served = self._book, self._served
        builder = BatchBuilder(
            cost=self.step_cost,
            max_ms=self._config.max_step_ms,
            max_tokens=self._config.max_batched_tokens,
            block_size=self.blocks.block_size,
        )
        if book.landed:
            start_landed(book)
        running: list[Request] = []
        if book.running:
            schedule_decode(book, builder)
            running = book.in_order()
            schedule_running_prefills(running, builder, only_pulled=True)
        if served.calls and self.role == "prefill":
            self._news += served.schedule(builder)
        schedule_running_prefills(running, builder)
        if book.landed or book.waiting:
            admit_waiting(book, builder)
        if served.calls and self.role == "decode":
            self._news += served.schedule(builder)
        built = builder.build(self._step)
        if built is None:
            return None
        batch, launched = built
        self._in_flight.append(launched)
        self._step += 1
        return batch

    def update(self, result: StepResult, runner: Runner) -> Landed:
        """Land the oldest step in flight; `runner` gives checksums of what it completed."""
        return land_step(self._in_flight.popleft(), result, self._book, self._served, runner)

    def take_news(self) -> list[ServeNews]:
        """News of served calls since the last call: progress of each, then pieces offered while scheduling."""
        news, self._news = self._news, []
        return self._served.progress(self._own_tokens_ahead()) + news if self._served.calls else news

    def _own_tokens_ahead(self) -> int:
        """Own prefill tokens that go before served calls."""
        return self._own_tokens()[0] if self.role == "decode" else 0

    def _own_tokens(self) -> tuple[int, int]:
        """Of own requests: prefill tokens to come, and tokens computed that running ones see."""
        queued = computed = 0
        for request in self._book.waiting:
            queued += request.num_tokens
        for state in (self._book.running, self._book.landed):
            for request in state.values():
                seat = request.seat
                if seat is not None:
                    left = request.num_scheduled_tokens - seat.num_computed
                    queued += left if left > 1 else 0
                    computed += seat.num_computed
        return queued, computed

    def load(self) -> Load:
        """Queues, blocks and totals now."""
        blocks, counters, book, served = self.blocks, self._counters, self._book, self._served
        queued_tokens, context_tokens = self._own_tokens()
        num_free, num_quarantined = blocks.num_free, blocks.num_quarantined
        return Load(
            num_running=len(book.running),
            num_waiting=len(book.waiting) + len(book.landed),
            num_pulling=len(book.pulling),
            num_served=len(served.calls),
            queued_tokens=queued_tokens + served.queued_tokens,
            num_blocks=blocks.num_usable,
            num_free_blocks=num_free,
            num_referenced_blocks=blocks.num_usable - num_free - num_quarantined,
            num_quarantined_blocks=num_quarantined,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            num_preemptions=counters.num_preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            context_tokens=context_tokens,
            prefill_scale=self.scales[0],
            decode_scale=self.scales[1],
            num_paused=len(book.pausing) + len(book.paused),
        )


def ended(request_id: str, reason: FinishReason, num_outputs: int = 0, error: str | None = None) -> NewTokens:
    """The last message of a request that ends without a token."""
    return NewTokens(request_id=request_id, first_position=num_outputs, token_ids=(), finish_reason=reason, error=error)
