"""The gate of SwiGLU. T tokens, F hidden."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up, [T, F], from [T, 2F] = gate | up."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)
