"""One call that this worker serves: what was agreed, the pieces that wait for the receiver, and how far it is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.types import FetchOpen, Piece, Transport
from engine.kv.layout import KVLayout
from engine.messages import ServedPiece


@dataclass(slots=True, kw_only=True, eq=False)
class ServedCall:
    """State of one call. Blocks of [0, end) are pinned for it from Serve to EndServe."""

    open: FetchOpen
    num_blocks: int  # pinned at most
    accepted: bool = False
    transport: Transport = "grpc"
    timed: tuple[int, float, int] | None = None  # a piece that left alone: (index, when, bytes)
    waiting: deque[Piece] = field(default_factory=deque)  # ready, not sent: the window is full
    untaken: deque[tuple[int, int]] = field(default_factory=deque)  # (piece index, blocks), sent
    next_index: int = 0
    computed_tokens: int = 0
    queued_tokens: int = 0
    done: bool = False  # the rank offered everything
    offered_all: bool = False  # and we sent everything
    call_id: str = field(init=False)  # the receiver's id of the call

    def __post_init__(self) -> None:
        self.call_id = self.open.call_id

    @property
    def num_untaken_blocks(self) -> int:
        """Blocks on their way to the receiver."""
        return sum(num_blocks for _, num_blocks in self.untaken)

    def cut(
        self, served: ServedPiece, layout: KVLayout, *, incarnation: str, checksum_algorithm: str, max_blocks: int
    ) -> None:
        """Append what the rank offers to `waiting`, in pieces of at most `max_blocks` blocks."""
        for offset in range(0, len(served.block_ids), max_blocks):
            block_ids = served.block_ids[offset : offset + max_blocks]
            first_block = served.first_block + offset
            end_tokens = min(served.end_tokens, (first_block + len(block_ids)) * layout.block_size)
            piece = Piece(
                call_id=self.call_id,
                source_incarnation=incarnation,
                index=self.next_index,
                first_block=first_block,
                end_tokens=end_tokens,
                num_layers=layout.num_layers,
                dtype=layout.dtype,
                shape=layout.shape[1:],
                checksum_algorithm=checksum_algorithm,
                checksums=served.checksums[offset : offset + max_blocks],
                block_ids=block_ids,
            )
            self.next_index += 1
            self.waiting.append(piece)

    def take(self, piece_index: int) -> bool:
        """The receiver has every piece up to this one. Returns whether that is news."""
        before = len(self.untaken)
        while self.untaken and self.untaken[0][0] <= piece_index:
            self.untaken.popleft()
        return len(self.untaken) < before
