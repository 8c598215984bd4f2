"""Any host: the source puts the bytes into the pieces; gRPC's flow control and the machine's window bound what travels.

payload:  | block 0, whole | block 1, whole | ... | last block: its valid tokens, C order of [L, 2, H, t, D] |
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from cluster.transfer.connector import CallFence, TransferError, block_view, check_piece, verify
from cluster.types import FetchAccepted, Piece
from engine.kv.layout import KVLayout
from engine.kv.memory import KVMemory


class GrpcSource:
    """SourceConnector that packs payloads out of `memory`."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory

    def pack(self, piece: Piece) -> Piece:
        """See SourceConnector. The block ids mean nothing to the receiver and stay here."""
        layout = self._memory.layout
        parts = []
        for index, block_id in enumerate(piece.block_ids):
            num_tokens = min(layout.block_size, piece.end_tokens - (piece.first_block + index) * layout.block_size)
            parts.append(np.ascontiguousarray(block_view(self._memory, block_id, num_tokens)).data)
        return replace(piece, payload=b"".join(parts), block_ids=())


class GrpcReceiver:
    """ReceiverConnector that copies out of payloads."""

    def __init__(self, memory: KVMemory, fence: CallFence) -> None:
        self._memory = memory
        self._fence = fence

    def copy(self, piece: Piece, targets: tuple[int, ...]) -> None:
        """See ReceiverConnector."""
        layout = self._memory.layout
        copies = check_piece(piece, targets, self._fence, layout)
        if len(piece.payload) != payload_bytes(piece, layout):
            raise TransferError(f"{len(piece.payload)} bytes instead of {payload_bytes(piece, layout)}")
        payload = np.frombuffer(piece.payload, dtype=np.uint8)
        for copy in copies:
            view = block_view(self._memory, copy.target, copy.num_tokens)
            first = copy.index * layout.block_bytes
            np.copyto(view, payload[first : first + view.size].reshape(view.shape))
            verify(self._memory, copy, piece)

    def close(self) -> None:
        """See ReceiverConnector."""


class GrpcConnector:
    """Connector "grpc". `memory` is this worker's own, mapped writable."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory

    def source(self) -> GrpcSource:
        """See Connector."""
        return GrpcSource(self._memory)

    def receiver(self, accepted: FetchAccepted, fence: CallFence) -> GrpcReceiver:
        """See Connector."""
        return GrpcReceiver(self._memory, fence)

    def sweep(self) -> None:
        """Nothing is kept between calls."""

    def close(self) -> None:
        """Nothing is kept between calls."""


def payload_bytes(piece: Piece, layout: KVLayout) -> int:
    """Bytes of a piece's tokens."""
    return (piece.end_tokens - piece.first_block * layout.block_size) * layout.token_bytes
