"""What goes wrong in a simulated cluster, as hooks that tests set. The defaults do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.types import FetchOpen, FetchReply, Piece


@dataclass(kw_only=True)
class Faults:
    """Hooks, asked each time. Worker ids are the receiver's for copies and the source's for calls.

    `copy_s(worker, piece)`: how long a copy takes instead of the usual; `corrupt(worker, piece)`: whether a byte flips
    on the way; `answer(worker, call)`: a reply with which the source turns the call away.
    """

    copy_s: Callable[[str, Piece], float | None] = lambda worker_id, piece: None
    corrupt: Callable[[str, Piece], bool] = lambda worker_id, piece: False
    answer: Callable[[str, FetchOpen], FetchReply | None] = lambda worker_id, call: None
