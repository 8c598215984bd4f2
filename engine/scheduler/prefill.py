"""Prefill of own requests: chunks of running ones, then admission of waiting ones while rows and blocks last."""

from __future__ import annotations

from engine.kv.prefix_cache import HashChain
from engine.scheduler.batch import IntArray
from engine.scheduler.batch_builder import BatchBuilder
from engine.scheduler.request_book import RequestBook
from engine.scheduler.request_state import Request, Seat
from engine.scheduler.seats import Seats


def usable_match(seats: Seats, chain: HashChain, tokens: IntArray) -> list[int]:
    """Cached blocks of a request's prefix, capped so that its last token never writes into a shared block."""
    cap = (len(tokens) - 1) // seats.blocks.block_size
    return seats.blocks.match(chain.hash_blocks(tokens)[:cap])


def open_seat(book: RequestBook, request: Request) -> Seat | None:
    """A seat with blocks for all known tokens (whole, so that no two half-admitted ones wait for each other)."""
    seats = book.seats
    tokens = request.tokens()
    matched = usable_match(seats, request.chain, tokens)
    num_new = -(-len(tokens) // seats.blocks.block_size) - len(matched)
    if not seats.num_free_rows(served=False) or not seats.blocks.can_take(matched, num_new + book.headroom):
        return None
    seat = seats.open(matched, num_new, served=False)
    book.count_admission(request, seat.num_computed)
    return seat


def schedule_running_prefills(book: RequestBook, builder: BatchBuilder, *, only_pulled: bool = False) -> None:
    """Continue prefills, oldest first. One token before its end a request is a decode row, or waits for a block."""
    for request in book.oldest_first():
        seat = request.seat
        assert seat is not None, f"{request.request_id} runs without a seat"
        if builder.has(seat) or request.num_tokens - seat.num_computed < 2 or (only_pulled and not request.pulled):
            continue
        add_chunk(request, seat, builder)


def admit_waiting(book: RequestBook, builder: BatchBuilder) -> None:
    """Admit in order; the first that does not fit keeps the ones behind it waiting."""
    while book.waiting and builder.has_room:
        request = book.waiting[0]
        seat = open_seat(book, request)
        if seat is None:
            return
        book.waiting.popleft()
        request.seat = seat
        request.preempted = False
        book.running[request.request_id] = request
        if not add_chunk(request, seat, builder):
            return


def add_chunk(request: Request, seat: Seat, builder: BatchBuilder) -> bool:
    """Schedule the next chunk; False if nothing fits into this step any more."""
    end = request.num_tokens
    query_len = builder.chunk_len(seat.num_computed, end)
    if query_len == 0:
        return False
    builder.add_chunk(request, seat, query_len, samples=seat.num_computed + query_len == end)
    request.pulled = False
    return True
