"""Named deadlines for the state machines, and the rule that an observer who slept condemns nobody.

A *deadline* passes when its time comes. A *silence timer* passes when nothing was heard for its limit, unless the
observer itself did not run: while silence timers exist `next()` asks for a wake-up every TICK_S, so a gap of more than
OBSERVER_LAG_S between two calls of `note` can only be our own loop's lag. Then every silence timer starts anew
(ARCHITECTURE section 2). Deadlines are promises to a client and are never reset.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

from cluster.types import OBSERVER_LAG_S

TICK_S = 0.25
Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    """Deadlines by key; one key has at most one. Every time is an absolute monotonic second."""

    __slots__ = ("_at", "_heap", "_noted", "_serial", "_silence_limits", "num_lags")

    def __init__(self) -> None:
        self._at: dict[Key, tuple[float, int, Key]] = {}  # the heap has this entry of a key, or an earlier one
        self._silence_limits: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0
        self._noted = 0.0
        self.num_lags = 0

    def note(self, now: float) -> bool:
        """Say that the observer runs. To be called first at every entry. Returns whether it had lagged."""
        gap_s = now - self._noted
        if gap_s > 0.0:
            self._noted = now
        if gap_s <= OBSERVER_LAG_S or not self._silence_limits:
            return False
        self.num_lags += 1
        for key, limit_s in self._silence_limits.items():
            self._push(key, now + limit_s)
        return True

    def set(self, key: Key, at: float) -> None:
        """Set or move a deadline."""
        self._silence_limits.pop(key, None)
        self._push(key, at)

    def watch(self, key: Key, now: float, limit_s: float) -> None:
        """Start a silence timer, or say that its peer was heard at `now`."""
        if not self._silence_limits:
            self._noted = max(now, self._noted)
        self._silence_limits[key] = limit_s
        self._push(key, now + limit_s)

    def clear(self, key: Key) -> None:
        """Forget a deadline or silence timer; unknown keys are fine."""
        if self._at.pop(key, None) is not None:
            self._silence_limits.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def next(self) -> float | None:
        """When to call again at the latest (absolute), or None when nothing is set."""
        heap = self._heap
        tick = self._noted + TICK_S if self._silence_limits else None
        while heap and (tick is None or heap[0][0] < tick):
            if self._at.get(heap[0][2]) == heap[0]:
                return heap[0][0]
            self._put_right()
        return tick

    def due(self, now: float) -> list[Key]:
        """Remove and return the keys whose time has come, earliest first. Notes `now` first."""
        self.note(now)
        keys: list[Key] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            key = heap[0][2]
            if self._at.get(key) == heap[0]:
                self.clear(key)
                keys.append(key)
            self._put_right()
        return keys

    def _push(self, key: Key, at: float) -> None:
        """Most timers are put off again and again: what is only put off stays where it is until its old time comes."""
        self._serial += 1
        entry, before = (at, self._serial, key), self._at.get(key)
        self._at[key] = entry
        if before is not None and at >= before[0]:
            return
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = list(self._at.values())
            heapq.heapify(self._heap)

    def _put_right(self) -> None:
        """Take the first entry off, or to its key's present time if that was put off."""
        first = self._heap[0]
        entry = self._at.get(first[2])
        if entry is not None and entry > first:
            heapq.heapreplace(self._heap, entry)
        else:
            heapq.heappop(self._heap)
