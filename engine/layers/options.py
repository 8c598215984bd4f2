"""How layers are built: device, dtype, and what makes a token's bits independent of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.cpu.library import CpuKernels

ROW_MULTIPLE = 16
KEY_MULTIPLE = 512


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Shared by all layers of one model.

    `kernels`: our own CPU kernels, whose order of summation is fixed, so that nothing is padded; None: torch's.
    `row_multiple`: rows (and expert groups) of library linears and attention queries are padded to a multiple of it;
    `key_multiple`: the same for attention keys. 1 switches padding off, and exactness with it (negative controls).
    Padding is enough with one CPU thread (tests/engine/exactness). With several, MKL and oneDNN split sums by the
    number of rows (measured: 2 threads, float32, from 64 rows of 1000 features): bits depend on the batch again.
    """

    device: torch.device
    dtype: torch.dtype
    kernels: CpuKernels | None = None
    row_multiple: int = ROW_MULTIPLE
    key_multiple: int = KEY_MULTIPLE

    def padded_rows(self, num_rows: int) -> int:
        """`num_rows` rounded up, at least one multiple; as it is with our own kernels."""
        if self.kernels is not None:
            return num_rows
        return max(round_up(num_rows, self.row_multiple), self.row_multiple)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple
