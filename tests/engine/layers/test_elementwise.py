"""Norm, activation, embedding and rotary positions against float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.layers.activation import silu_and_mul
from engine.layers.embedding import Embedding
from engine.layers.norm import RMSNorm
from engine.layers.options import LayerOptions
from engine.layers.rotary import RotaryEmbedding

CPU = torch.device("cpu")
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def options(dtype: torch.dtype) -> LayerOptions:
    return LayerOptions(device=CPU, dtype=dtype)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = DTYPES[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-5, options(dtype))
    norm.weight.copy_(1 + 0.3 * torch.randn(48))
    x = (3 * torch.randn(7, 48)).to(dtype)
    x64 = x.double()
    close(norm(x), norm.weight.double() * x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt())


def test_rms_norm_multiplies_the_weight_after_the_cast() -> None:
    norm = RMSNorm(32, 1e-5, options(torch.bfloat16))
    norm.weight.copy_(1 + 0.3 * torch.randn(32))
    x = torch.randn(4, 32).bfloat16()
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(norm(x), norm.weight * normed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = (2 * torch.randn(5, 64)).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    close(silu_and_mul(x), gate * torch.sigmoid(gate) * up)


def test_embedding_rows() -> None:
    embedding = Embedding(20, 8, options(torch.float32))
    embedding.weight.copy_(torch.randn(20, 8))
    embedding.pack()
    assert torch.equal(embedding(torch.tensor([3, 19, 3])), embedding.weight[[3, 19, 3]])
    hidden = torch.randn(5, 8)
    torch.testing.assert_close(embedding.logits(hidden), hidden @ embedding.weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_turns_interleaved_pairs(dtype: torch.dtype) -> None:
    head_dim, theta = 16, 500000.0
    positions = torch.tensor([0, 1, 5, 1000])
    x = torch.randn(4, 3, head_dim).to(dtype)
    rotary = RotaryEmbedding(head_dim, theta, CPU)
    rotated = rotary.rotate(x, *rotary.angles(positions.expand(3, -1)))
    # As complex numbers: pair i is turned by position * theta ** (-2i / head_dim).
    frequencies = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = positions.double()[:, None, None] * frequencies
    pairs = torch.view_as_complex(x.double().view(4, 3, head_dim // 2, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    tolerance = max(DTYPES[dtype], 1e-4)  # float32 angles at position 1000
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=tolerance)


def test_text_reads_the_first_row_of_positions() -> None:
    rotary = RotaryEmbedding(8, 10000.0, CPU)
    positions = torch.tensor([[1, 2], [7, 7], [9, 9]])
    assert torch.equal(rotary.angles(positions)[0], rotary.angles(positions[:1].expand(3, -1))[0])
