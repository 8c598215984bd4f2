"""A mixture-of-experts MLP: route, dispatch, experts, combine, and the shared experts beside them.

T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.layers.moe.all_to_all import AllToAll
from engine.layers.moe.experts import Experts
from engine.layers.moe.router import Router


class MoE:
    """sum of weight * expert(x) over the chosen experts, plus shared(x), ungated and unscaled, if there is one."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        all_to_all: AllToAll,
        shared: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._router = router
        self._experts = experts
        self._all_to_all = all_to_all
        self._shared = shared

    def __call__(self, x_TD: Tensor, valid: Tensor) -> Tensor:
        """[T, D]. `valid` bool [T]: padding takes no expert."""
        ids_TK, weights_TK = self._router(x_TD)
        dispatched = self._all_to_all.dispatch(x_TD, ids_TK, valid)
        y_CD = self._experts(dispatched.x_CD, dispatched.offsets)
        y_TD = self._all_to_all.combine(y_CD, weights_TK, dispatched)
        return y_TD if self._shared is None else y_TD + self._shared(x_TD)
