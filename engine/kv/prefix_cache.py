"""Which block holds the KV of which tokens: a chain of block keys, and the map from key to block.

    root  = sha256(identity, cache_salt)                      identity: weights, quantisation, KV dtype, rope, ...
    key_i = sha256(key_(i-1) | token ids of block i, 4 bytes little-endian each)

So a key names everything that the KV of its block depends on. Torch-free, clock-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
LITTLE_INT32 = np.dtype("<i4")  # of token ids as bytes
SHORT_KEY_BYTES = 8  # of a key, where others are only told of it


@lru_cache(maxsize=256)
def root_key(identity: str, cache_salt: bytes = b"") -> bytes:
    """The parent of every first block. Parts are length-prefixed, so more (adapter, media) can be added later."""
    digest = sha256()
    for part in (identity.encode(), cache_salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


class HashChain:
    """The block keys of one growing token sequence; no block is hashed twice."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self._keys: list[bytes] = []

    def hash_blocks(self, tokens: IntArray) -> list[bytes]:
        """Keys of the complete blocks of `tokens` (int32 [n]), which must agree with what earlier calls were given."""
        keys, block_size = self._keys, self._block_size
        num_blocks, num_known = len(tokens) // block_size, len(keys)
        if num_known < num_blocks:
            size = 4 * block_size
            parent = keys[-1] if keys else self._root
            data = tokens[num_known * block_size : num_blocks * block_size].astype(LITTLE_INT32, copy=False).tobytes()
            for start in range(0, len(data), size):
                parent = sha256(parent + data[start : start + size]).digest()
                keys.append(parent)
        return keys[:num_blocks]


class PrefixCache:
    """Key <-> block, one block per key and one key per block. Only complete READY blocks are put in by the manager."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._changes: dict[bytes, bool] | None = None  # key -> whether it is present now

    def record_changes(self) -> None:
        """From here on, remember what `take_changes` is to tell. Whoever calls this takes them after every step."""
        self._changes = {}

    def take_changes(self) -> tuple[bytes, bytes]:
        """Short keys that came, and that went, since the last call, each kind concatenated."""
        if not self._changes:
            return b"", b""
        came = b"".join([key[:SHORT_KEY_BYTES] for key, present in self._changes.items() if present])
        went = b"".join([key[:SHORT_KEY_BYTES] for key, present in self._changes.items() if not present])
        self._changes = {}
        return came, went

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._key_of

    def items(self) -> list[tuple[bytes, int]]:
        """All (key, block id) pairs."""
        return list(self._block_of.items())

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is present."""
        found = []
        for key in keys:
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(self, key: bytes, block_id: int) -> bool:
        """Make `block_id` the holder of `key`; False (and no change) when another block already is."""
        assert block_id not in self._key_of, f"block {block_id} already holds a key"
        if key in self._block_of:
            return False
        self._block_of[key] = block_id
        self._key_of[block_id] = key
        if self._changes is not None:
            self._changes[key] = True
        return True

    def remove(self, block_id: int) -> None:
        """Forget a block that is about to be reused."""
        key = self._key_of.pop(block_id)
        del self._block_of[key]
        if self._changes is not None:
            self._changes[key] = False
