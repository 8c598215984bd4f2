"""Packed products against float64, at odd sizes; and a row's bits whatever the rows beside it and the threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.build import build_library
from engine.kernels.cpu.library import CpuKernels

DTYPES = [torch.float32, torch.bfloat16]
# (in, out): multiples of everything, less than a block, odd in both, several panels with a tail
SHAPES = [(64, 64), (7, 3), (33, 35), (250, 131), (1024, 96)]


def weight_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) / columns**0.5).to(dtype)


def error_bound(dtype: torch.dtype, in_features: int) -> float:
    """Sums are float32 whatever the dtype: about sqrt(n) roundings of values near 1."""
    return 4e-7 * in_features**0.5 + 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_the_float64_ones_for_1_to_40_rows(
    kernels: CpuKernels, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    in_features, out_features = shape
    weight = weight_of(out_features, in_features, dtype)
    packed = kernels.pack(weight)
    for num_rows in (*range(1, 41), 100):
        x = torch.randn(num_rows, in_features).to(dtype)
        y = kernels.linear(x, packed, out_dtype=torch.float32)
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * error_bound(dtype, in_features))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_products_and_residuals(kernels: CpuKernels, dtype: torch.dtype) -> None:
    weight, down = weight_of(2 * 70, 48, dtype), weight_of(48, 70, dtype)
    x = (2 * torch.randn(19, 48)).to(dtype)
    hidden = kernels.linear(x, kernels.pack(weight, gated=True), out_dtype=torch.float32)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    torch.testing.assert_close(hidden.double(), F.silu(gate) * up, rtol=2e-6, atol=4e-6)
    hidden = hidden.to(dtype)
    y = kernels.linear(hidden, kernels.pack(down), add=x)
    expected = x.double() + hidden.double() @ down.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_rows_bits_depend_on_no_other_row_and_no_thread(
    kernels: CpuKernels, other_threads: CpuKernels, dtype: torch.dtype, gated: bool
) -> None:
    packed = kernels.pack(weight_of(2 * 83 if gated else 166, 300, dtype), gated=gated)
    x = torch.randn(150, 300).to(dtype)
    whole = kernels.linear(x, packed)
    for first, end in ((0, 1), (0, 2), (3, 16), (7, 40), (5, 41), (100, 150), (149, 150)):
        assert torch.equal(kernels.linear(x[first:end], packed), whole[first:end])
        assert torch.equal(other_threads.linear(x[first:end], packed), whole[first:end])
    assert torch.equal(other_threads.linear(x, packed), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_weight_are_the_weights(kernels: CpuKernels, dtype: torch.dtype) -> None:
    weight = weight_of(131, 37, dtype)
    index = torch.tensor([130, 0, 64, 31, 64])
    assert torch.equal(kernels.unpack_rows(kernels.pack(weight), index), weight[index])


def test_rounding_to_bfloat16_is_torchs(kernels: CpuKernels) -> None:
    values = torch.cat([torch.randn(2000), torch.randn(2000) * 1e-38, torch.tensor([float("inf"), -float("inf")])])
    halfway = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, -0x00808000], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, halfway])[:, None]
    identity = kernels.pack(torch.ones(1, 1))
    assert torch.equal(kernels.linear(values, identity, out_dtype=torch.bfloat16), values.bfloat16())


def test_nan_and_infinity_stay_in_their_row(kernels: CpuKernels) -> None:
    packed = kernels.pack(weight_of(40, 64, torch.bfloat16))
    x = torch.randn(20, 64).bfloat16()
    clean = kernels.linear(x, packed)
    x[3, 5], x[11, 0] = float("nan"), float("inf")
    y = kernels.linear(x, packed)
    assert y[3].isnan().all() and not y[11].isfinite().any()
    others = [row for row in range(20) if row not in (3, 11)]
    assert torch.equal(y[others], clean[others])


def test_dot_products_of_pairs_read_rows_and_weights_alike() -> None:
    # The instruction is not on every machine; what surrounds it is compiled here with the same sums in plain C.
    cache = Path.home() / ".cache" / "neap"
    kernels = CpuKernels(build_library(cache, extra_flags=("-DEMULATE_BF16_DOT",)), threads=2)
    assert kernels.isa.endswith("+bf16dot")
    weight = weight_of(131, 250, torch.bfloat16)
    packed = kernels.pack(weight)
    x = torch.randn(60, 250).bfloat16()
    whole = kernels.linear(x, packed, out_dtype=torch.float32)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=4 * error_bound(torch.bfloat16, 250))
    for first, end in ((0, 1), (3, 16), (5, 60)):
        assert torch.equal(kernels.linear(x[first:end], packed, out_dtype=torch.float32), whole[first:end])
