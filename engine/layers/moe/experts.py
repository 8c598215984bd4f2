"""The experts: one SwiGLU per group of rows, all groups in one grouped matrix product per projection.

C grouped rows, D model, E experts, F hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.library import CpuKernels, empty_bytes
from engine.layers.activation import silu_and_mul
from engine.layers.options import LayerOptions

_STRIDE_BYTES = 16


class Experts:
    """Weights of all experts: `gate_up` [E, 2F, D] (gate rows first), `down` [E, D, F].

    Raises ValueError for widths that the grouped product does not take (rows of whole 16 bytes).
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, options: LayerOptions) -> None:
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        for name, size in (("hidden_size", hidden_size), ("moe_intermediate_size", intermediate_size)):
            if size * options.dtype.itemsize % _STRIDE_BYTES:
                raise ValueError(f"{name} {size} in {options.dtype} is not a multiple of {_STRIDE_BYTES} bytes")
        self.gate_up = torch.empty(
            num_experts, 2 * intermediate_size, hidden_size, dtype=options.dtype, device=options.device
        )
        self.down = torch.empty(num_experts, hidden_size, intermediate_size, dtype=options.dtype, device=options.device)

    def pack(self, kernels: CpuKernels) -> tuple[Tensor, Tensor]:
        """(gate_up, down) as our own kernels read them, uint8 [E * bytes]; the loaded form is dropped."""
        gate_up = _packed_experts(kernels, self.gate_up, gated=True)
        del self.gate_up
        down = _packed_experts(kernels, self.down, gated=False)
        del self.down
        return gate_up, down

    def __call__(self, x_CD: Tensor, offsets: Tensor) -> Tensor:
        """[C, D]. Rows past the last offset are garbage, in and out: nothing may read them."""
        hidden_C2F = F.grouped_mm(x_CD, self.gate_up.transpose(1, 2), offs=offsets)
        return F.grouped_mm(silu_and_mul(hidden_C2F), self.down.transpose(1, 2), offs=offsets)


def _packed_experts(kernels: CpuKernels, weights: Tensor, *, gated: bool) -> Tensor:
    num_experts, num_rows, in_features = weights.shape
    out_features = num_rows // 2 if gated else num_rows
    size = kernels.packed_bytes(weights.dtype, out_features, in_features, gated=gated)
    packed = empty_bytes(num_experts * size)
    for index in range(num_experts):
        kernels.pack(weights[index], gated=gated, out=packed[index * size : (index + 1) * size])
    return packed
