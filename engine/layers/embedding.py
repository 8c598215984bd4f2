"""Token embedding. T tokens, V vocabulary, D model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.options import LayerOptions


class Embedding:
    """A table [V, D]; also the LM head's weight where the two are tied."""

    def __init__(self, vocab_size: int, hidden_size: int, options: LayerOptions) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=options.dtype, device=options.device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int [T] -> [T, D]."""
        return self.weight.index_select(0, token_ids)
