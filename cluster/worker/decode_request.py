"""What the decode worker knows of one dispatched request: plain state, shared by decode.py and pull.py."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from cluster.types import Dispatch, News, Path, SourceFailed, SourceFailure, SourceRef, Stage
from cluster.worker.effects import Effect, SendEntry
from cluster.worker.reservation import Reservation
from cluster.worker.source_call import SourceCall
from engine.messages import Add

TOKEN_BYTES = 4

TimerKind = Literal["deadline", "news", "silence", "space", "retry", "requeue", "copies"]
TimerKey = tuple[str, TimerKind]


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeRequest:
    """One dispatched request at its decode worker. `adds` has one Add per choice; the first one pulls."""

    link_id: str
    dispatch: Dispatch
    deadline: float
    adds: tuple[Add, ...]
    sources: deque[SourceRef]
    num_cached: int = 0  # by the last probe
    call: SourceCall | None = None
    reservation: Reservation | None = None
    space: Literal["none", "queued", "asked"] = "none"
    space_deadline: float | None = None
    space_expired: bool = False
    num_calls: int = 0
    num_hops: int = 0
    source_cached: int = 0  # tokens that the source had without computing
    pulling: bool = True
    running: dict[str, int] = field(default_factory=dict)  # engine id -> choice, of those that have not finished
    path: Path | None = None
    held: tuple[Add, ...] = ()  # choices that wait for the first one's first token
    answered: set[int] = field(default_factory=set)  # choices whose first token went up
    stage: Stage = "queued"
    computed_tokens: int = 0
    queue_ms: int = 0
    closed_at: float | None = None
    num_outputs: int = 0  # of the choice that moved on last, earlier attempts' too
    pausing: bool = False
    paused: dict[str, int] = field(default_factory=dict)  # engine id -> tokens held
    given_away: bool = False  # Moved has left: pinned until Release, the deadline or the link's end
    request_id: str = field(init=False)  # the router's id

    def __post_init__(self) -> None:
        self.request_id = self.dispatch.request_id

    @property
    def tokens(self) -> bytes:
        """What the pulling choice knows: prompt and accepted outputs, int32."""
        return self.adds[0].prompt + self.adds[0].outputs

    @property
    def num_wanted(self) -> int:
        """n - 1: the last known token is always run here."""
        return len(self.tokens) // TOKEN_BYTES - 1

    def news(self) -> News:
        """Where it stands before its first token."""
        return News(
            request_id=self.request_id,
            attempt=self.dispatch.attempt,
            stage=self.stage,
            computed_tokens=self.computed_tokens,
            queue_ms=self.queue_ms,
        )


# what counts against the pair: not that a source is busy, has moved, or cannot take this one prompt
_FAILURES: dict[str, SourceFailure] = {
    "sources_broken": "broken",
    "sources_silent": "silent",
    "sources_refused": "refused",
    "sources_spoiled": "spoiled",
    "source_protocol_errors": "protocol",
}


def source_failure(request: DecodeRequest, reason: str) -> list[Effect]:
    """Tell the router of a source that failed, if it did. `reason` is the counter's name."""
    if request.call is None or reason not in _FAILURES:
        return []
    failed = SourceFailed(
        request_id=request.request_id,
        attempt=request.dispatch.attempt,
        source_id=request.call.source.worker_id,
        source_incarnation=request.call.source.incarnation,
        reason=_FAILURES[reason],
    )
    return [SendEntry(link_id=request.link_id, entry=failed)]
