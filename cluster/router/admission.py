"""The bounded queue in front of the cluster: who may enter, and when a refused client should come back.

Nothing waits in here. A request is *queued* from its admission until a worker takes it up, and *running* from then on;
both counts are bounded, and one over the bound is refused at once (429), because a client that waits in a line it
cannot see helps nobody. Pure: time is an argument.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

RATE_WINDOW_S = 30.0
RATE_SAMPLES = 256
MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Refused:
    """No room. `retry_after_s` is when, at the recent rate of service, there should be some."""

    retry_after_s: float


class Admission:
    """Counts queued and running requests (weighted: a request of 8 prompts counts 8)."""

    def __init__(self, *, max_queue: int, max_running: int):
        self._max_queue = max_queue
        self._max_running = max_running
        self._queued: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._num_queued = 0
        self._num_running = 0
        self._left: deque[tuple[float, int]] = deque(maxlen=RATE_SAMPLES)

    @property
    def num_queued(self) -> int:
        """Admitted, and no worker has begun with it."""
        return self._num_queued

    @property
    def num_running(self) -> int:
        """Some worker has begun with it."""
        return self._num_running

    def admit(self, now: float, request_id: str, weight: int = 1) -> Refused | None:
        """Let a request in (None), or refuse it. An admitted request must `leave`, once."""
        assert request_id not in self._queued and request_id not in self._running, "request ids are ours and unique"
        in_flight = self._num_queued + self._num_running
        over_queue = self._num_queued + weight > self._max_queue
        if over_queue or in_flight + weight > self._max_queue + self._max_running:
            return Refused(retry_after_s=self.retry_after_s(now))
        self._queued[request_id] = weight
        self._num_queued += weight
        return None

    def begun(self, request_id: str) -> bool:
        """A worker has begun with it. Said of one that left: ignored. Returns whether it counts as running now.

        Over max_running it stays queued, so that the sum stays bounded by the queue's size.
        """
        weight = self._queued.get(request_id)
        if weight is None or self._num_running + weight > self._max_running:
            return request_id in self._running
        del self._queued[request_id]
        self._num_queued -= weight
        self._running[request_id] = weight
        self._num_running += weight
        return True

    def leave(self, now: float, request_id: str) -> None:
        """It is over, however it ended."""
        weight = self._queued.pop(request_id, 0)
        self._num_queued -= weight
        if not weight:
            weight = self._running.pop(request_id)
            self._num_running -= weight
        self._left.append((now, weight))

    def retry_after_s(self, now: float) -> float:
        """Seconds in which the present queue should be served, from the last 30 s; within [1, 30]."""
        while self._left and self._left[0][0] < now - RATE_WINDOW_S:
            self._left.popleft()
        if not self._left:
            return MAX_RETRY_S if self._num_queued else MIN_RETRY_S
        elapsed = max(now - self._left[0][0], MIN_RETRY_S)
        rate = sum(weight for _, weight in self._left) / elapsed
        return min(max(self._num_queued / rate, MIN_RETRY_S), MAX_RETRY_S)
