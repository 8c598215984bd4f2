"""Requests that wait for a worker: lower priority first, then in order of arrival, and nobody for ever.

A request that MAX_OVERTAKEN later ones have passed goes before everything that has not waited so long, whatever the
priorities (the workers' schedulers do the same: engine/scheduler/request_book.py).
"""

from __future__ import annotations

from cluster.router.tracked import Tracked

MAX_OVERTAKEN = 64


class WaitingLine:
    """An ordered set of requests by id. While all priorities are 0 it costs what a dict costs."""

    def __init__(self) -> None:
        self.requests: dict[str, Tracked] = {}  # by id, in order of arrival
        self._has_priorities = False
        self._overtaken: dict[str, int] = {}
        self._ordered: list[Tracked] | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Tracked) -> None:
        """Join the line."""
        self.requests[request.request_id] = request
        self._has_priorities = self._has_priorities or request.submit.priority != 0
        self._ordered = None

    def discard(self, request_id: str) -> None:
        """Leave the line without being served. Unknown ids are ignored."""
        if self.requests.pop(request_id, None) is not None:
            self._overtaken.pop(request_id, None)
            self._ordered = None
            self._has_priorities = self._has_priorities and bool(self.requests)

    def serve(self, request: Tracked) -> None:
        """Leave the line to be placed; those that arrived before and still wait have been overtaken."""
        if self._has_priorities:
            for request_id in self.requests:
                if request_id == request.request_id:
                    break
                self._overtaken[request_id] = self._overtaken.get(request_id, 0) + 1
        self.discard(request.request_id)

    def in_order(self) -> list[Tracked]:
        """Everybody, the next one first. A list of its own."""
        if not self._has_priorities:
            return list(self.requests.values())
        if self._ordered is None:
            self._ordered = sorted(self.requests.values(), key=self._key)  # stable: arrival among equals
        return list(self._ordered)

    def _key(self, request: Tracked) -> tuple[bool, int]:
        return self._overtaken.get(request.request_id, 0) < MAX_OVERTAKEN, request.submit.priority
