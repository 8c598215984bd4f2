"""Attention over blocks with torch's op: writes the step's K and V, gathers each row's keys, one op for all rows.

A query tile is (token, head of the group) rows x the keys of one request; the query heads that share a KV head lie in
one tile. Rows are padded to a multiple of 16 and keys to one of 512 (masked), so the op splits every row's keys at
the same absolute positions and takes the same kernels: a token's bits are the same as a decode row, as a prefill row
of any chunk, and with more padding. Gathering KV happens in this file only.

T tokens, N query heads, K KV heads, G = N / K, H head size, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.forward_context import DecodeGroup, ForwardStep, GatheredKeys, PrefillChunk
from engine.kv.kv_cache import KVCache
from engine.layers.options import LayerOptions
from engine.layers.rotary import Angles, RotaryEmbedding

# One call's mask has at most this many elements; longer chunks take several calls, at multiples of 16 tokens.
_MAX_MASK_ELEMENTS = 1 << 26


class GatheredAttention:
    """Causal attention of one layer with grouped query heads, scale 1/sqrt(H)."""

    def __init__(self, layer: int, num_heads: int, num_kv_heads: int, head_dim: int, options: LayerOptions) -> None:
        self._layer = layer
        self._num_kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._options = options

    def __call__(self, qkv: Tensor, angles: Angles, kv: KVCache, step: ForwardStep) -> Tensor:
        """[T, N * H] of qkv [T, (N + 2K) * H] before rotation. Padded tokens are zero."""
        num_rotated = self._num_kv_heads * (self._group + 1)
        heads = qkv.view(qkv.shape[0], num_rotated + self._num_kv_heads, self._head_dim)
        qk = RotaryEmbedding.rotate(heads[:, :num_rotated], *angles)
        num_heads = num_rotated - self._num_kv_heads
        return self.attend(qk[:, :num_heads], qk[:, num_heads:], heads[:, num_rotated:], kv, step)

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, kv: KVCache, step: ForwardStep) -> Tensor:
        """The same of rotated heads. K and V of the step are stored first, then read back with the rest."""
        keys = step.keys
        assert isinstance(keys, GatheredKeys), "the runner prepares steps for the attention that the model has"
        kv.write(self._layer, keys.write_rows, k_TKH, v_TKH)
        q_TKGH = q_TNH.reshape(-1, self._num_kv_heads, self._group, self._head_dim)
        out_TKGH = torch.zeros_like(q_TKGH)
        for group in keys.decode:
            out_TKGH.index_copy_(0, group.token_index, self._decode(q_TKGH, kv, group))
        for chunk in keys.prefill:
            self._prefill(q_TKGH, kv, chunk, step.positions[0], out_TKGH)
        return out_TKGH.view(q_TNH.shape[0], -1)

    def _decode(self, q_TKGH: Tensor, kv: KVCache, group: DecodeGroup) -> Tensor:
        """[R, K, G, H]: all rows of the group in one call, a tile per row and KV head."""
        keys, values = kv.gather(self._layer, group.gather_rows)
        tile = q_TKGH.index_select(0, group.token_index)
        missing = self._options.padded_rows(self._group) - self._group
        if missing:
            tile = F.pad(tile, (0, 0, 0, missing))
        out = F.scaled_dot_product_attention(tile, keys, values, attn_mask=group.mask)
        return out[:, :, : self._group]

    def _prefill(self, q_TKGH: Tensor, kv: KVCache, chunk: PrefillChunk, positions: Tensor, out_TKGH: Tensor) -> None:
        """Fill the chunk's rows of `out_TKGH`."""
        keys, values = kv.gather(self._layer, chunk.gather_rows)
        num_keys = keys.shape[2]
        # At least 16 tokens, so that tiles end where rows need no padding.
        tokens_per_call = max(_MAX_MASK_ELEMENTS // (num_keys * self._group) // 16, 1) * 16
        key_positions = torch.arange(num_keys, device=keys.device)
        for start in range(chunk.start, chunk.start + chunk.length, tokens_per_call):
            end = min(start + tokens_per_call, chunk.start + chunk.length)
            num_rows = (end - start) * self._group
            missing = self._options.padded_rows(num_rows) - num_rows
            tile = q_TKGH[start:end].transpose(0, 1).reshape(1, self._num_kv_heads, num_rows, self._head_dim)
            row_positions = positions[start:end].repeat_interleave(self._group)
            if missing:
                tile = F.pad(tile, (0, 0, 0, missing))
                row_positions = F.pad(row_positions, (0, missing))
            mask = causal_mask(row_positions, key_positions, keys.dtype)
            out = F.scaled_dot_product_attention(tile, keys, values, attn_mask=mask[None, None])
            shape = (self._num_kv_heads, end - start, self._group, self._head_dim)
            out_TKGH[start:end] = out[0, :, :num_rows].reshape(shape).transpose(0, 1)


def causal_mask(row_positions: Tensor, key_positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, S] in `dtype`: 0 where the key's position is not after the row's, -inf elsewhere."""
    mask = torch.zeros(len(row_positions), len(key_positions), dtype=dtype, device=row_positions.device)
    return mask.masked_fill_(key_positions[None, :] > row_positions[:, None], float("-inf"))
