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

    def __init__(self) -> None:
        self._at: dict[Key, tuple[float, int]] = {}
        self._silence_limits: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0
        self._noted = 0.0
        self.num_lags = 0

    def note(self, now: float) -> bool:
        """Say that the observer runs. To be called first at every entry. Returns whether it had lagged."""
        lagged = bool(self._silence_limits) and now - self._noted > OBSERVER_LAG_S
        self._noted = max(now, self._noted)
        if lagged:
            self.num_lags += 1
            for key, limit_s in self._silence_limits.items():
                self._push(key, now + limit_s)
        return lagged

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
        self._at.pop(key, None)
        self._silence_limits.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def next(self) -> float | None:
        """When to call again at the latest (absolute), or None when nothing is set."""
        self._drop_stale()
        first = self._heap[0][0] if self._heap else None
        if self._silence_limits:
            tick = self._noted + TICK_S
            return tick if first is None else min(first, tick)
        return first

    def due(self, now: float) -> list[Key]:
        """Remove and return the keys whose time has come, earliest first. Notes `now` first."""
        self.note(now)
        keys: list[Key] = []
        self._drop_stale()
        while self._heap and self._heap[0][0] <= now:
            key = heapq.heappop(self._heap)[2]
            self.clear(key)
            keys.append(key)
            self._drop_stale()
        return keys

    def _push(self, key: Key, at: float) -> None:
        self._serial += 1
        self._at[key] = (at, self._serial)
        heapq.heappush(self._heap, (at, self._serial, key))
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = [(time, serial, key) for key, (time, serial) in self._at.items()]
            heapq.heapify(self._heap)

    def _drop_stale(self) -> None:
        while self._heap:
            at, serial, key = self._heap[0]
            if self._at.get(key) == (at, serial):
                return
            heapq.heappop(self._heap)
