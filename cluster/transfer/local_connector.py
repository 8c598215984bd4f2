"""Same host: the receiver maps the source's KV memory and copies from it; no byte passes through gRPC.

Opening the memory proves that the host is the same. A mapping is shared by the calls to one source and dropped when it
has not been used for IDLE_S, so a dead source's memory is given back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cluster.transfer.connector import (
    CallFence,
    SourceUnreachableError,
    TransferError,
    block_view,
    check_piece,
    verify,
)
from cluster.types import FetchAccepted, LocalMemory, Piece
from engine.kv.memory import KVMemory

IDLE_S = 30.0


@dataclass(kw_only=True)
class _Mapped:
    memory: KVMemory
    num_users: int = 0
    idle_since: float = 0.0


class LocalSource:
    """SourceConnector: the block ids in a piece are all that a receiver needs."""

    def pack(self, piece: Piece) -> Piece:
        """See SourceConnector."""
        return piece


class LocalReceiver:
    """ReceiverConnector over a mapping of the source's memory."""

    def __init__(self, memory: KVMemory, source: KVMemory, fence: CallFence, release: Callable[[], None]) -> None:
        self._memory = memory
        self._source = source
        self._fence = fence
        self._release = release

    def copy(self, piece: Piece, targets: tuple[int, ...]) -> None:
        """See ReceiverConnector."""
        copies = check_piece(piece, targets, self._fence, self._memory.layout)
        if len(piece.block_ids) != len(piece.checksums):
            raise TransferError("a local piece without its block ids")
        if not all(0 < block_id < self._source.layout.num_blocks for block_id in piece.block_ids):
            raise TransferError("a source block that does not exist")
        for copy in copies:
            source = block_view(self._source, piece.block_ids[copy.index], copy.num_tokens)
            np.copyto(block_view(self._memory, copy.target, copy.num_tokens), source)
            verify(self._memory, copy, piece)

    def close(self) -> None:
        """See ReceiverConnector."""
        self._release()


class LocalConnector:
    """Connector "local". `memory` is this worker's own, mapped writable. Threads may use it."""

    def __init__(self, memory: KVMemory, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._clock = clock
        self._mapped: dict[bytes, _Mapped] = {}
        self._lock = threading.Lock()

    def source(self) -> LocalSource:
        """See Connector."""
        return LocalSource()

    def receiver(self, accepted: FetchAccepted, fence: CallFence) -> LocalReceiver:
        """See Connector."""
        if accepted.local is None:
            raise SourceUnreachableError("the source names no memory")
        self.sweep()
        with self._lock:
            mapped = self._mapped.get(accepted.local.nonce) or self._open(accepted.local)
            mapped.num_users += 1
        return LocalReceiver(self._memory, mapped.memory, fence, lambda: self._leave(mapped))

    def sweep(self) -> None:
        """Unmap what nobody has used for IDLE_S."""
        now = self._clock()
        with self._lock:
            for nonce, mapped in list(self._mapped.items()):
                if not mapped.num_users and now - mapped.idle_since >= IDLE_S:
                    mapped.memory.close()
                    del self._mapped[nonce]

    def close(self) -> None:
        """Unmap everything."""
        with self._lock:
            for mapped in self._mapped.values():
                mapped.memory.close()
            self._mapped.clear()

    def _open(self, local: LocalMemory) -> _Mapped:
        layout = replace(self._memory.layout, num_blocks=local.num_blocks)
        try:
            memory = KVMemory.open(local.path, layout, local.nonce, writable=False)
        except (OSError, ValueError) as error:
            raise SourceUnreachableError(f"{local.path}: {error}") from error
        mapped = self._mapped[local.nonce] = _Mapped(memory=memory)
        return mapped

    def _leave(self, mapped: _Mapped) -> None:
        with self._lock:
            mapped.num_users -= 1
            mapped.idle_since = self._clock()
