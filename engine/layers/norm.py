"""Root-mean-square norm. T tokens, D model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.options import LayerOptions


class RMSNorm:
    """x / rms(x) * weight: variance and product in float32, the weight multiplied after the cast back."""

    def __init__(self, hidden_size: int, eps: float, options: LayerOptions) -> None:
        self.weight = torch.empty(hidden_size, dtype=options.dtype, device=options.device)
        self._eps = eps
        self._kernels = options.kernels

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] in x's dtype."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x_TD, self.weight, self._eps)
        x32_TD = x_TD.float()
        variance = x32_TD.square().mean(-1, keepdim=True)  # [T, 1]
        return self.weight * (x32_TD * torch.rsqrt(variance + self._eps)).to(x_TD.dtype)
