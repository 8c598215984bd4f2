"""The map of workers as routers and the controller read it: entries with a time to live, and bad days of its own.

It may forget everything, show what it showed a while ago (a fail-over that lost the last writes), or be away; workers
write their entry again with every heartbeat. Nothing is lost with it: it is no authority.
"""

from __future__ import annotations

from cluster.sim.clock import VirtualClock
from cluster.types import WorkerInfo

TTL_S = 3.0
KEPT_S = 0.1  # how often a state is kept for a later rollback


class SimRegistry:
    """One registry. `frozen_until`: what readers see does not change before (rolled back, or away)."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._entries: dict[str, tuple[float, WorkerInfo]] = {}
        self._shown: dict[str, WorkerInfo] | None = None
        self._shown_until = 0.0
        self._past: list[tuple[float, dict[str, WorkerInfo]]] = []

    def publish(self, info: WorkerInfo) -> None:
        """A worker's own entry. The last writer wins: it is the readers who keep the highest epoch."""
        self._entries[info.worker_id] = (self._clock.now + TTL_S, info)
        if not self._past or self._clock.now >= self._past[-1][0] + KEPT_S:
            self._past.append((self._clock.now, {key: entry for key, (_, entry) in self._entries.items()}))
            del self._past[:-64]

    def read(self) -> dict[str, WorkerInfo]:
        """The map now."""
        now = self._clock.now
        if self._shown is not None and now < self._shown_until:
            return self._shown
        self._shown = None
        return {key: info for key, (until, info) in self._entries.items() if until > now}

    def forget(self, for_s: float) -> None:
        """It is empty for a while."""
        self._show({}, for_s)

    def roll_back(self, by_s: float, for_s: float) -> None:
        """It shows what it showed `by_s` ago, for a while: older epochs, incarnations that are gone."""
        then = self._clock.now - by_s
        older = [shown for at, shown in self._past if at <= then] or [shown for _, shown in self._past[:1]] or [{}]
        self._show(older[-1], for_s)

    def stop(self, for_s: float) -> None:
        """It is away: readers keep what they saw last."""
        self._show(self.read(), for_s)

    def _show(self, shown: dict[str, WorkerInfo], for_s: float) -> None:
        self._shown, self._shown_until = dict(shown), self._clock.now + for_s
