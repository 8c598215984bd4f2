"""A mixture-of-experts MLP: route, dispatch, experts, combine, and the shared experts beside them.

Two forms: of torch's parts, and in one call of our own kernels (one rank: nothing is sent).

T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.kernels.cpu.library import CpuKernels, ExpertWeights
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

    def pack(self) -> None:
        """After loading. The experts are stored as they are read."""
        self._router.gate.pack()

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, valid: Tensor) -> Tensor:
        """[T, D], added to the residual. `valid` bool [T]: padding takes no expert."""
        ids_TK, weights_TK = self._router(x_TD)
        dispatched = self._all_to_all.dispatch(x_TD, ids_TK, valid)
        y_CD = self._experts(dispatched.x_CD, dispatched.offsets)
        y_TD = self._all_to_all.combine(y_CD, weights_TK, dispatched)
        return residual_TD + (y_TD if self._shared is None else y_TD + self._shared(x_TD))


class KernelMoE:
    """The same in one call: nothing is padded; a token's experts are summed in float32 in the order of its slots."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: Callable[[Tensor, Tensor], Tensor] | None,
        kernels: CpuKernels,
    ) -> None:
        self._router = router
        self._experts = experts
        self._shared = shared
        self._kernels = kernels
        self._weights: ExpertWeights | None = None

    def pack(self) -> None:
        """After loading; the experts' loaded form is dropped."""
        router = self._router
        gate_up, down = self._experts.pack(self._kernels)
        self._weights = ExpertWeights(
            gate=self._kernels.pack(router.gate.weight),
            correction_bias=router.correction_bias,
            gate_up=gate_up,
            down=down,
            intermediate_size=self._experts.intermediate_size,
            top_k=router.top_k,
            norm_min=router.norm_min,
        )

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, valid: Tensor) -> Tensor:
        """[T, D], added to the residual. There is no padding: `valid` says nothing new."""
        assert self._weights is not None, "pack() comes before the first use"
        if self._shared is not None:
            residual_TD = self._shared(x_TD, residual_TD)
        return self._kernels.moe(x_TD, self._weights, residual_TD)
