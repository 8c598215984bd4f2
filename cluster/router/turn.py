"""Things to do once in the present turn of the event loop, for many streams in one callback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger("neap.router")


class Turn:
    """A step of a worker concerns hundreds of streams: one callback of the loop for all of them, not one for each."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def add(self, work: Callable[[], None]) -> None:
        """Call `work` before the loop waits again. What it raises is logged and is nobody else's trouble."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due.append(work)

    def _run(self) -> None:
        due, self._due = self._due, []
        for work in due:
            try:
                work()
            except Exception:
                log.exception("work of one stream failed")
