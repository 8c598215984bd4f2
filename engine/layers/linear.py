"""Linear layers behind a seam: a method packs a weight once at load and applies it; a layer is a method and a weight.

T tokens (rows), I in features, O out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.options import LayerOptions


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the form its method reads. `data` [O, I] for library linears."""

    data: Tensor


class LinearMethod(Protocol):
    """How a linear stores and applies its weight. A quantised form is another implementation."""

    def pack(self, weight_OI: Tensor) -> Packed:
        """The weight as this method reads it. May keep `weight_OI` itself."""
        ...

    def apply(self, x_TI: Tensor, packed: Packed) -> Tensor:
        """x @ weight.T, [T, O]; a row's bits depend on that row alone."""
        ...


class LibraryLinear:
    """torch's own matrix product, with rows padded so that the same kernel serves every batch.

    Small row counts take other kernels with another order of summation: with padding off, a row alone and the same row
    in a batch differ in their last bits.
    """

    def __init__(self, options: LayerOptions) -> None:
        self._options = options

    def pack(self, weight_OI: Tensor) -> Packed:
        """Nothing to change: the library reads row-major weights."""
        return Packed(data=weight_OI)

    def apply(self, x_TI: Tensor, packed: Packed) -> Tensor:
        """[T, O]. Pads only if the caller's rows are not padded already."""
        num_rows = x_TI.shape[0]
        missing = self._options.padded_rows(num_rows) - num_rows
        if missing:
            x_TI = F.pad(x_TI, (0, 0, 0, missing))
        y_TO = F.linear(x_TI, packed.data)
        return y_TO[:num_rows] if missing else y_TO


class Linear:
    """A weight [O, I] without bias. `weight` is where the loader writes; `pack()` is called once after that."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: LayerOptions,
        *,
        dtype: torch.dtype | None = None,
        method: LinearMethod | None = None,
    ) -> None:
        self.weight = torch.empty(out_features, in_features, dtype=dtype or options.dtype, device=options.device)
        self._method: LinearMethod = method or LibraryLinear(options)
        self._packed: Packed | None = None

    def pack(self) -> None:
        """Turn the loaded weight into the form that `__call__` reads."""
        self._packed = self._method.pack(self.weight)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, O]."""
        assert self._packed is not None, "pack() comes before the first use"
        return self._method.apply(x_TI, self._packed)
