"""Attention over blocks with our own kernel: keys are read where the block tables say, nothing is gathered or padded.

T tokens, N query heads, K KV heads, H head size.
"""

from __future__ import annotations

from torch import Tensor

from engine.forward_context import ForwardStep, PagedKeys
from engine.kernels.cpu.library import CpuKernels, KVView
from engine.kv.kv_cache import KVCache
from engine.layers.rotary import Angles


class PagedAttention:
    """Causal attention of one layer with grouped query heads, scale 1/sqrt(H); rotates q and k, stores K and V."""

    def __init__(self, layer: int, num_heads: int, kernels: CpuKernels) -> None:
        self._layer = layer
        self._num_heads = num_heads
        self._kernels = kernels

    def __call__(self, qkv: Tensor, angles: Angles, kv: KVCache, step: ForwardStep) -> Tensor:
        """[T, N * H] of qkv [T, (N + 2K) * H] before rotation; `qkv` is used up."""
        keys = step.keys
        assert isinstance(keys, PagedKeys), "the runner prepares steps for the attention that the model has"
        view = KVView(tensor=kv.tensor, layer=self._layer)
        return self._kernels.attention(qkv, self._num_heads, *angles, view, keys)
