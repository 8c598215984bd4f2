"""Brings tokens to their experts and the results back: dispatch -> experts -> combine.

One rank: dispatch sorts the (token, slot) pairs by expert and lays them out in groups, each padded to whole tiles.

    grouped rows:  [ expert 0 ... pad | expert 2 ... pad | ... | rows past the last offset: never read ]

T tokens, D model, E experts, K top-k, P = T * K pairs, C rows of the grouped buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.layers.options import LayerOptions, round_up


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Grouped rows [C, D]; `offsets` int32 [E], where each expert's group ends; `rows` int64 [T, K], each pair's row.

    Pairs of padded tokens own no row: they read row 0, so that their results are finite.
    """

    x_CD: Tensor
    offsets: Tensor
    rows: Tensor


class AllToAll(Protocol):
    """How tokens reach experts. `valid` bool [T] is false for padding, which is sent to no expert."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, valid: Tensor) -> Dispatched:
        """Group the tokens by expert, without a host synchronisation."""
        ...

    def combine(self, y_CD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """Weighted sum of each token's K results, in the order of its slots, [T, D]."""
        ...


class LocalAllToAll:
    """All experts on this rank."""

    def __init__(self, num_experts: int, options: LayerOptions) -> None:
        self._num_experts = num_experts
        self._multiple = options.row_multiple

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, valid: Tensor) -> Dispatched:
        """Sort pairs by expert (stable: by token within an expert), pad each group to whole tiles."""
        num_experts, multiple = self._num_experts, self._multiple
        num_tokens, top_k = ids_TK.shape
        num_pairs = num_tokens * top_k
        # Padding goes to an expert behind the last one.
        ids_P = ids_TK.masked_fill(~valid[:, None], num_experts).view(-1)
        sorted_ids, order = ids_P.sort(stable=True)
        counts = (ids_P[None, :] == torch.arange(num_experts + 1, device=ids_P.device)[:, None]).sum(1)
        starts = counts.cumsum(0) - counts
        padded = (counts + (multiple - 1)).div(multiple, rounding_mode="floor") * multiple
        offsets = padded[:num_experts].cumsum(0)
        padded_starts = torch.cat((offsets.new_zeros(1), offsets))
        pair = torch.arange(num_pairs, device=ids_P.device)
        row_of_sorted = padded_starts[sorted_ids] + pair - starts[sorted_ids]
        real = sorted_ids < num_experts
        # Every group may need multiple - 1 rows of padding; the last slot takes what padded tokens would write.
        capacity = round_up(num_pairs + min(num_experts, num_pairs) * (multiple - 1), multiple)
        source = order.new_zeros(capacity + 1)
        source.scatter_(0, torch.where(real, row_of_sorted, capacity), order.div(top_k, rounding_mode="floor"))
        rows = torch.empty_like(order).scatter_(0, order, row_of_sorted.masked_fill(~real, 0))
        return Dispatched(
            x_CD=x_TD.index_select(0, source[:capacity]),
            offsets=offsets.to(torch.int32),
            rows=rows.view(num_tokens, top_k),
        )

    def combine(self, y_CD: Tensor, weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums in float32, slot by slot: an index_add_ would sum in no fixed order."""
        weights32_TK = weights_TK.float()
        total_TD: Tensor | None = None
        for slot in range(weights_TK.shape[1]):
            y_TD = y_CD.index_select(0, dispatched.rows[:, slot]).float() * weights32_TK[:, slot, None]
            total_TD = y_TD if total_TD is None else total_TD.add_(y_TD)
        assert total_TD is not None, "top-k is at least 1"
        return total_TD.to(y_CD.dtype)
