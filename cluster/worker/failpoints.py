"""Named points at which a worker's network process kills or stops itself, for tests of faults in the middle of things.

Armed only by WorkerSpec.failpoint, which no option, environment variable or message reaches; without it the shell does
not come here. A point is a place in the stream of effects, so the state machines know nothing of it.

    queued           a Fetch was sent out, or a served call handed to the rank
    mid_chunk        a served call was accepted, and the rank computes its first chunk
    between_pieces   a piece is about to be sent: the ones before it are out, the rank computes the next chunk
    before_commit    pulled blocks have landed and passed their checksums, the rank has not heard of it
    after_commit     the rank was told
    draining, switching, verifying, ready    this state was just published
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from cluster.types import FetchAccepted, Piece
from cluster.worker.effects import Effect, OpenFetch, Publish, SendFetch, ToEngine
from engine.messages import Commit, Serve

Point = Literal[
    "queued",
    "mid_chunk",
    "between_pieces",
    "before_commit",
    "after_commit",
    "starting",
    "draining",
    "switching",
    "verifying",
    "ready",
    "failed",
]
MID_CHUNK_S = 0.03  # lets the acceptance leave; chunks of tests take longer
_CANARY = "c:"


class Failpoint:
    """`text` is NAME:N:SIGNAL, e.g. "between_pieces:2:SIGSTOP": the N-th time, counted from 1. Raises ValueError."""

    def __init__(self, text: str) -> None:
        name, _, rest = text.partition(":")
        nth, _, number = rest.partition(":")
        if name not in get_args(Point) or not nth.isdecimal() or not hasattr(signal.Signals, number):
            raise ValueError(f"a failpoint is NAME:N:SIGNAL with a name of {', '.join(get_args(Point))}, got {text!r}")
        self._name = name
        self._num_left = int(nth)
        self._signal = signal.Signals[number]

    def watch(self, effects: Iterable[Effect]) -> Iterator[Effect]:
        """The same effects; what the consumer does with one happens between its two points."""
        for effect in effects:
            self._reach(point_before(effect))
            yield effect
            self._reach(point_after(effect))

    def _reach(self, point: Point | None) -> None:
        if point != self._name:
            return
        self._num_left -= 1
        if self._num_left == 0:
            if point == "mid_chunk":
                asyncio.get_running_loop().call_later(MID_CHUNK_S, self._strike)
            else:
                self._strike()

    def _strike(self) -> None:
        os.kill(os.getpid(), self._signal)


def point_before(effect: Effect) -> Point | None:
    """The point that is reached when this effect is about to be performed."""
    match effect:
        case SendFetch(reply=Piece()):
            return "between_pieces"
        case ToEngine(command=Commit()):
            return "before_commit"
    return None


def point_after(effect: Effect) -> Point | None:
    """The point that is reached when this effect has been performed. A worker's own canaries are no calls."""
    match effect:
        case OpenFetch():
            return "queued"
        case ToEngine(command=Serve(call_id=call_id)) if not call_id.startswith(_CANARY):
            return "queued"
        case SendFetch(reply=FetchAccepted(cached_tokens=cached, end_tokens=end)) if cached < end:
            return "mid_chunk"
        case ToEngine(command=Commit()):
            return "after_commit"
        case Publish(info=info):
            return info.state
    return None
