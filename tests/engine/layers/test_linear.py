"""Linear layers: right, and the same bits for a row whatever the number of rows."""

from __future__ import annotations

import pytest
import torch

from engine.layers.linear import Linear
from engine.layers.options import LayerOptions

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# (in, out) of the 0.3B model's linears, and odd ones
SHAPES = [(1024, 2560), (3072, 1024), (96, 40), (48, 8)]


def make(in_features: int, out_features: int, options: LayerOptions) -> Linear:
    linear = Linear(in_features, out_features, options)
    linear.weight.copy_(torch.randn(out_features, in_features) / in_features**0.5)
    linear.pack()
    return linear


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 33])
def test_linear_is_the_float64_product(dtype: torch.dtype, num_rows: int) -> None:
    linear = make(96, 40, LayerOptions(device=CPU, dtype=dtype))
    x = torch.randn(num_rows, 96).to(dtype)
    y = linear(x)
    assert y.shape == (num_rows, 40) and y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ linear.weight.double().T, rtol=0, atol=4 * TOLERANCES[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    linear = make(*shape, LayerOptions(device=CPU, dtype=dtype))
    x = torch.randn(300, shape[0]).to(dtype)
    alone = linear(x[:1])
    for num_rows in (2, 7, 17, 48, 144, 300):
        assert torch.equal(linear(x[:num_rows])[:1], alone)
        assert torch.equal(linear(x[:num_rows].flip(0))[-1:], alone)


def test_rows_without_padding_differ_in_float32() -> None:
    linear = make(1024, 256, LayerOptions(device=CPU, dtype=torch.float32, row_multiple=1))
    x = torch.randn(64, 1024)
    assert not torch.equal(linear(x[:1]), linear(x)[:1])
