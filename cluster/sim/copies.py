"""Copies between fake pools: bytes are read from the source's memory or the payload, written late, and checked."""

from __future__ import annotations

import xxhash

from cluster.types import Piece
from engine.fake_engine import ArrayMemory
from engine.kv.block_manager import BlockManager, BlockState
from engine.kv.layout import KVLayout

_WRITABLE = (BlockState.LOADING, BlockState.QUARANTINED)


def tokens_in_block(piece: Piece, index: int, layout: KVLayout) -> int:
    """Valid tokens of a piece's block `index`."""
    block = piece.first_block + index
    return min(layout.block_size, piece.end_tokens - block * layout.block_size)


def payload(memory: ArrayMemory, piece: Piece) -> bytes:
    """What the gRPC connector puts into a piece: the bytes as they are now."""
    parts = [
        memory.partial(block_id, tokens_in_block(piece, index, memory.layout)).tobytes()
        for index, block_id in enumerate(piece.block_ids)
    ]
    return b"".join(parts)


def land(
    memory: ArrayMemory, blocks: BlockManager, piece: Piece, targets: tuple[int, ...], data: bytes, *, corrupt: bool
) -> bool:
    """Write `data` into the target blocks (-1: not wanted) and check it. Returns whether every checksum passed.

    Raises AssertionError when a target belongs to somebody else by now: that is what quarantine is for.
    """
    layout = memory.layout
    offset, ok = 0, True
    for index, target in enumerate(targets):
        num_tokens = tokens_in_block(piece, index, layout)
        part = bytearray(data[offset : offset + num_tokens * layout.token_bytes])
        offset += len(part)
        if target < 0:
            continue
        if corrupt:
            part[len(part) // 2] ^= 0x40
            corrupt = False
        assert blocks.state(target) in _WRITABLE, f"a copy lands in block {target}, which is {blocks.state(target)}"
        view = memory.partial(target, num_tokens)
        view[...] = memoryview(part).cast("B", view.shape)
        ok = ok and xxhash.xxh3_64_intdigest(view.tobytes()) == piece.checksums[index]
    return ok
