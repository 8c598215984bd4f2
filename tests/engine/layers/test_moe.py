"""Mixture of experts: the router's exact rule, grouped experts against a float64 loop, and bits free of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.moe.all_to_all import LocalAllToAll
from engine.layers.moe.experts import Experts
from engine.layers.moe.moe import MoE
from engine.layers.moe.router import Router
from engine.layers.options import LayerOptions

CPU = torch.device("cpu")
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 2, 64, 48
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Layer:
    """A random MoE layer and its parts."""

    def __init__(self, dtype: torch.dtype) -> None:
        options = LayerOptions(device=CPU, dtype=dtype)
        self.router = Router(HIDDEN, EXPERTS, TOP_K, 1e-12, options)
        self.router.gate.weight.copy_(torch.randn(EXPERTS, HIDDEN) * 0.3)
        self.router.correction_bias.copy_(torch.randn(EXPERTS) * 0.3)
        self.experts = Experts(EXPERTS, HIDDEN, INTERMEDIATE, options)
        self.experts.gate_up.copy_(torch.randn(self.experts.gate_up.shape) / HIDDEN**0.5)
        self.experts.down.copy_(torch.randn(self.experts.down.shape) / INTERMEDIATE**0.5)
        self.shared_weight = torch.randn(HIDDEN, HIDDEN).to(dtype) / HIDDEN**0.5
        self.moe = MoE(
            self.router,
            self.experts,
            LocalAllToAll(EXPERTS, options),
            lambda x: x @ self.shared_weight,
        )
        self.moe.pack()

    def __call__(self, x: Tensor, num_padding: int = 0) -> Tensor:
        valid = torch.arange(len(x) + num_padding) < len(x)
        padded = F.pad(x, (0, 0, 0, num_padding))
        return self.moe(padded, padded, valid)[: len(x)]

    def reference(self, x: Tensor) -> Tensor:
        """float64, one token and one expert at a time."""
        ids, weights = self.router(x)
        rows = []
        for token, (own_ids, own_weights) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
            row = x[token].double() + x[token].double() @ self.shared_weight.double()
            for expert, weight in zip(own_ids, own_weights, strict=True):
                gate, up = (self.experts.gate_up[expert].double() @ x[token].double()).chunk(2)
                row = row + weight * (self.experts.down[expert].double() @ (F.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)


def test_the_bias_chooses_experts_and_does_not_weight_them() -> None:
    router = Layer(torch.float32).router
    x = torch.randn(50, HIDDEN)
    ids, weights = router(x)
    scores = torch.softmax(x.double() @ router.gate.weight.double().T, dim=-1)
    expected_ids = (scores + router.correction_bias).topk(TOP_K).indices
    assert torch.equal(ids, expected_ids)
    assert not torch.equal(ids, scores.topk(TOP_K).indices), "the bias should matter here"
    chosen = scores.gather(1, ids)
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_weights_are_clamped_by_norm_min() -> None:
    options = LayerOptions(device=CPU, dtype=torch.float32)
    router = Router(HIDDEN, EXPERTS, TOP_K, 10.0, options)
    router.gate.weight.zero_()
    router.gate.pack()
    router.correction_bias.zero_()
    _, weights = router(torch.randn(3, HIDDEN))
    torch.testing.assert_close(weights, torch.full((3, TOP_K), 1 / EXPERTS / 10))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 16, 70])
def test_moe_is_the_float64_loop(dtype: torch.dtype, num_tokens: int) -> None:
    layer = Layer(dtype)
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    torch.testing.assert_close(layer(x).double(), layer.reference(x), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    x = torch.randn(300, HIDDEN).to(dtype)
    alone = layer(x[:1], num_padding=15)
    for num_tokens in (16, 33, 150, 300):
        assert torch.equal(layer(x[:num_tokens], num_padding=-num_tokens % 16)[:1], alone)


def test_padding_is_sent_to_no_expert_and_stays_finite() -> None:
    layer = Layer(torch.bfloat16)
    x = torch.randn(16, HIDDEN).bfloat16()
    ids, _ = layer.router(x)
    valid = torch.arange(16) < 3
    dispatched = LocalAllToAll(EXPERTS, LayerOptions(device=CPU, dtype=torch.bfloat16)).dispatch(x, ids, valid)
    num_groups = len(set(ids[:3].flatten().tolist()))
    assert dispatched.offsets[-1] == 16 * num_groups
    assert layer.moe(x, x, valid).isfinite().all()


def test_garbage_past_the_last_offset_is_never_read() -> None:
    layer = Layer(torch.float32)
    all_to_all = LocalAllToAll(EXPERTS, LayerOptions(device=CPU, dtype=torch.float32))
    x = torch.randn(16, HIDDEN)
    ids, weights = layer.router(x)
    dispatched = all_to_all.dispatch(x, ids, torch.arange(16) < 9)
    y = layer.experts(dispatched.x_CD, dispatched.offsets)
    clean = all_to_all.combine(y, weights, dispatched)
    y[int(dispatched.offsets[-1]) :] = float("nan")
    assert torch.equal(all_to_all.combine(y, weights, dispatched), clean)


def test_widths_that_the_grouped_product_cannot_take_are_refused() -> None:
    options = LayerOptions(device=CPU, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="moe_intermediate_size 20"):
        Experts(4, 64, 20, options)
