"""Virtual time: a heap of callbacks, run in order of time and, at equal times, of their making."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class VirtualClock:
    """Seconds from 0. Nothing passes but by `step` and `run_until`.

    After `most_steps` callbacks (negative: any number) RuntimeError is raised: the simulation never rests.
    """

    def __init__(self, most_steps: int = -1) -> None:
        self.now = 0.0
        self.most_steps = most_steps
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = count()

    def at(self, when: float, run: Callable[[], None]) -> None:
        """Run something at a time, or at once if that has passed (after what is due already)."""
        heappush(self._heap, (when if when > self.now else self.now, next(self._serials), run))

    def after(self, delay_s: float, run: Callable[[], None]) -> None:
        """Run something after a delay."""
        self.at(self.now + delay_s, run)

    def step(self, until: float = float("inf")) -> bool:
        """Run the next callback if it is due by `until`. Returns whether there was one."""
        heap = self._heap
        if not heap or heap[0][0] > until:
            return False
        if self.most_steps == 0:
            raise RuntimeError("the simulation never rests")
        self.most_steps -= 1
        self.now, _, run = heappop(heap)
        run()
        return True

    def run_until(self, when: float) -> None:
        """Run everything that is due by `when`, and stop there."""
        step = self.step
        while step(when):
            pass
        self.now = max(self.now, when)
