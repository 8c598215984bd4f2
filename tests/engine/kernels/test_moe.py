"""The mixture against a float64 loop, its choice against the rule, and bits that depend on no other token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.library import CpuKernels, ExpertWeights

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 7, 3, 50, 37


class Mixture:
    """Random weights of odd sizes, loaded and packed."""

    def __init__(self, kernels: CpuKernels, dtype: torch.dtype, norm_min: float = 1e-12) -> None:
        self.gate = torch.randn(NUM_EXPERTS, HIDDEN) * 0.3
        self.gate_up = (torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5).to(dtype)
        self.down = (torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5).to(dtype)
        self.weights = ExpertWeights(
            gate=kernels.pack(self.gate),
            correction_bias=torch.randn(NUM_EXPERTS) * 0.3,
            gate_up=torch.cat([kernels.pack(one, gated=True).data for one in self.gate_up]),
            down=torch.cat([kernels.pack(one).data for one in self.down]),
            intermediate_size=INTERMEDIATE,
            top_k=TOP_K,
            norm_min=norm_min,
        )

    def reference(self, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        rows = []
        for token, (own_ids, own_shares) in enumerate(zip(ids.tolist(), shares.double(), strict=True)):
            row = torch.zeros(HIDDEN, dtype=torch.float64)
            for expert, share in zip(own_ids, own_shares, strict=True):
                gate, up = (self.gate_up[expert].double() @ x[token].double()).chunk(2)
                row += share * (self.down[expert].double() @ (F.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 2, 13, 90])
def test_the_mixture_is_the_float64_one(kernels: CpuKernels, dtype: torch.dtype, num_tokens: int) -> None:
    mixture = Mixture(kernels, dtype)
    x, residual = torch.randn(num_tokens, HIDDEN).to(dtype), torch.randn(num_tokens, HIDDEN).to(dtype)
    ids, shares = kernels.route(x, mixture.weights)
    expected = mixture.reference(x, ids, shares)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(kernels.moe(x, mixture.weights).double(), expected, rtol=tolerance, atol=tolerance)
    both = kernels.moe(x, mixture.weights, residual).double()
    torch.testing.assert_close(both, expected + residual.double(), rtol=tolerance, atol=tolerance)


def test_the_bias_chooses_and_does_not_weigh(kernels: CpuKernels) -> None:
    weights = (mixture := Mixture(kernels, torch.float32)).weights
    x = torch.randn(60, HIDDEN)
    ids, shares = kernels.route(x, weights)
    scores = torch.softmax(x.double() @ mixture.gate.double().T, dim=-1)
    assert torch.equal(ids.long(), (scores + weights.correction_bias).topk(TOP_K).indices)
    assert not torch.equal(ids.long(), scores.topk(TOP_K).indices), "the bias should matter here"
    chosen = scores.gather(1, ids.long())
    torch.testing.assert_close(shares.double(), chosen / chosen.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_equal_scores_take_the_lower_experts_and_norm_min_bounds(kernels: CpuKernels) -> None:
    mixture = Mixture(kernels, torch.float32, norm_min=10.0)
    mixture.weights.correction_bias.zero_()
    ids, shares = kernels.route(torch.zeros(2, HIDDEN), mixture.weights)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(shares, torch.full((2, TOP_K), 1 / NUM_EXPERTS / 10))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_tokens_bits_depend_on_no_other_token_and_no_thread(
    kernels: CpuKernels, other_threads: CpuKernels, dtype: torch.dtype
) -> None:
    mixture = Mixture(kernels, dtype)
    x = torch.randn(120, HIDDEN).to(dtype)
    whole = kernels.moe(x, mixture.weights)
    for one in (kernels, other_threads):
        for first, end in ((0, 1), (0, 2), (3, 16), (5, 45), (119, 120)):
            assert torch.equal(one.moe(x[first:end], mixture.weights), whole[first:end])
