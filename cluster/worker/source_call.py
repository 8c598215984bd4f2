"""A Fetch call as the receiver sees it: what was agreed, and the fences that every piece must pass."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.types import FetchAccepted, Piece, SourceRef
from engine.kv.layout import KVLayout


@dataclass(slots=True, kw_only=True)
class SourceCall:
    """A call that we made: tokens [start, end), start a multiple of the block size, end = n - 1 of the request."""

    call_id: str
    source: SourceRef
    start: int
    end: int
    accepted: FetchAccepted | None = None
    started: bool = False  # the source computes or sends: time to reserve
    offered_all: bool = False
    next_index: int = 0
    next_block: int = 0
    buffered: deque[Piece] = field(default_factory=deque)  # arrived, copy not started

    def accept(self, reply: FetchAccepted) -> str:
        """Take the first reply. Returns "" or why the source is of no use."""
        if self.accepted is not None:
            return "accepted twice"
        if not self.start < reply.end_tokens <= self.end:
            return f"offers up to token {reply.end_tokens} of {self.start}..{self.end}"
        if reply.transport == "local" and reply.local is None:
            return "local transport without a memory"
        self.accepted = reply
        self.started = reply.queue_ms == 0
        return ""

    def take_piece(self, piece: Piece, layout: KVLayout, checksum_algorithm: str | None) -> str:
        """Check a piece's fences and buffer it. Returns "" or what is wrong (then the source is not trusted)."""
        if self.accepted is None or self.offered_all:
            return "a piece outside the call's life"
        if piece.call_id != self.call_id or piece.source_incarnation != self.source.incarnation:
            return "a piece of another call or incarnation"
        if piece.index != self.next_index or piece.first_block != self.next_block:
            return f"piece {piece.index} at block {piece.first_block}, expected {self.next_index} at {self.next_block}"
        num_blocks = len(piece.checksums)
        num_tokens = piece.end_tokens - piece.first_block * layout.block_size
        if num_tokens <= 0 or num_blocks != layout.blocks_for(num_tokens):
            return f"a piece of {num_blocks} blocks that ends at token {piece.end_tokens}"
        if piece.end_tokens > self.accepted.end_tokens:
            return f"a piece that ends at token {piece.end_tokens}, past {self.accepted.end_tokens}"
        if piece.end_tokens % layout.block_size and piece.end_tokens != self.accepted.end_tokens:
            return "a partial block that is not the last"
        if (
            piece.shape != layout.shape[1:]
            or piece.dtype != layout.dtype
            or (piece.first_layer, piece.num_layers) != (0, layout.num_layers)
        ):
            return f"a piece of shape {piece.shape} {piece.dtype}"
        if not piece.checksum_algorithm or checksum_algorithm not in (None, piece.checksum_algorithm):
            return f"checksum algorithm {piece.checksum_algorithm!r}"
        if self.accepted.transport == "local" and len(piece.block_ids) != num_blocks:
            return "a local piece without block ids"
        self.next_index += 1
        self.next_block += num_blocks
        self.started = True
        self.buffered.append(piece)
        return ""
