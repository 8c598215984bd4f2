"""Virtual time: a heap of callbacks, run in order of time and, at equal times, of their making."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class Timer:
    """A callback that may be cancelled."""

    run: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Do not run it."""
        self.cancelled = True


class VirtualClock:
    """Seconds from 0. Nothing passes but by `step` and `run_until`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._serial = 0

    def at(self, when: float, run: Callable[[], None]) -> Timer:
        """Run something at a time, or at once if that has passed (after what is due already)."""
        self._serial += 1
        timer = Timer(run)
        heapq.heappush(self._heap, (max(when, self.now), self._serial, timer))
        return timer

    def after(self, delay_s: float, run: Callable[[], None]) -> Timer:
        """Run something after a delay."""
        return self.at(self.now + delay_s, run)

    def step(self, until: float = float("inf")) -> bool:
        """Run the next callback if it is due by `until`. Returns whether there was one."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        if not self._heap or self._heap[0][0] > until:
            return False
        self.now, _, timer = heapq.heappop(self._heap)
        timer.run()
        return True

    def run_until(self, when: float) -> None:
        """Run everything that is due by `when`, and stop there."""
        while self.step(when):
            pass
        self.now = max(self.now, when)
