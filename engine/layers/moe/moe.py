"""A mixture-of-experts MLP: route, dispatch, experts, combine, and the shared experts beside them.

T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.layers.moe.all_to_all import AllToAll
from engine.layers.moe.experts import Experts
from engine.layers.moe.router import Router


class MoE:
    """sum of weight * expert(x) over the chosen experts, plus shared(x), ungated and unscaled, if there is one.

    `max_rows` bounds the tokens of one pass (0: no bound), see LayerOptions: an expert then never sees more rows.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        all_to_all: AllToAll,
        shared: Callable[[Tensor], Tensor] | None,
        max_rows: int,
    ) -> None:
        self._router = router
        self._experts = experts
        self._all_to_all = all_to_all
        self._shared = shared
        self._max_rows = max_rows

    def __call__(self, x_TD: Tensor, valid: Tensor) -> Tensor:
        """[T, D]. `valid` bool [T]: padding takes no expert."""
        ids_TK, weights_TK = self._router(x_TD)
        if self._max_rows and x_TD.shape[0] > self._max_rows:
            starts = range(0, x_TD.shape[0], self._max_rows)
            parts = [slice(start, start + self._max_rows) for start in starts]
            y_TD = torch.cat([self._routed(x_TD[p], ids_TK[p], weights_TK[p], valid[p]) for p in parts])
        else:
            y_TD = self._routed(x_TD, ids_TK, weights_TK, valid)
        return y_TD if self._shared is None else y_TD + self._shared(x_TD)

    def _routed(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, valid: Tensor) -> Tensor:
        dispatched = self._all_to_all.dispatch(x_TD, ids_TK, valid)
        y_CD = self._experts(dispatched.x_CD, dispatched.offsets)
        return self._all_to_all.combine(y_CD, weights_TK, dispatched)
