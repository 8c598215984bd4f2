"""A process that can be stopped (SIGSTOP), go on, and die. What arrives while it is stopped waits for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.sim.clock import VirtualClock


class SimProcess:
    """Runs callbacks in its own name. A new incarnation is a new object, so late callbacks of a dead one do nothing."""

    def __init__(self, clock: VirtualClock, name: str) -> None:
        self.clock = clock
        self.name = name
        self.alive = True
        self.frozen = False
        self._timers: list[Callable[[], None]] = []
        self._inbox: list[Callable[[], None]] = []

    def post(self, run: Callable[..., None], *arguments: Any) -> None:
        """Something arrived: handle it now, or after the process goes on."""
        if self.frozen:
            self._inbox.append(partial(run, *arguments))
        elif self.alive:
            run(*arguments)

    def at(self, when: float, run: Callable[..., None], *arguments: Any) -> None:
        """Set a timer; one that passes while the process is stopped fires when it goes on, before what arrived."""
        self.clock.at(when, self._timer, run, *arguments)

    def _timer(self, run: Callable[..., None], *arguments: Any) -> None:
        if self.frozen:
            self._timers.append(partial(run, *arguments))
        elif self.alive:
            run(*arguments)

    def freeze(self) -> None:
        """Stop it."""
        self.frozen = True

    def thaw(self) -> None:
        """Let it go on: timers first, the hard case for one who watches others."""
        self.frozen = False
        waiting = self._timers + self._inbox
        self._timers, self._inbox = [], []
        for run in waiting:
            self.post(run)

    def kill(self) -> None:
        """End it."""
        self.alive = self.frozen = False
        self._timers, self._inbox = [], []
