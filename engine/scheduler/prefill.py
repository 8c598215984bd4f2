"""Prefill of own requests: chunks of running ones, then admission of waiting ones while rows and blocks last."""

from __future__ import annotations

from engine.kv.prefix_cache import HashChain
from engine.scheduler.batch import IntArray
from engine.scheduler.batch_builder import BatchBuilder
from engine.scheduler.request_book import RequestBook
from engine.scheduler.request_state import Request, Seat
from engine.scheduler.seats import Seats

# Prompt logprobs need the LM head for every position, which the step's predicted time does not know of: bounds what one
# step adds (some 3 ms a position at ERNIE's vocabulary on one CPU thread), holds and reports.
MAX_SCORED_PER_STEP = 128


def usable_match(seats: Seats, chain: HashChain, tokens: IntArray, num_usable: int | None = None) -> list[int]:
    """Cached blocks of a request's prefix, capped so that its last token never writes into a shared block.

    `num_usable`: only the first so many tokens may come from the cache; the others' logits are wanted.
    """
    at_most = len(tokens) - 1 if num_usable is None else min(num_usable, len(tokens) - 1)
    cap = at_most // seats.blocks.block_size
    return seats.blocks.match(chain.hash_blocks(tokens)[:cap])


def reserve_seat(book: RequestBook, request: Request) -> Seat | None:
    """Blocks for all known tokens (whole, so that no two half-admitted ones wait for each other), and no row yet."""
    blocks = _fitting_blocks(book, request)
    if blocks is None:
        return None
    seat = book.seats.reserve(*blocks)
    book.count_admission(request, seat.num_computed)
    return seat


def _fitting_blocks(book: RequestBook, request: Request) -> tuple[list[int], int] | None:
    """(cached blocks, number of new ones) of a request, if there are as many now."""
    blocks, tokens = book.seats.blocks, request.tokens()
    matched = usable_match(book.seats, request.chain, tokens, request.num_scored if request.num_to_score > 0 else None)
    num_new = -(-len(tokens) // blocks.block_size) - len(matched)
    return (matched, num_new) if blocks.can_take(matched, num_new + book.headroom) else None


def start_landed(book: RequestBook) -> list[Request]:
    """Rows for those whose KV has come. One is left to who waits longer and has room; `admit_waiting` comes after."""
    started: list[Request] = []
    while book.landed and (num_free := book.seats.num_free_rows(served=False)):
        request = book.first_landed()
        ahead = [one for one in book.waiting if one.queue_order < request.queue_order]
        if len(ahead) >= num_free and _fitting_blocks(book, ahead[0]) is not None:
            break
        book.run(request)
        started.append(request)
    return started


def schedule_running_prefills(running: list[Request], builder: BatchBuilder, *, only_pulled: bool = False) -> None:
    """Continue those of `running`, in its order. One token before its end one is a decode row, or waits for a block."""
    for request in running:
        if only_pulled and not request.pulled:
            continue
        seat = request.seat
        assert seat is not None, f"{request.request_id} runs without a seat"
        if request.num_tokens - seat.num_computed < 2 or builder.has(seat):
            continue
        add_chunk(request, seat, builder)


def admit_waiting(book: RequestBook, builder: BatchBuilder) -> None:
    """Admit in order; the first that does not fit keeps the ones behind it waiting.

    Before them those with blocks of their own, as decoding may have preempted somebody and freed a row just now.
    """
    for request in start_landed(book):
        assert request.seat is not None, f"{request.request_id} runs without a seat"
        add_chunk(request, request.seat, builder)
    while book.waiting and builder.has_room:
        request = book.waiting[0]
        seat = reserve_seat(book, request) if book.seats.num_free_rows(served=False) else None
        if seat is None:
            return
        book.seats.take_row(seat)
        book.waiting.popleft()
        book.note_admitted(request)
        request.seat = seat
        request.preempted = False
        book.running[request.request_id] = request
        if not add_chunk(request, seat, builder):
            return


def add_chunk(request: Request, seat: Seat, builder: BatchBuilder) -> bool:
    """Schedule the next chunk; False if nothing fits into this step any more."""
    end, first = request.num_tokens, seat.num_computed
    is_scored = request.num_to_score > 0
    query_len = builder.chunk_len(first, min(end, first + MAX_SCORED_PER_STEP) if is_scored else end)
    if query_len == 0:
        return False
    scores = _scored_positions(request, first, query_len) if is_scored else None
    builder.add_chunk(request, seat, query_len, samples=first + query_len == end, scores=scores)
    request.pulled = False
    return True


def _scored_positions(request: Request, first: int, query_len: int) -> range | None:
    """Prompt positions that the query tokens [first, first + query_len) predict and that were not told before.

    What an earlier chunk in flight scores lies before `first`.
    """
    start = max(first, request.num_scored) + 1
    end = min(first + query_len + 1, len(request.prompt))
    return range(start, end) if start < end else None
