"""What goes wrong in a simulated cluster, as hooks that tests set. The defaults do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.sim.copies import Spoil
from cluster.types import FetchOpen, FetchReply, Piece
from cluster.worker.effects import StartCopy
from engine.fake_engine import ArrayMemory


def flip_a_bit(parts: list[bytes]) -> list[bytes]:
    """One bit of the first block."""
    first = bytearray(parts[0])
    first[len(first) // 2] ^= 0x40
    return [bytes(first), *parts[1:]]


@dataclass(kw_only=True)
class Faults:
    """Hooks, asked each time. Worker ids are the receiver's for copies and the source's for calls.

    `copy_s(worker, piece)`: how long a copy takes instead of the usual; `corrupt(worker, piece)`: whether a byte flips
    on the way; `spoil(worker, piece, source)`: what else happens to the bytes (source: its memory if they are read in
    place); `piece(worker, piece)`: the message as it arrives; `answer(worker, call)`: a reply with which the source
    turns the call away; `copy_started` and `copy_ended(incarnation, effect, ok)`: somebody counts.
    """

    copy_s: Callable[[str, Piece], float | None] = lambda worker_id, piece: None
    corrupt: Callable[[str, Piece], bool] = lambda worker_id, piece: False
    spoil: Callable[[str, Piece, ArrayMemory | None], Spoil | None] = lambda worker_id, piece, source: None
    piece: Callable[[str, Piece], Piece] = lambda worker_id, piece: piece
    answer: Callable[[str, FetchOpen], FetchReply | None] = lambda worker_id, call: None
    copy_started: Callable[[str, StartCopy], None] = lambda incarnation, effect: None
    copy_ended: Callable[[str, StartCopy, bool], None] = lambda incarnation, effect, ok: None

    def spoil_of(self, worker_id: str, piece: Piece, source: ArrayMemory | None) -> Spoil | None:
        """What happens to the bytes of this copy."""
        return flip_a_bit if self.corrupt(worker_id, piece) else self.spoil(worker_id, piece, source)
