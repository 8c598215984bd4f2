"""The KV memory of a rank: a memfd that the rank, its network process and same-host peers map. Torch-free.

    byte 0      "NEAPKV01" | nonce (16 bytes) | zeros to HEADER_BYTES
    HEADER      the blocks, in the layout of engine/kv/layout.py

The nonce proves that the file opened through /proc is the one meant (process ids are reused). A memfd rather than
multiprocessing.shared_memory, whose 3.11 version unlinks the owner's segment when a peer exits.
"""

from __future__ import annotations

import mmap
import os
import secrets

import numpy as np
import numpy.typing as npt

from engine.kv.layout import KVLayout

HEADER_BYTES = 4096
_MAGIC = b"NEAPKV01"
ByteArray = npt.NDArray[np.uint8]


class KVMemory:
    """One mapped KV allocation. `bytes6` is uint8 [num_blocks, L, 2, H, block_size, D * itemsize]; see `layout`."""

    def __init__(self, fd: int, layout: KVLayout, *, writable: bool) -> None:
        self.layout = layout
        self._fd = fd
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, HEADER_BYTES + layout.total_bytes, access=access)
        self.nonce = bytes(self._map[8:24])
        flat = np.frombuffer(self._map, dtype=np.uint8, offset=HEADER_BYTES)
        self.bytes6: ByteArray = flat.reshape(layout.byte_shape)

    @classmethod
    def create(cls, layout: KVLayout) -> KVMemory:
        """Make a new zeroed allocation, owned by this process."""
        fd = os.memfd_create("neap-kv", os.MFD_CLOEXEC)
        os.ftruncate(fd, HEADER_BYTES + layout.total_bytes)
        os.pwrite(fd, _MAGIC + secrets.token_bytes(16), 0)
        return cls(fd, layout, writable=True)

    @classmethod
    def open(cls, path: str, layout: KVLayout, nonce: bytes, *, writable: bool) -> KVMemory:
        """Map another process's memory through `path` (/proc/PID/fd/N).

        Raises OSError if it cannot be opened (another host or user) and ValueError if it is not the memory meant.
        """
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            head = os.pread(fd, 24, 0)
            if head != _MAGIC + nonce or os.fstat(fd).st_size != HEADER_BYTES + layout.total_bytes:
                raise ValueError(f"{path} is not the KV memory that was announced")
            return cls(fd, layout, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @property
    def path(self) -> str:
        """Where other processes of this host and user can open it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def block(self, block_id: int) -> ByteArray:
        """uint8 [block_bytes], a view of one whole block."""
        view: ByteArray = self.bytes6[block_id].reshape(-1)
        return view

    def partial(self, block_id: int, num_tokens: int) -> ByteArray:
        """uint8 [L, 2, H, num_tokens, D * itemsize], a strided view of a block's first tokens."""
        return self.bytes6[block_id, :, :, :, :num_tokens, :]

    def close(self) -> None:
        """Drop this process's mapping. Views handed out keep the pages alive until they are gone."""
        del self.bytes6
        os.close(self._fd)
