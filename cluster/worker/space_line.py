"""The line of requests that want their prompt's blocks: strict order, one Reserve at a time.

Strict, because a small prompt that overtakes a large one would do so for ever under load. Each waits RESERVE_WAIT_S at
most while its source is pinned for it, and SPACE_WAIT_S over all its turns.
"""

from __future__ import annotations

from cluster.timers import Timers
from cluster.worker.decode_request import DecodeRequest, TimerKey, TimerKind
from cluster.worker.effects import Effect, ToEngine
from engine.kv.layout import KVLayout
from engine.messages import Reserve

RESERVE_WAIT_S = 2.0
RESERVE_RETRY_S = 0.02
SPACE_WAIT_S = 8.0
_KINDS: tuple[TimerKind, ...] = ("space", "retry")


class SpaceLine:
    """Requests by arrival; only the head has a Reserve at the rank (`space` is then "asked")."""

    def __init__(self, layout: KVLayout, timers: Timers[TimerKey]) -> None:
        self._layout = layout
        self._timers = timers
        self._line: dict[str, DecodeRequest] = {}
        self._least_free: int | None = None  # since the last NoSpace

    def enter(self, now: float, request: DecodeRequest) -> list[Effect]:
        """Join at the end."""
        request.space, request.space_expired = "queued", False
        if request.space_deadline is None:
            request.space_deadline = now + SPACE_WAIT_S
        self._line[request.request_id] = request
        self._timers.set((request.request_id, "space"), now + RESERVE_WAIT_S)
        return self.ask()

    def refused(self, now: float, request: DecodeRequest) -> None:
        """The rank said NoSpace: ask again soon."""
        request.space = "queued"
        self._least_free = None
        self._timers.set((request.request_id, "retry"), now + RESERVE_RETRY_S)

    def on_free_blocks(self, num_free: int) -> list[Effect]:
        """If blocks have come free since the last NoSpace, the head asks again without waiting for its retry.

        Only then: asking at every step would keep the rank busy.
        """
        before = num_free if self._least_free is None else self._least_free
        if num_free <= before or not self._line:
            self._least_free = num_free if num_free < before else before
            return []
        head = next(iter(self._line.values()))
        if head.space != "queued":
            return []
        if num_free < self._layout.blocks_for(head.num_wanted + 1):
            return []
        self._timers.clear((head.request_id, "retry"))
        return self.ask()

    def ask(self) -> list[Effect]:
        """Send the head's Reserve unless one is under way or was just refused."""
        head = next(iter(self._line.values()), None)
        if head is None or head.space == "asked" or (head.request_id, "retry") in self._timers:
            return []
        head.space = "asked"
        return [ToEngine(command=Reserve(add=head.adds[0]))]

    def leave(self, request: DecodeRequest) -> list[Effect]:
        """Step out, with or without blocks; the next one asks."""
        request.space = "none"
        for kind in _KINDS:
            self._timers.clear((request.request_id, kind))
        return self.ask() if self._line.pop(request.request_id, None) is not None else []
