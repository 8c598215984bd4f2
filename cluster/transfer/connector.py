"""The seam of the transports, and the checks that every copy passes whatever its transport.

    source:    blocks -> (checksummed at commit) -> Piece without payload -> SourceConnector.pack -> Piece on the wire
    receiver:  Piece -> check_piece -> ReceiverConnector.copy -> target blocks -> checksums of what lies there

A receiver writes only into the target blocks that it was given, which belong to the copy until it returns. Copies run
in threads: everything here is free of shared state but the memories themselves. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np
import xxhash

from cluster.types import FetchAccepted, Piece
from engine.kv.layout import NULL_BLOCK, KVLayout
from engine.kv.memory import ByteArray, KVMemory

Checksum = Callable[[ByteArray], int]


class TransferError(ValueError):
    """A piece that cannot be copied: a fence, its shape, its algorithm, or its bytes."""


class SourceUnreachableError(TransferError):
    """The source's memory cannot be opened here: it is another host's."""


class SourceConnector(Protocol):
    """The source's half. May be called in a thread."""

    def pack(self, piece: Piece) -> Piece:
        """The piece as it goes on the wire; its blocks are pinned meanwhile."""
        ...


class ReceiverConnector(Protocol):
    """The receiver's half, for one call."""

    def copy(self, piece: Piece, targets: tuple[int, ...]) -> None:
        """Copy block i of the piece into block targets[i] (-1: not wanted) and verify it there. Blocks its thread.

        Raises TransferError; target blocks hold anything then.
        """
        ...

    def close(self) -> None:
        """Drop what the call needed. No copy runs any more."""
        ...


class CallFence(msgspec.Struct, frozen=True, kw_only=True):
    """What every piece of one call must carry."""

    call_id: str
    source_incarnation: str


class BlockCopy(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a piece: entry `index` of it goes to block `target`, its first `num_tokens` tokens."""

    index: int
    target: int
    num_tokens: int


def _xxh3_64(data: ByteArray) -> int:
    return xxhash.xxh3_64_intdigest(data.data)


CHECKSUMS: dict[str, Checksum] = {"xxh3_64": _xxh3_64}


def check_piece(piece: Piece, targets: tuple[int, ...], fence: CallFence, layout: KVLayout) -> list[BlockCopy]:
    """The copies that a piece asks for. Raises TransferError for anything that is not as agreed."""
    if (piece.call_id, piece.source_incarnation) != (fence.call_id, fence.source_incarnation):
        raise TransferError("a piece of another call or incarnation")
    if piece.dtype != layout.dtype or piece.shape != layout.shape[1:]:
        raise TransferError(f"a piece of {piece.dtype} {piece.shape}, here are {layout.dtype} {layout.shape[1:]}")
    if (piece.first_layer, piece.num_layers) != (0, layout.num_layers):
        raise TransferError(f"layers {piece.first_layer}+{piece.num_layers} of {layout.num_layers}")
    if piece.checksum_algorithm not in CHECKSUMS:
        raise TransferError(f"unknown checksum algorithm {piece.checksum_algorithm!r}")
    num_blocks = layout.blocks_for(piece.end_tokens) - piece.first_block
    if num_blocks < 1 or len(piece.checksums) != num_blocks or len(targets) != num_blocks:
        raise TransferError(f"{num_blocks} blocks, {len(piece.checksums)} checksums, {len(targets)} targets")
    if any(target == NULL_BLOCK or target >= layout.num_blocks for target in targets):
        raise TransferError("a target block that does not exist")
    return list(_block_copies(piece, targets, layout))


def _block_copies(piece: Piece, targets: tuple[int, ...], layout: KVLayout) -> Iterator[BlockCopy]:
    for index, target in enumerate(targets):
        first_token = (piece.first_block + index) * layout.block_size
        num_tokens = min(layout.block_size, piece.end_tokens - first_token)
        if target >= 0:
            yield BlockCopy(index=index, target=target, num_tokens=num_tokens)


def block_view(memory: KVMemory, block_id: int, num_tokens: int) -> ByteArray:
    """The bytes of a block's first tokens: flat for a whole block, strided for a partial one."""
    if num_tokens == memory.layout.block_size:
        return memory.block(block_id)
    return memory.partial(block_id, num_tokens)


def verify(memory: KVMemory, copy: BlockCopy, piece: Piece) -> None:
    """Checksum a copied block where it lies now. Raises TransferError if it is not what the source committed."""
    data = np.ascontiguousarray(block_view(memory, copy.target, copy.num_tokens))
    if CHECKSUMS[piece.checksum_algorithm](data) != piece.checksums[copy.index]:
        raise TransferError(f"block {piece.first_block + copy.index} did not arrive as it was committed")


class Connector(Protocol):
    """One transport, as a worker's shell uses it."""

    def source(self) -> SourceConnector:
        """The half that serves."""
        ...

    def receiver(self, accepted: FetchAccepted, fence: CallFence) -> ReceiverConnector:
        """The half that receives one call. Raises SourceUnreachableError."""
        ...

    def sweep(self) -> None:
        """Let go of what no call has used for long."""
        ...

    def close(self) -> None:
        """Let go of everything. No call is open any more."""
        ...
