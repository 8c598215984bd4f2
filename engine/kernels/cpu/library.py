"""The C kernels as methods over torch tensors. Calls release the GIL; results depend on no number of threads.

T tokens (rows), I in features, O out features, N query heads, K KV heads, H head size, E experts.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.forward_context import PagedKeys
from engine.kernels.cpu.build import KernelsUnavailable, build_library

# Counts up whenever a kernel changes any bit.
VERSION = "c-2"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_HUGE_PAGE = 2 << 20

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "neap_isa": (ctypes.c_char_p, []),
    "neap_pool_create": (_P, [_I]),
    "neap_pool_destroy": (None, [_P]),
    "neap_packed_bytes": (_L, [_I, _L, _L, _I]),
    "neap_pack": (None, [_P, _P, _I, _L, _L, _I, _P]),
    "neap_unpack_rows": (None, [_P, _I, _L, _P, _L, _P]),
    "neap_linear": (_I, [_P, _P, _I, _L, _P, _I, _L, _L, _I, _P, _I, _P]),
    "neap_rms_norm": (None, [_P, _P, _P, _I, _L, _L, _F, _P]),
    "neap_attention": (_I, [_P, _P, _P, _P, _I, _I, _I, _I, _P, _L, _L, _L, _P, _L, _P, _L, _P]),
    "neap_route": (_I, [_P, _P, _I, _L, _L, _P, _P, _I, _I, _F, _P, _P]),
    "neap_moe": (_I, [_P, _P, _I, _L, _L, _P, _P, _I, _I, _F, _P, _P, _L, _P, _P]),
}


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight as the products read it: `data` uint8. `out_features` O; gated: made of 2 * O rows, gate then up."""

    data: Tensor
    dtype: torch.dtype
    out_features: int
    in_features: int
    gated: bool


@dataclass(frozen=True, kw_only=True)
class KVView:
    """One layer of a KV memory `tensor` [blocks, layers, 2, K, block size, H]."""

    tensor: Tensor
    layer: int


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """A mixture's weights: `gate` packed float32, `correction_bias` float32 [E]; experts packed one after the other."""

    gate: PackedWeight
    correction_bias: Tensor
    gate_up: Tensor
    down: Tensor
    intermediate_size: int
    top_k: int
    norm_min: float


