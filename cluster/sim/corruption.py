"""The nine kinds of KV corruption (reliability.md section 4), and a few more, on pieces and copies; all must be found.

    bytes, while the copy runs      flip  zero  truncate  swap  stale  wrong layers  partial write  wrong block
    the piece's own words           replay (another call's)  stale epoch (another incarnation's)  wrong dtype
                                    wrong layer range

A flip at rest at the source is a flip to the receiver: the bytes that it reads are not those that were committed.
A spoiled copy must fail; a spoiled piece must not be copied at all. A copy that fails without one, while both ends
still have the call, is a false alarm.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from msgspec.structs import replace

from cluster.sim.cluster import SimCluster
from cluster.sim.copies import Spoil
from cluster.types import Piece
from cluster.worker.effects import StartCopy
from engine.fake_engine import ArrayMemory

BYTE_KINDS = ("flip", "zero", "truncate", "swap", "stale", "wrong layers", "partial write", "wrong block")
WORD_KINDS = ("replay", "stale epoch", "wrong dtype", "wrong layer range")
KINDS = (*BYTE_KINDS, *WORD_KINDS)


@dataclass(kw_only=True)
class CorruptionCounts:
    """What was injected and found, by (kind, transport); and what healthy copies did."""

    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_healthy: int = 0


def _could_be(older: Piece, piece: Piece) -> bool:
    """Whether a piece of another call differs from this one by its fences and content only."""
    same = (older.index, older.first_block, older.end_tokens) == (piece.index, piece.first_block, piece.end_tokens)
    return same and older.call_id != piece.call_id and older.checksums != piece.checksums


class Corruptor:
    """Spoils what it is told to, through the hooks of SimCluster.faults."""

    def __init__(self, rng: Random, report: Callable[[str], None] = print) -> None:
        self.counts = CorruptionCounts()
        self._rng = rng
        self.report = report
        self.spoiled_requests: set[str] = set()  # whose pieces were given other words
        self._armed: list[str] = []
        self._spoiled: dict[tuple[str, int], tuple[str, list[bytes]]] = {}  # of one call's piece: kind, what was meant
        self._spoiled_words: dict[int, tuple[str, str, Piece]] = {}
        self._last: dict[str, bytes] = {}  # worker -> bytes of a block that it copied before
        self._pieces: dict[str, deque[Piece]] = {}  # worker -> what it was offered before

    def watch(self, sim: SimCluster) -> None:
        """Set the hooks."""
        self._sim = sim
        sim.faults.spoil = self._spoil
        sim.faults.piece = self._piece
        sim.faults.copy_ended = self._ended

    def arm(self, kind: str) -> None:
        """Do this to the next piece or copy that it fits."""
        self._armed.append(kind)

    @property
    def num_armed(self) -> int:
        """Orders that found nothing to spoil yet."""
        return len(self._armed)

    def found_all(self) -> None:
        """At the end: spoiled pieces that were never copied were turned away."""
        for kind, transport, _ in self._spoiled_words.values():
            self.counts.found[kind, transport] += 1

    # ---- words

    def _piece(self, worker_id: str, piece: Piece) -> Piece:
        kind = next((kind for kind in self._armed if kind in WORD_KINDS), None)
        seen = self._pieces.setdefault(worker_id, deque(maxlen=16))
        before = tuple(seen)
        seen.append(piece)
        if kind is None:
            return piece
        if kind == "replay":
            older = next((one for one in before if _could_be(one, piece)), None)
            if older is None:
                return piece
            spoiled = replace(older)
        elif kind == "stale epoch":
            spoiled = replace(piece, source_incarnation=f"{self._rng.getrandbits(128):032x}")
        elif kind == "wrong dtype":
            spoiled = replace(piece, dtype="float32")
        else:
            spoiled = replace(piece, first_layer=1, num_layers=piece.num_layers - 1)
        self._armed.remove(kind)
        self.spoiled_requests.add(piece.call_id.split(":", 2)[1])
        transport = "grpc" if piece.payload else "local"
        self.counts.injected[kind, transport] += 1
        self._spoiled_words[id(spoiled)] = (kind, transport, spoiled)
        return spoiled

    # ---- bytes

    def _spoil(self, worker_id: str, piece: Piece, source: ArrayMemory | None) -> Spoil | None:
        kind = next((kind for kind in self._armed if kind in BYTE_KINDS), None)
        if kind is None:
            return None if id(piece) in self._spoiled_words else lambda parts: self._note(worker_id, parts)

        def spoil(parts: list[bytes]) -> list[bytes]:
            spoiled = self._spoil_bytes(kind, worker_id, parts)
            self._note(worker_id, parts)
            if spoiled == parts:
                return parts  # it does not fit: the order stands
            self._armed.remove(kind)
            self._spoiled[piece.call_id, piece.index] = (kind, parts)
            return spoiled

        return spoil

    def _note(self, worker_id: str, parts: list[bytes]) -> list[bytes]:
        if parts:
            self._last[worker_id] = parts[0]
        return parts

    def _spoil_bytes(self, kind: str, worker_id: str, parts: list[bytes]) -> list[bytes]:
        if not parts:
            return parts
        victim = self._rng.randrange(len(parts))
        data = parts[victim]
        other = self._last.get(worker_id, data)
        if kind in ("flip"):
            flipped = bytearray(data)
            flipped[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            data = bytes(flipped)
        elif kind == "zero":
            data = bytes(len(data))
        elif kind == "truncate":
            data = data[: self._rng.randrange(len(data))]
        elif kind == "partial write":
            return [*parts[:victim], *(b"" for _ in parts[victim:])]
        elif kind == "swap":
            if len(parts) < 2:
                return parts
            two = (victim + 1) % len(parts)
            swapped = list(parts)
            swapped[victim], swapped[two] = parts[two][: len(data)], data[: len(parts[two])]
            return swapped
        elif kind in ("stale", "wrong block"):
            data = other[: len(data)]
        elif kind == "wrong layers":
            half = len(data) // 2
            data = data[half:] + data[:half]
        return [*parts[:victim], data, *parts[victim + 1 :]]

    # ---- what became of it

    def _ended(self, incarnation: str, effect: StartCopy, ok: bool) -> None:
        piece = effect.piece
        transport = "grpc" if piece.payload else "local"
        if id(piece) in self._spoiled_words:
            kind = self._spoiled_words[id(piece)][0]
            if ok:
                self.report(f"corruption {kind!r} of piece {piece.index} of {piece.call_id} was not found")
                del self._spoiled_words[id(piece)]
            return
        spoiled = self._spoiled.pop((piece.call_id, piece.index), None)
        if spoiled is None:
            self.counts.num_healthy += ok
            if not ok and self._call_stands(incarnation, piece):
                self.report(
                    f"false alarm: piece {piece.index} of {piece.call_id} failed, and nothing was wrong with it"
                )
            return
        kind, meant = spoiled
        if ok and self._lies_there(incarnation, effect, meant):
            return  # what lay there was the same already: nothing was spoiled
        self.counts.injected[kind, transport] += 1
        if ok:
            self.report(f"corruption {kind!r} of piece {piece.index} of {piece.call_id} was not found")
        else:
            self.counts.found[kind, transport] += 1

    def _call_stands(self, incarnation: str, piece: Piece) -> bool:
        receiver, source = self._sim.worker_at(incarnation), self._sim.worker_at(piece.source_incarnation)
        if receiver is None or source is None or not source.process.alive:
            return False
        return receiver.has_call(piece.call_id) and source.serves(piece.call_id)

    def _lies_there(self, incarnation: str, effect: StartCopy, meant: list[bytes]) -> bool:
        worker = self._sim.worker_at(incarnation)
        assert worker is not None
        targets = [target for target in effect.target_block_ids if target >= 0]
        token_bytes = worker.memory.layout.token_bytes
        return all(
            np.array_equal(
                worker.memory.partial(target, len(part) // token_bytes).reshape(-1), np.frombuffer(part, dtype=np.uint8)
            )
            for target, part in zip(targets, meant, strict=True)
        )
