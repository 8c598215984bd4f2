"""Decode rows: one query token each, a new block when one is full, preemption (the last in order: least
urgent, then newest) when none is free."""

from __future__ import annotations

from engine.scheduler.batch_builder import BatchBuilder
from engine.scheduler.request_book import RequestBook
from engine.scheduler.request_state import Request, Seat


def schedule_decode(book: RequestBook, builder: BatchBuilder) -> None:
    """Add every running request that stands one token before its end, in order."""
    for request in book.in_order():
        seat = request.seat
        if seat is None:  # preempted just now by an older one
            continue
        num_scheduled = request.num_scheduled_tokens
        if num_scheduled - seat.num_computed != 1 or num_scheduled - len(request.prompt) >= request.max_outputs:
            continue  # a prefill, or at its length stop
        if builder.num_tokens_left == 0:
            continue
        if grow(book, request, seat):
            builder.add_decode(request, seat)
            request.pulled = False


def grow(book: RequestBook, request: Request, seat: Seat) -> bool:
    """Give the next position a block if it has none, preempting requests behind it. False: not in this step."""
    blocks = book.seats.blocks
    if seat.num_computed < len(seat.block_ids) * blocks.block_size:
        return True
    while blocks.num_free == 0:
        if book.seats.num_closing:
            return False  # blocks come back when the step in flight lands: preempting more would be rash
        victim = book.last_in_order()
        book.preempt(victim)
        if victim is request:
            return False
    seat.block_ids += blocks.allocate(1)
    return True
