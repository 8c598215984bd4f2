"""Rotary positions in interleaved pairs (2i, 2i+1). T tokens, N heads, H head size.

(x[2i], x[2i+1]) turns by the angle position * theta ** (-2i / H)
"""

from __future__ import annotations

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]


class RotaryEmbedding:
    """Angles per step, shared by all layers; the rotation itself per layer, in float32, cast back."""

    def __init__(self, head_dim: int, theta: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self._inv_freq = (1.0 / (theta**exponents)).to(device)  # [H/2]

    def angles(self, positions: Tensor) -> Angles:
        """cos and sin, float32 [T, 1, H/2], of positions int [3, T] (time, height, width). Text reads row 0."""
        angles = positions[0].float()[:, None] * self._inv_freq
        return angles.cos()[:, None], angles.sin()[:, None]

    @staticmethod
    def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, N, H] rotated, in x's dtype. `cos`, `sin` as `angles` gives them."""
        x32_TNH = x_TNH.float()
        even, odd = x32_TNH[..., 0::2], x32_TNH[..., 1::2]
        out_TNH = torch.empty_like(x32_TNH)
        torch.sub(even * cos, odd * sin, out=out_TNH[..., 0::2])
        torch.add(odd * cos, even * sin, out=out_TNH[..., 1::2])
        return out_TNH.to(x_TNH.dtype)
