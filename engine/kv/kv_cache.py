"""The KV memory as torch tensors, for kernels; its layout is engine/kv/layout.py's.

A block's memory is (layer, K or V, head) pieces of block_size tokens. Two flat views of the one allocation make every
access an index of rows, in one copy, without changing the layout:

    block rows  [num_blocks * L * 2 * H, block_size * D]    one row per (block, layer, K or V, head): gathering
    token rows  [num_blocks * L * 2 * H * block_size, D]    one row per token of those: writing
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from engine.kv.layout import KVLayout
from engine.kv.memory import KVMemory

HOST_ALGORITHM = "xxh3_64"
DEVICE_ALGORITHM = "wsum64_1"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


class KVCache:
    """K and V of every layer and block. On the CPU it is a view of `memory`, which it does not own."""

    def __init__(self, tensor: Tensor, layout: KVLayout, memory: KVMemory | None) -> None:
        assert tensor.shape == layout.shape and tensor.is_contiguous()
        self.layout = layout
        self.memory = memory
        self.tensor = tensor
        self._block_rows = tensor.view(-1, layout.block_size * layout.head_dim)
        self._token_rows = tensor.view(-1, layout.head_dim)
        pieces = torch.arange(2 * layout.num_kv_heads, device=tensor.device).view(2, 1, layout.num_kv_heads)
        self._pieces = pieces  # [2, 1, H]: row of (K or V, head) within a layer of a block

    @classmethod
    def in_memory(cls, memory: KVMemory) -> KVCache:
        """The host form: a view of shared memory."""
        tensor = torch.from_numpy(memory.bytes6).view(_DTYPES[memory.layout.dtype])
        return cls(tensor, memory.layout, memory)

    @classmethod
    def on_device(cls, layout: KVLayout, device: torch.device) -> KVCache:
        """The CUDA form: one zeroed allocation. On other devices: memory of this process alone."""
        return cls(torch.zeros(layout.shape, dtype=_DTYPES[layout.dtype], device=device), layout, None)

    def gather_rows(self, block_tables: Tensor) -> Tensor:
        """Block rows int64 [2, R, H, n] of layer 0 for block ids int [R, n]; `gather` adds the layer."""
        blocks = block_tables.to(torch.int64) * (self.layout.num_layers * 2 * self.layout.num_kv_heads)
        return self._pieces[..., None] + blocks[None, :, None, :]

    def gather(self, layer: int, gather_rows: Tensor) -> Tensor:
        """K and V, [2, R, H, n * block_size, D], copied in the order of the tables."""
        rows = gather_rows + layer * 2 * self.layout.num_kv_heads
        found = self._block_rows.index_select(0, rows.view(-1))
        return found.view(*rows.shape[:3], rows.shape[3] * self.layout.block_size, self.layout.head_dim)

    def write_rows(self, block_ids: Tensor, offsets: Tensor) -> Tensor:
        """Token rows int64 [2, T, H] of layer 0 for tokens at (block, offset), int64 [T] each."""
        size = self.layout.block_size
        block_rows = block_ids * (self.layout.num_layers * 2 * self.layout.num_kv_heads)
        return (self._pieces + block_rows[None, :, None]) * size + offsets[None, :, None]

    def write(self, layer: int, write_rows: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> None:
        """Store K and V [T, H, D] of one layer."""
        rows = write_rows + layer * 2 * self.layout.num_kv_heads * self.layout.block_size
        self._token_rows[rows[0]] = k_TNH
        self._token_rows[rows[1]] = v_TNH

    def clear(self, block_ids: Tensor) -> None:
        """Zero whole blocks (int64 [n]) before their first token: masked keys must be finite, whatever was here."""
        self.tensor.index_fill_(0, block_ids, 0)

    def clear_tail(self, block_id: int, num_tokens: int) -> None:
        """Zero what follows the first `num_tokens` of a block."""
        self.tensor[block_id, :, :, :, num_tokens:].zero_()

    @property
    def checksum_algorithm(self) -> str:
        """How `checksum_blocks` digests: on the host's bytes, or on the device where the bytes are."""
        return HOST_ALGORITHM if self.memory is not None else DEVICE_ALGORITHM

    def checksum_blocks(self, block_ids: npt.NDArray[np.int32]) -> list[int]:
        """64-bit digests of whole blocks. On a device this waits for it."""
        if self.memory is not None:
            return [xxhash.xxh3_64_intdigest(self.memory.block(block).data) for block in block_ids.tolist()]
        found = self.tensor.index_select(0, torch.from_numpy(block_ids).to(self.tensor.device, torch.int64))
        return _weighted_sums(found.view(len(block_ids), -1))

    def checksum_partial(self, block_id: int, num_tokens: int) -> int:
        """64-bit digest of a block's first tokens, bytes in C order of [L, 2, H, num_tokens, D]."""
        if self.memory is not None:
            return xxhash.xxh3_64_intdigest(self.memory.partial(block_id, num_tokens).tobytes())
        return _weighted_sums(self.tensor[block_id, :, :, :, :num_tokens].reshape(1, -1))[0]


def _weighted_sums(data: Tensor) -> list[int]:
    """ "wsum64_1": per row of `data` [n, items], the sum over its 16-bit little-endian words w[i] of
    (w[i] + 1) * odd(i), modulo 2**64, where odd(i) = mix(i) | 1 and mix(i) = (i + 1) * 0x9E3779B97F4A7C15 (then
    mix ^= mix >> 29, logical). Any single changed word changes the sum; order matters; zeros count.
    """
    words = data.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    index = torch.arange(1, words.shape[1] + 1, device=data.device)
    mix = index * (0x9E3779B97F4A7C15 - (1 << 64))
    odd = (mix ^ ((mix >> 29) & ((1 << 35) - 1))) | 1
    return [value & ((1 << 64) - 1) for value in ((words + 1) * odd).sum(1).tolist()]
