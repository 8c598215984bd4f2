"""What has arrived for one HTTP request: filled by the link's callbacks, emptied by the one task that answers.

A wake-up hands over everything that has come since the last one, so a step's batch costs one switch per request and no
task per token. While the answering task is stuck in a send (the client does not read), arrivals are counted in bytes;
over the bound the request is given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from cluster.router.effects import Deliver, DeliverScores, Ended

# what an event of the stream takes beside its text, roughly; text is taken as 4 bytes a token
_EVENT_BYTES = 240
_TOKEN_BYTES = 4
_LOGPROB_BYTES = 80

Arrival = tuple[int, Deliver | DeliverScores | Ended]


def _size(item: Deliver | DeliverScores | Ended) -> int:
    if not isinstance(item, Deliver):
        return _EVENT_BYTES  # a prompt's logprobs are bounded by themselves (plan.py)
    alternatives = sum(1 + len(entry.top_ids) for entry in item.tokens.logprobs)
    return _EVENT_BYTES + _TOKEN_BYTES * len(item.tokens.token_ids) + _LOGPROB_BYTES * alternatives


class Inbox:
    """Arrivals as (index of the prompt, Deliver or Ended), in order. Used on one event loop only."""

    def __init__(self, *, max_blocked_bytes: int, on_overflow: Callable[[], None]):
        self._items: deque[Arrival] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False
        self._blocked = False
        self._blocked_bytes = 0
        self._max_blocked_bytes = max_blocked_bytes
        self._on_overflow = on_overflow
        self._closed = False
        self.listener: Callable[[], None] | None = None  # told in place of `take`, which nobody waits in then

    def put(self, prompt_index: int, item: Deliver | DeliverScores | Ended) -> None:
        """Add an arrival. After `close`: dropped."""
        if self._closed:
            return
        self._items.append((prompt_index, item))
        if self._blocked:
            self._blocked_bytes += _size(item)
            if self._blocked_bytes > self._max_blocked_bytes:
                self.close()
                self._on_overflow()
        self.wake()

    def wake(self) -> None:
        """Let `take` return, also without arrivals (a timer, a client that left)."""
        self._woken = True
        if self.listener is not None:
            self.listener()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Arrival]:
        """Everything that has arrived; waits until there is something or `wake` was called."""
        if not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take_now()

    def take_now(self) -> list[Arrival]:
        """Everything that has arrived, which may be nothing."""
        self._woken = False
        items = list(self._items)
        self._items.clear()
        return items

    def blocked(self, is_blocked: bool) -> None:
        """Told around each send: only what arrives while the client blocks us counts."""
        self._blocked = is_blocked
        self._blocked_bytes = 0

    def close(self) -> None:
        """Drop everything, now and from here on."""
        self._closed = True
        self._items.clear()
