"""Requests that are to go on elsewhere: they compute no more, and keep the KV that a peer can read until Abort.

running  -> pausing    seat kept until the step in flight has landed: its tokens count, and it may end the request
landed   -> paused     never ran
pausing  -> paused     row given up, and all blocks but the cached ones of the longest prefix, which stay pinned
waiting  -> paused     holds nothing
A paused request wants no step and is never preempted.
"""

from __future__ import annotations

from engine.messages import Paused
from engine.scheduler.request_book import RequestBook
from engine.scheduler.request_state import Request, Seat


def pause(book: RequestBook, request: Request) -> list[Paused]:
    """Take a request out of every later step. Nothing for one that is on its way already.

    Raises ValueError while its pull is open: copies still write into its blocks.
    """
    request_id = request.request_id
    if request_id in book.pulling:
        raise ValueError(f"{request_id} cannot pause while its pull is open")
    if request_id in book.pausing or request_id in book.paused:
        return []
    if request.seat is None:
        book.waiting.remove(request)
        book.paused[request_id] = request
        return [Paused(request_id=request_id, num_held_tokens=0)]
    book.take_out(request)
    book.pausing[request_id] = request
    return settle(book)


def settle(book: RequestBook) -> list[Paused]:
    """Requests that have nothing in flight any more are paused now."""
    return [
        _hold(book, request, request.seat)
        for request in list(book.pausing.values())
        if request.seat is not None and not book.seats.is_in_flight(request.seat)
    ]


def _hold(book: RequestBook, request: Request, seat: Seat) -> Paused:
    """Pin what a peer's Serve would match: not always the own blocks (another may hold the key), nor all of them
    (those that were pulled and never committed are not cached)."""
    blocks = book.seats.blocks
    matched = blocks.match(request.chain.hash_blocks(request.tokens()[: seat.num_landed]))
    blocks.acquire(matched)
    book.seats.close(seat)
    request.seat = None
    request.held_blocks = matched
    del book.pausing[request.request_id]
    book.paused[request.request_id] = request
    return Paused(request_id=request.request_id, num_held_tokens=len(matched) * blocks.block_size)
