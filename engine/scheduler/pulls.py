"""Requests whose prompt KV is pulled from a peer: Reserve, Commit, PullClosed, and the quarantine after an abort.

Reserve     all blocks at once; matched READY, the others LOADING (a copy may write them)
Commit      LOADING -> READY, cached
PullClosed  nothing writes any more: the request runs when a row is free, from num_computed_tokens on
abort       READY blocks released, LOADING ones QUARANTINED until PullClosed
"""

from __future__ import annotations

from engine.kv.block_manager import BlockState
from engine.messages import Commit, NoSpace, PullClosed, Reserve, Reserved
from engine.scheduler.prefill import reserve_seat
from engine.scheduler.request_book import RequestBook, RequestRefusedError
from engine.scheduler.request_state import Request, Seat


class Pulls:
    """The pulls of one scheduler. An open pull's request is never preempted: it is not among the running."""

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self._blocks = book.seats.blocks
        self._quarantined: dict[str, list[int]] = {}

    @property
    def num_quarantined_calls(self) -> int:
        """Aborted requests whose pull is still open."""
        return len(self._quarantined)

    def reserve(self, command: Reserve) -> Reserved | NoSpace:
        """Allocate everything or nothing. Those that wait for blocks after a preemption, or by priority, go first."""
        request_id = command.add.request_id
        if request_id in self._quarantined:
            return NoSpace(request_id=request_id)
        try:
            request = self._book.parse(command.add)
        except RequestRefusedError:
            return NoSpace(request_id=request_id, never=True)
        if not request.wants_compute or request.num_to_score > 0:  # prompt logprobs need every position computed here
            return NoSpace(request_id=request_id, never=True)
        if self._book.must_wait(request):
            return NoSpace(request_id=request_id)
        seat = reserve_seat(self._book, request)
        if seat is None:
            return NoSpace(request_id=request_id)
        self._book.note_admitted(request)
        request.seat = seat
        self._book.pulling[request_id] = request
        return Reserved(
            request_id=request_id, block_ids=tuple(seat.block_ids), num_cached_tokens=request.num_cached_tokens
        )

    def commit(self, command: Commit) -> None:
        """Blocks landed. Ignored for a request that is gone (its blocks stay in quarantine)."""
        request = self._book.pulling.get(command.request_id)
        if request is None:
            return
        seat = _seat(request)
        end = command.first_block + len(command.checksums)
        tokens = request.tokens()
        # the block of the last token is computed here, at least in part: it is never complete by copying
        if command.first_block < 0 or end > (len(tokens) - 1) // self._blocks.block_size:
            raise ValueError(f"blocks [{command.first_block}, {end}) are not complete blocks of the pull")
        keys = request.chain.hash_blocks(tokens)
        for i, checksum in enumerate(command.checksums, start=command.first_block):
            if self._blocks.state(seat.block_ids[i]) is not BlockState.LOADING:
                raise ValueError(f"block {i} of {command.request_id} is committed twice")
            self._blocks.commit(seat.block_ids[i], keys[i], checksum)

    def closed(self, command: PullClosed) -> None:
        """Let the request run soon, or end the quarantine of one that was aborted. Unknown ids are ignored."""
        quarantined = self._quarantined.pop(command.request_id, None)
        if quarantined is not None:
            self._blocks.end_quarantine(quarantined)
            return
        request = self._book.pulling.get(command.request_id)
        if request is None:
            return
        if not 0 <= command.num_computed_tokens < request.num_tokens:
            self.abort(request)
            self._blocks.end_quarantine(self._quarantined.pop(command.request_id))
            raise ValueError(f"{command.num_computed_tokens} computed tokens are not within [0, {request.num_tokens})")
        del self._book.pulling[command.request_id]
        self._book.landed[command.request_id] = request
        request.pulled = True
        self._start_from(request, command.num_computed_tokens)

    def _start_from(self, request: Request, num_computed: int) -> None:
        """Blocks that were committed beyond the valid prefix are cached by now: computing must not write into them."""
        seat = _seat(request)
        block_size = self._blocks.block_size
        num_computed = max(num_computed, seat.num_computed)  # what the prefix cache held is valid anyway
        first = num_computed // block_size
        beyond = [
            i for i in range(first, len(seat.block_ids)) if self._blocks.state(seat.block_ids[i]) is BlockState.READY
        ]
        if first in beyond:
            num_computed = first * block_size  # its valid first tokens go away with the block
        seat.num_computed = seat.num_landed = num_computed
        if not beyond:
            return
        self._blocks.release([seat.block_ids[i] for i in beyond])
        if len(beyond) > self._blocks.num_free:
            for i in reversed(beyond):
                del seat.block_ids[i]
            self._book.preempt(request)
            return
        for i, block_id in zip(beyond, self._blocks.allocate(len(beyond)), strict=True):
            seat.block_ids[i] = block_id

    def abort(self, request: Request) -> None:
        """Drop a request whose pull is open."""
        del self._book.pulling[request.request_id]
        seat = _seat(request)
        ready = [b for b in seat.block_ids if self._blocks.state(b) is BlockState.READY]
        loading = [b for b in seat.block_ids if self._blocks.state(b) is BlockState.LOADING]
        self._book.seats.end_reservation(seat)
        self._blocks.release(ready)
        self._blocks.quarantine(loading)
        self._quarantined[request.request_id] = loading
        request.seat = None


def _seat(request: Request) -> Seat:
    assert request.seat is not None, f"{request.request_id} pulls without blocks"
    return request.seat