class CpuKernels:
    """A loaded library and its thread pool. Use it from one thread at a time.

    Tensors are contiguous, on the CPU, float32 or bfloat16.
    """

    def __init__(self, library: Path, threads: int) -> None:
        """Raises KernelsUnavailable if the library cannot be loaded."""
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as error:
            raise KernelsUnavailable(f"cannot load {library}: {error}") from error
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self.threads = threads
        self.isa: str = self._library.neap_isa().decode()
        self._pool = self._library.neap_pool_create(threads)
        if not self._pool:
            raise MemoryError("no memory for the kernels' thread pool")
        weakref.finalize(self, self._library.neap_pool_destroy, self._pool)

    @classmethod
    def load(cls, cache_dir: Path, threads: int) -> CpuKernels:
        """Build (or find) the library and load it. Raises KernelsUnavailable, with the reason."""
        return cls(build_library(cache_dir), threads)

    @property
    def name(self) -> str:
        """The arithmetic: version and instruction set. Equal names give equal bits."""
        return f"{VERSION} {self.isa}"

    def packed_bytes(self, dtype: torch.dtype, out_features: int, in_features: int, *, gated: bool = False) -> int:
        """Size of a packed weight."""
        size: int = self._library.neap_packed_bytes(DTYPES[dtype], out_features, in_features, gated)
        return size

    def pack(self, weight_OI: Tensor, *, gated: bool = False, out: Tensor | None = None) -> PackedWeight:
        """A packed copy of [O, I] ([2 * O, I] if gated), in `out` (uint8) if given."""
        rows, in_features = weight_OI.shape
        out_features = rows // 2 if gated else rows
        size = self.packed_bytes(weight_OI.dtype, out_features, in_features, gated=gated)
        data = empty_bytes(size) if out is None else out
        assert weight_OI.is_contiguous() and data.numel() == size
        self._library.neap_pack(
            self._pool,
            weight_OI.data_ptr(),
            DTYPES[weight_OI.dtype],
            out_features,
            in_features,
            gated,
            data.data_ptr(),
        )
        return PackedWeight(
            data=data, dtype=weight_OI.dtype, out_features=out_features, in_features=in_features, gated=gated
        )

    def unpack_rows(self, weight: PackedWeight, rows: Tensor) -> Tensor:
        """Rows of a weight as they were before packing: int64 [T] -> [T, I] in its dtype."""
        assert not weight.gated and rows.dtype == torch.int64 and rows.is_contiguous()
        out = torch.empty(len(rows), weight.in_features, dtype=weight.dtype)
        self._library.neap_unpack_rows(
            weight.data.data_ptr(), DTYPES[weight.dtype], weight.in_features, rows.data_ptr(), len(rows), out.data_ptr()
        )
        return out

    def linear(
        self,
        x_TI: Tensor,
        weight: PackedWeight,
        *,
        add: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x @ weight.T (+ add) summed in float32, [T, O] in x's dtype or `out_dtype`; gated: silu(gate) * up."""
        num_rows, in_features = x_TI.shape
        assert in_features == weight.in_features and x_TI.is_contiguous()
        out = torch.empty(num_rows, weight.out_features, dtype=out_dtype or x_TI.dtype)
        assert add is None or (add.shape == out.shape and add.dtype == out.dtype and add.is_contiguous())
        failed = self._library.neap_linear(
            self._pool,
            x_TI.data_ptr(),
            DTYPES[x_TI.dtype],
            num_rows,
            weight.data.data_ptr(),
            DTYPES[weight.dtype],
            weight.out_features,
            in_features,
            weight.gated,
            out.data_ptr(),
            DTYPES[out.dtype],
            None if add is None else add.data_ptr(),
        )
        return _checked(out, failed)

    def rms_norm(self, x_TI: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight, in x's dtype, rounded before the weight as the model says."""
        assert x_TI.is_contiguous() and weight.dtype == x_TI.dtype
        out = torch.empty_like(x_TI)
        self._library.neap_rms_norm(
            self._pool, x_TI.data_ptr(), weight.data_ptr(), DTYPES[x_TI.dtype], *x_TI.shape, eps, out.data_ptr()
        )
        return out

    def attention(self, qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor, kv: KVView, keys: PagedKeys) -> Tensor:
        """Causal attention [T, N * H] of qkv [T, (N + 2K) * H], rotated here; writes K and V first.

        cos, sin: float32 [T, ..., H / 2]. `qkv` is changed. Every token of the step is in one segment.
        """
        _, num_layers, _, num_kv_heads, block_size, head_dim = kv.tensor.shape
        assert qkv.dtype == kv.tensor.dtype and qkv.is_contiguous() and kv.tensor.is_contiguous()
        assert cos.is_contiguous() and sin.is_contiguous() and keys.segments.is_contiguous()
        assert keys.segments.dtype == keys.block_tables.dtype == torch.int32
        out = torch.empty(qkv.shape[0], num_heads * head_dim, dtype=qkv.dtype)
        failed = self._library.neap_attention(
            self._pool,
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            DTYPES[qkv.dtype],
            num_heads,
            num_kv_heads,
            head_dim,
            kv.tensor.data_ptr(),
            kv.layer,
            num_layers,
            block_size,
            keys.block_tables.data_ptr(),
            keys.block_tables.stride(0),
            keys.segments.data_ptr(),
            keys.segments.shape[0],
            out.data_ptr(),
        )
        return _checked(out, failed)

    def route(self, x_TD: Tensor, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
        """(ids int32, weights float32), both [T, top-k], highest first: what `moe` chooses."""
        num_tokens, hidden = x_TD.shape
        ids = torch.empty(num_tokens, weights.top_k, dtype=torch.int32)
        shares = torch.empty(num_tokens, weights.top_k)
        failed = self._library.neap_route(
            *self._routing(x_TD, num_tokens, hidden, weights), ids.data_ptr(), shares.data_ptr()
        )
        return ids, _checked(shares, failed)

    def moe(self, x_TD: Tensor, weights: ExpertWeights, add: Tensor | None = None) -> Tensor:
        """add + the weighted sum of each token's experts, [T, D] in x's dtype, summed in float32."""
        num_tokens, hidden = x_TD.shape
        assert x_TD.is_contiguous() and (add is None or (add.is_contiguous() and add.dtype == x_TD.dtype))
        out = torch.empty_like(x_TD)
        failed = self._library.neap_moe(
            *self._routing(x_TD, num_tokens, hidden, weights),
            weights.gate_up.data_ptr(),
            weights.down.data_ptr(),
            weights.intermediate_size,
            out.data_ptr(),
            None if add is None else add.data_ptr(),
        )
        return _checked(out, failed)

    def _routing(self, x_TD: Tensor, num_tokens: int, hidden: int, weights: ExpertWeights) -> tuple[object, ...]:
        return (
            self._pool,
            x_TD.data_ptr(),
            DTYPES[x_TD.dtype],
            num_tokens,
            hidden,
            weights.gate.data.data_ptr(),
            weights.correction_bias.data_ptr(),
            weights.gate.out_features,
            weights.top_k,
            weights.norm_min,
        )


def empty_bytes(size: int) -> Tensor:
    """uint8 [size], zeros, in huge pages where it is large: streaming it then misses the address cache less."""
    if size < _HUGE_PAGE:
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _checked(out: Tensor, failed: int) -> Tensor:
    if failed:
        raise MemoryError("no memory for a kernel's scratch space")
    return out
