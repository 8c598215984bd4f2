"""Copies between fake pools: bytes are read from the source's memory or the payload, written late, and checked.

Fences and checksums are the transports' own (cluster/transfer/connector.py), so that a hole in them shows here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cluster.transfer.connector import BlockCopy, CallFence, TransferError, check_piece, verify
from cluster.types import Piece
from cluster.worker.effects import StartCopy
from engine.fake_engine import ArrayMemory
from engine.kv.block_manager import BlockManager, BlockState
from engine.kv.layout import KVLayout

_WRITABLE = (BlockState.LOADING, BlockState.QUARANTINED)

# what a fault makes of the blocks' bytes; of a shorter part only so much is written
Spoil = Callable[[list[bytes]], list[bytes]]


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
    memory: ArrayMemory,
    blocks: BlockManager,
    effect: StartCopy,
    fence: CallFence,
    source: ArrayMemory | None,
    spoil: Spoil | None,
) -> bool:
    """Write a piece's blocks (from `source`, or from its payload) into the targets and check them.

    Returns whether every fence and checksum passed. Raises AssertionError when a target belongs to somebody else by
    now: that is what quarantine is for.
    """
    piece = effect.piece
    try:
        copies = check_piece(piece, effect.target_block_ids, fence, memory.layout)
    except TransferError:
        return False
    parts = _parts(piece, copies, memory.layout, source)
    if spoil is not None:
        parts = spoil(parts)
    for copy, part in zip(copies, parts, strict=True):
        state = blocks.state(copy.target)
        assert state in _WRITABLE, f"a copy lands in block {copy.target}, which is {state}"
        _write(memory, copy, part)
    try:
        for copy in copies:
            verify(memory, copy, piece)  # type: ignore[arg-type]  # ArrayMemory has the views that it reads
    except TransferError:
        return False
    return True


def _parts(piece: Piece, copies: list[BlockCopy], layout: KVLayout, source: ArrayMemory | None) -> list[bytes]:
    if source is not None:
        return [source.partial(piece.block_ids[copy.index], copy.num_tokens).tobytes() for copy in copies]
    size = layout.block_bytes
    return [
        piece.payload[copy.index * size : copy.index * size + copy.num_tokens * layout.token_bytes] for copy in copies
    ]


def _write(memory: ArrayMemory, copy: BlockCopy, part: bytes) -> None:
    view = memory.partial(copy.target, copy.num_tokens)
    if len(part) == view.size:
        view[...] = np.frombuffer(part, dtype=np.uint8).reshape(view.shape)
        return
    mixed = bytearray(view.tobytes())
    mixed[: len(part)] = part
    view[...] = np.frombuffer(bytes(mixed), dtype=np.uint8).reshape(view.shape)
