"""Token embedding, and the LM head where the two share one table. T tokens, V vocabulary, D model."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.linear import Linear
from engine.layers.options import LayerOptions


class Embedding:
    """A table [V, D], kept once in the form of a linear's weight: its rows are looked up, its product gives logits."""

    def __init__(self, vocab_size: int, hidden_size: int, options: LayerOptions) -> None:
        self._table = Linear(hidden_size, vocab_size, options)

    @property
    def weight(self) -> Tensor:
        """Where the loader writes."""
        return self._table.weight

    def pack(self) -> None:
        """After loading."""
        self._table.pack()

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> [T, D]."""
        return self._table.rows(token_ids)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """float32 [T, V]."""
        return self._table(hidden_TD, out_dtype=torch.float32)
