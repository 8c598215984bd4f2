"""Runs copies in threads and says exactly once, however late, that each has ended.

A copy that outlives its call, or its request, is a late write: its target blocks stay its own until `on_copied`. So
nothing here can be cancelled, and what a call's copies read from is kept until the last of them has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cluster.transfer.connector import CallFence, Connector, ReceiverConnector, SourceUnreachableError, TransferError
from cluster.types import FetchAccepted, Piece, Transport

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Call:
    receiver: ReceiverConnector
    num_copies: int = 0
    ended: bool = False


class Copies:
    """The copies of all calls that this worker makes. Call it from the event loop; `on_copied` runs there."""

    def __init__(
        self,
        connectors: dict[Transport, Connector],
        on_copied: Callable[[int, bool], None],
        num_threads: int = 2,
    ) -> None:
        self._connectors = connectors
        self._on_copied = on_copied
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="copy")
        self._calls: dict[str, _Call] = {}
        self.num_running = 0

    def begin_call(self, accepted: FetchAccepted, fence: CallFence) -> None:
        """A source accepted a call. Raises SourceUnreachableError if its transport cannot be used from here."""
        connector = self._connectors.get(accepted.transport)
        if connector is None:
            raise SourceUnreachableError(f"transport {accepted.transport} is not in use here")
        self._calls[fence.call_id] = _Call(receiver=connector.receiver(accepted, fence))

    def end_call(self, call_id: str) -> None:
        """The call is over; its copies go on. Unknown ids are ignored (it may never have been accepted)."""
        call = self._calls.pop(call_id, None)
        if call is not None:
            call.ended = True
            self._release(call)

    def start(self, copy_id: int, piece: Piece, targets: tuple[int, ...]) -> None:
        """Copy a piece; ends in one on_copied(copy_id, ok), never before this returns."""
        loop = asyncio.get_running_loop()
        call = self._calls.get(piece.call_id)
        self.num_running += 1
        if call is None:
            loop.call_soon(self._ended, copy_id, None, TransferError("its call is over"))
            return
        call.num_copies += 1
        future = self._threads.submit(call.receiver.copy, piece, targets)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._ended, copy_id, call, _error_of(done)))

    def close(self) -> None:
        """Wait for the copies that run. To be called when nobody needs on_copied any more."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _ended(self, copy_id: int, call: _Call | None, error: BaseException | None) -> None:
        self.num_running -= 1
        if isinstance(error, TransferError):
            _log.warning("copy %d: %s", copy_id, error)
        elif error is not None:
            _log.error("copy %d failed", copy_id, exc_info=error)
        if call is not None:
            call.num_copies -= 1
            self._release(call)
        self._on_copied(copy_id, error is None)

    def _release(self, call: _Call) -> None:
        if call.ended and not call.num_copies:
            call.receiver.close()


def _error_of(future: Future[None]) -> BaseException | None:
    return TransferError("this worker shuts down") if future.cancelled() else future.exception()
