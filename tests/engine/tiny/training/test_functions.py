"""Backward passes of our own are those of autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from engine.tiny.training.functions import mixture, normalize, padded, rotate, swiglu, unpadded


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(lambda x: normalize(x, 1e-5), (drawn(3, 6),))
    assert torch.autograd.gradcheck(swiglu, (drawn(3, 8),))
    scores, gate_up, down = drawn(5, 4), drawn(4, 6, 4), drawn(4, 4, 3)
    ids = torch.tensor([[0, 1], [3, 1], [0, 3], [1, 0], [0, 1]])  # expert 2 has no tokens

    def mixed(x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return mixture(x, ids, scores.softmax(-1).gather(1, ids), gate_up, down)[0]

    assert torch.autograd.gradcheck(mixed, (drawn(5, 4), scores, gate_up, down))
    fill, place = torch.tensor([[0, 1, 0], [2, 3, 4]]), torch.tensor([0, 1, 3, 4, 5])
    assert torch.autograd.gradcheck(lambda x: unpadded(padded(x, fill, place) ** 2, place), (drawn(5, 3),))


def test_values_are_those_of_plain_formulas() -> None:
    torch.manual_seed(1)
    x, ids = torch.randn(7, 4), torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [1, 0], [2, 0], [0, 2]])
    weights, gate_up, down = torch.rand(7, 2), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    mixed, counts = mixture(x, ids, weights, gate_up, down)
    for token in range(7):
        expected = torch.zeros(4)
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected += weight * (down[expert] @ (silu(gate) * up))
        assert torch.allclose(mixed[token], expected, atol=1e-5)
    assert counts.tolist() == [6, 3, 5]
    assert torch.allclose(normalize(x, 1e-5), rms_norm(x, (4,), eps=1e-5), atol=1e-6)


def test_rotation_is_interleaved() -> None:
    angles = torch.tensor([[0.3, 1.1]])
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    turned = rotate(x, torch.polar(torch.ones_like(angles), angles))[0, 0]
    (cos_a, cos_b), (sin_a, sin_b) = angles[0].cos(), angles[0].sin()
    assert torch.allclose(turned, torch.stack([cos_a, sin_a, -2 * sin_b, 2 * cos_b]))
