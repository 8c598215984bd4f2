"""Virtual time: a heap of callbacks, run in order of time and, at equal times, of their making."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class VirtualClock:
    """Seconds from 0. Nothing passes but by `run_while` and `run_until`.

    After `most_steps` callbacks (negative: any number) RuntimeError is raised: the simulation never rests.
    """

    def __init__(self, most_steps: int = -1) -> None:
        self.now = 0.0
        self.most_steps = most_steps
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serials = count()

    def at(self, when: float, run: Callable[..., None], *arguments: Any) -> None:
        """Run something at a time, or at once if that has passed (after what is due already)."""
        heappush(self._heap, (when if when > self.now else self.now, next(self._serials), run, arguments))

    def after(self, delay_s: float, run: Callable[..., None], *arguments: Any) -> None:
        """Run something after a delay."""
        self.at(self.now + delay_s, run, *arguments)

    def run_while(self, condition: Callable[[], bool] | None, until: float) -> bool:
        """Run what is due by `until`, callback by callback, while `condition` holds. Returns whether it ended."""
        heap = self._heap
        while condition is None or condition():
            if not heap or heap[0][0] > until:
                return False
            if self.most_steps == 0:
                raise RuntimeError("the simulation never rests")
            self.most_steps -= 1
            self.now, _, run, arguments = heappop(heap)
            run(*arguments)
        return True

    def run_until(self, when: float) -> None:
        """Run everything that is due by `when`, and stop there."""
        self.run_while(None, when)
        self.now = max(self.now, when)
