"""The router: which experts each token takes, and with what weight. T tokens, D model, E experts, K top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.linear import Linear
from engine.layers.options import LayerOptions


class Router:
    """Softmax scores in float32. The correction bias takes part in choosing experts, never in weighting them."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, norm_min: float, options: LayerOptions) -> None:
        self.gate = Linear(hidden_size, num_experts, options, dtype=torch.float32)
        self.correction_bias = torch.empty(num_experts, dtype=torch.float32, device=options.device)
        self.top_k = top_k
        self.norm_min = norm_min

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(ids int64 [T, K], weights [T, K] in x's dtype, which sum to 1)."""
        scores_TE = torch.softmax(self.gate(x_TD.float()), dim=-1)
        ids_TK = torch.topk(scores_TE + self.correction_bias, self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(self.norm_min)
        return ids_TK, weights_TK.to(x_TD.dtype)
