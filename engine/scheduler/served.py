"""Served calls: this worker computes and pins the KV of a peer's prompt, offering each piece as soon as it is READY.

    Serve -> queued (blocks held, Serving) -> started (cached blocks offered) -> chunks, pieces -> ServeDone -> EndServe

All blocks are allocated when the call is accepted: a call that was accepted never waits for memory.
"""

from __future__ import annotations

from engine.messages import Serve, ServeBusy, ServeDone, ServedPiece, ServeProgress, Serving
from engine.scheduler.batch import Runner
from engine.scheduler.batch_builder import BatchBuilder
from engine.scheduler.request_book import RequestBook
from engine.scheduler.request_state import ServedCall, parse_tokens

ServeNews = Serving | ServeBusy | ServeProgress | ServedPiece | ServeDone


class ServedCalls:
    """The calls of one scheduler, first come first served. At most one seat row each, from Serve to EndServe."""

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self._seats = book.seats
        self._blocks = book.seats.blocks
        self.calls: dict[str, ServedCall] = {}  # by id
        self.num_started = 0  # ever

    @property
    def wants_compute(self) -> bool:
        """Whether any call has tokens to compute or is on its way."""
        return bool([call for call in self.calls.values() if not call.offered_all])

    @property
    def queued_tokens(self) -> int:
        """Tokens not yet scheduled."""
        queued = 0
        for call in self.calls.values():
            queued += call.end - call.seat.num_computed
        return queued

    def serve(self, command: Serve, num_tokens_ahead: int) -> list[ServeNews]:
        """Accept or refuse. Raises ValueError when the call makes no sense. `num_tokens_ahead` beyond the calls'."""
        block_size = self._blocks.block_size
        tokens = parse_tokens(command.tokens, self._book.limits.vocab_size)
        if command.call_id in self.calls:
            raise ValueError(f"call id {command.call_id!r} is in use")
        if command.start < 0 or command.start % block_size or not command.start <= command.end <= len(tokens):
            raise ValueError(f"[{command.start}, {command.end}) is not an aligned range of {len(tokens)} tokens")
        if command.end > self._book.limits.max_model_len:
            raise ValueError(f"{command.end} tokens are more than the context")
        chain = self._book.chain(command.cache_salt)
        matched = self._blocks.match(chain.hash_blocks(tokens[: command.end]))
        end = command.end
        if command.max_compute_tokens >= 0:
            end = min(end, len(matched) * block_size + command.max_compute_tokens)
        if end <= command.start:
            end = len(matched) * block_size  # nothing to offer: compute nothing either
        num_blocks = -(-end // block_size)
        num_new = num_blocks - len(matched)
        if num_blocks > self._blocks.served_quota:
            return [ServeBusy(call_id=command.call_id, never=True)]
        has_row = self._seats.num_free_rows(served=True) > 0
        fits = self._blocks.can_take(matched, num_new + self._book.headroom if num_new else 0)
        if not has_row or not fits or not self._blocks.can_serve(matched, num_new):
            return [ServeBusy(call_id=command.call_id)]
        seat = self._seats.open(matched, num_new, served=True)
        queued = self.queued_tokens + num_tokens_ahead if num_new else 0
        self._book.counters.prefix_cache_queries += end
        self._book.counters.prefix_cache_hits += seat.num_computed
        call = ServedCall(
            call_id=command.call_id,
            token_ids=tokens[:end],
            chain=chain,
            seat=seat,
            num_offered=command.start // block_size,
        )
        self.calls[call.call_id] = call
        news: list[ServeNews] = [
            Serving(call_id=call.call_id, cached_tokens=seat.num_computed, end_tokens=end, queued_tokens=queued)
        ]
        if queued == 0:
            news += self._start(call)
        return news

    def end(self, call_id: str) -> None:
        """Unpin. Unknown ids are ignored."""
        call = self.calls.pop(call_id, None)
        if call is not None:
            self._seats.close(call.seat)

    def schedule(self, builder: BatchBuilder) -> list[ServeNews]:
        """Add chunks in order of arrival; calls that start now offer what is cached."""
        news: list[ServeNews] = []
        for call in self.calls.values():
            if not call.num_remaining:
                continue
            if not builder.has_room:
                break
            if not call.started:
                self._seats.extend_match(call.seat, call.chain.hash_blocks(call.token_ids))
            query_len = builder.chunk_len(call.seat.num_computed, call.end)
            if call.num_remaining and not query_len:
                break
            if not call.started:
                news += self._start(call)
            if query_len:
                builder.add_chunk(call, call.seat, query_len, samples=False)
        return news

    def progress(self, num_tokens_ahead: int) -> list[ServeNews]:
        """News of every call that is not offered in full."""
        news: list[ServeNews] = []
        num_ahead = num_tokens_ahead
        for call in self.calls.values():
            if not call.offered_all:
                news.append(
                    ServeProgress(
                        call_id=call.call_id,
                        computed_tokens=call.seat.num_landed,
                        queued_tokens=0 if call.started else num_ahead,
                    )
                )
            num_ahead += call.num_remaining
        return news

    def _start(self, call: ServedCall) -> list[ServeNews]:
        call.started = True
        self.num_started += 1
        return self.offer(call, None)

    def offer(self, call: ServedCall, runner: Runner | None) -> list[ServeNews]:
        """READY blocks not yet offered, and the partial last one when the end is reached (`runner` checksums it)."""
        block_size = self._blocks.block_size
        seat = call.seat
        num_complete = seat.num_landed // block_size
        first = call.num_offered
        block_ids = seat.block_ids[first:num_complete]
        checksums = [self._blocks.checksum(block_id) for block_id in block_ids]
        num_partial = call.end % block_size
        if seat.num_landed == call.end and num_partial and first <= num_complete:
            assert runner is not None, "a partial last block is computed here, so a step has just landed"
            block_ids = seat.block_ids[first:]
            checksums.append(runner.checksum_partial(block_ids[-1], num_partial))
        news: list[ServeNews] = []
        if block_ids:
            call.num_offered = first + len(block_ids)
            news.append(
                ServedPiece(
                    call_id=call.call_id,
                    first_block=first,
                    block_ids=tuple(block_ids),
                    checksums=tuple(checksums),
                    end_tokens=min(call.num_offered * block_size, call.end),
                )
            )
        if seat.num_landed == call.end:
            call.offered_all = True
            news.append(ServeDone(call_id=call.call_id))
        return news
