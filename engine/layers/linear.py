"""Linear layers behind a seam: a method packs a weight once at load and applies it; a layer is a method and a weight.

T tokens (rows), I in features, O out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.library import CpuKernels, PackedWeight
from engine.layers.activation import silu_and_mul
from engine.layers.options import LayerOptions


class PackedLinear(Protocol):
    """A packed weight and the product with it."""

    def apply(self, x_TI: Tensor, add: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x @ weight.T (+ add), [T, O]; gated: silu(gate) * up. A row's bits depend on that row alone."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight as it was loaded: int64 [T] -> [T, I]."""
        ...


class LinearMethod(Protocol):
    """How a linear stores and applies its weight. A quantised form is another implementation."""

    def pack(self, weight_OI: Tensor, *, gated: bool) -> PackedLinear:
        """The weight as this method reads it. May keep `weight_OI` itself."""
        ...


class LibraryLinear:
    """torch's own matrix product, with rows padded so that the same kernel serves every batch.

    Small row counts take other kernels with another order of summation: with padding off, a row alone and the same row
    in a batch differ in their last bits.
    """

    def __init__(self, options: LayerOptions) -> None:
        self._options = options

    def pack(self, weight_OI: Tensor, *, gated: bool) -> PackedLinear:
        """Nothing to change: the library reads row-major weights."""
        return _LibraryWeight(weight=weight_OI, gated=gated, options=self._options)


@dataclass(frozen=True, kw_only=True)
class _LibraryWeight:
    weight: Tensor
    gated: bool
    options: LayerOptions

    def apply(self, x_TI: Tensor, add: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[T, O]. Pads only if the caller's rows are not padded already."""
        num_rows = x_TI.shape[0]
        missing = self.options.padded_rows(num_rows) - num_rows
        if missing:
            x_TI = F.pad(x_TI, (0, 0, 0, missing))
        y_TO = F.linear(x_TI, self.weight)
        if missing:
            y_TO = y_TO[:num_rows]
        if self.gated:
            y_TO = silu_and_mul(y_TO)
        return (y_TO if add is None else add + y_TO).to(out_dtype)

    def rows(self, index: Tensor) -> Tensor:
        """[T, I]."""
        return self.weight.index_select(0, index)


class KernelLinear:
    """Our own product: one order of summation for any number of rows and threads, so nothing is padded."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def pack(self, weight_OI: Tensor, *, gated: bool) -> PackedLinear:
        """Panels that are streamed once per product; the caller drops `weight_OI`."""
        return _KernelWeight(weight=self._kernels.pack(weight_OI, gated=gated), kernels=self._kernels)


@dataclass(frozen=True, kw_only=True)
class _KernelWeight:
    weight: PackedWeight
    kernels: CpuKernels

    def apply(self, x_TI: Tensor, add: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[T, O]: activation and sum in float32, rounded once."""
        return self.kernels.linear(x_TI, self.weight, add=add, out_dtype=out_dtype)

    def rows(self, index: Tensor) -> Tensor:
        """[T, I]."""
        return self.kernels.unpack_rows(self.weight, index)


class Linear:
    """A weight [O, I] without bias. `weight` is where the loader writes; `pack()` is called once after that.

    gated: `weight` is [2 * O, I], gate then up, and the layer computes silu(gate) * up.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: LayerOptions,
        *,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        method: LinearMethod | None = None,
    ) -> None:
        shape = (2 * out_features if gated else out_features, in_features)
        self._weight: Tensor | None = torch.empty(shape, dtype=dtype or options.dtype, device=options.device)
        self._gated = gated
        self._method = method or linear_method(options)
        self._packed: PackedLinear | None = None

    @property
    def weight(self) -> Tensor:
        """Where the loader writes."""
        assert self._weight is not None, "the weight is packed: only one copy is kept"
        return self._weight

    def pack(self) -> None:
        """Turn the loaded weight into the form that `__call__` reads; the loaded form is dropped if that is another."""
        self._packed = self._method.pack(self.weight, gated=self._gated)
        if isinstance(self._packed, _KernelWeight):
            self._weight = None

    @property
    def packed(self) -> PackedLinear:
        """The packed weight."""
        assert self._packed is not None, "pack() comes before the first use"
        return self._packed

    def __call__(self, x_TI: Tensor, add: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """[T, O] in x's dtype or `out_dtype`; `add` [T, O], a residual, is of that dtype too."""
        return self.packed.apply(x_TI, add, out_dtype or x_TI.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight: int64 [T] -> [T, I]."""
        return self.packed.rows(index)


def linear_method(options: LayerOptions) -> LinearMethod:
    """Our own kernels where there are some, else torch's."""
    return LibraryLinear(options) if options.kernels is None else KernelLinear(options.kernels)
