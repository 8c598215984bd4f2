"""The KV layout: one allocation `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, a block contiguous.

    block b:  | layer 0: K heads.. V heads.. | layer 1: ... | ...        (block_bytes, one piece for any transport)
    partial:  the first t tokens of a block are the strided view [:, :, :, :t, :] of it, sent in C order

Block 0 is the null block: padded rows write to it and nothing ever reads it. Torch-free, clock-free.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

KVDType = Literal["float32", "bfloat16", "float16", "uint8"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
NULL_BLOCK = 0


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Shape and dtype of one rank's KV memory."""

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: KVDType

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""
        return (self.num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.token_bytes * self.block_size

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole allocation."""
        return self.block_bytes * self.num_blocks

    @property
    def byte_shape(self) -> tuple[int, int, int, int, int, int]:
        """The same memory seen as uint8: the last axis counts bytes."""
        return (*self.shape[:-1], self.head_dim * ITEM_BYTES[self.dtype])

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        """16 hex digits over everything a peer must share for a block's bytes to mean the same (not num_blocks)."""
        text = f"{self.num_layers}/{self.num_kv_heads}/{self.block_size}/{self.head_dim}/{self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def within(
        cls, budget_bytes: int, *, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: KVDType
    ) -> KVLayout:
        """The largest layout that fits `budget_bytes`. Raises ValueError when not even two blocks fit."""
        one = cls(
            num_blocks=1,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_dim=head_dim,
            dtype=dtype,
        )
        num_blocks = budget_bytes // one.block_bytes
        if num_blocks < 2:
            raise ValueError(f"kv_cache_bytes={budget_bytes} holds no block of {one.block_bytes} bytes")
        return cls(**{**one.__dict__, "num_blocks": num_blocks})
