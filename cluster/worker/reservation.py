"""Blocks of our own that copies fill.

    blocks of the request   | held (READY)      | landing: copies started, in order | not started yet | last token |
                            0                held_tokens                                          num_tokens = n - 1

Copies may end in any order; blocks are committed in order, so what is held is always a prefix. A copy that was started
owns its target blocks until it reports, whatever happened to the request meanwhile (quarantine, ARCHITECTURE 1.2).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.types import Piece
from cluster.worker.effects import Effect, StartCopy, ToEngine
from engine.kv.layout import KVLayout
from engine.messages import Commit


@dataclass(slots=True, kw_only=True)
class _Landing:
    """A piece on its way into our blocks. `first` is the first block that we take of it."""

    piece: Piece
    first: int
    num_blocks: int
    num_tokens: int  # held, once this one is committed
    landed: bool


class Reservation:
    """A request's reserved blocks and the copies that fill them. `num_tokens` is n - 1: what a source can give."""

    def __init__(
        self, *, engine_id: str, num_tokens: int, block_ids: tuple[int, ...], num_cached: int, layout: KVLayout
    ) -> None:
        self.engine_id = engine_id
        self.num_tokens = num_tokens
        self.block_ids = block_ids
        self.num_cached = num_cached
        self.held_tokens = num_cached
        self._layout = layout
        self._order: deque[_Landing] = deque()
        self._in_flight: dict[int, _Landing] = {}

    @property
    def idle(self) -> bool:
        """No copy can write any more."""
        return not self._in_flight

    @property
    def complete(self) -> bool:
        """Everything that a source can give is held."""
        return self.held_tokens >= self.num_tokens

    @property
    def num_landing(self) -> int:
        """Pieces that were started and are not committed yet."""
        return len(self._order)

    @property
    def num_pulled(self) -> int:
        """Tokens that came from sources."""
        return self.held_tokens - self.num_cached

    def start(self, copy_id: int, piece: Piece) -> list[Effect]:
        """Start the copy of a piece's blocks that we do not hold. No effect when it has none of them."""
        size = self._layout.block_size
        complete = piece.end_tokens >= self.num_tokens
        end = piece.end_tokens if complete else piece.end_tokens // size * size  # a partial block only at the very end
        covered = self._order[-1].num_tokens if self._order else self.held_tokens
        first = max(piece.first_block, self._layout.blocks_for(covered))
        end_block = self._layout.blocks_for(end)
        targets = tuple(
            self.block_ids[block] if first <= block < end_block else -1
            for block in range(piece.first_block, piece.first_block + len(piece.checksums))
        )
        num_blocks = max(0, end_block - first)
        landing = _Landing(
            piece=piece, first=first, num_blocks=num_blocks, num_tokens=max(covered, end), landed=num_blocks == 0
        )
        self._order.append(landing)
        if landing.landed:
            return []
        self._in_flight[copy_id] = landing
        return [StartCopy(copy_id=copy_id, piece=piece, target_block_ids=targets)]

    def report(self, copy_id: int, ok: bool) -> bool:
        """A copy ended. Returns False if it failed and was still wanted: what lies after it is of no use then."""
        landing = self._in_flight.pop(copy_id)
        if not any(landing is wanted for wanted in self._order):
            return True
        landing.landed = ok
        if ok:
            return True
        while self._order.pop() is not landing:
            pass
        return False

    def commit(self) -> tuple[list[Effect], int]:
        """Commit the pieces that landed, in order. Returns the effects and the last such piece's index, or -1."""
        effects: list[Effect] = []
        last = -1
        while self._order and self._order[0].landed:
            landing = self._order.popleft()
            last = landing.piece.index
            self.held_tokens = landing.num_tokens
            # a partial last block is never committed: the rank completes it with the last token
            num_whole = (
                min(landing.first + landing.num_blocks, self.num_tokens // self._layout.block_size) - landing.first
            )
            if num_whole > 0:
                offset = landing.first - landing.piece.first_block
                checksums = landing.piece.checksums[offset : offset + num_whole]
                commit = Commit(request_id=self.engine_id, first_block=landing.first, checksums=checksums)
                effects.append(ToEngine(command=commit))
        return effects, last
