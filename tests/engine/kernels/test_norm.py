"""The norm against float64, and its roundings against the model's definition."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.cpu.library import CpuKernels


@pytest.mark.parametrize("features", [1024, 48, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm(kernels: CpuKernels, features: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = (3 * torch.randn(37, features)).to(dtype), (1 + 0.3 * torch.randn(features)).to(dtype)
    y = kernels.rms_norm(x, weight, 1e-5)
    x64 = x.double()
    expected = weight.double() * x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(kernels.rms_norm(x[20:21], weight, 1e-5), y[20:21])


def test_the_weight_is_multiplied_after_the_cast(kernels: CpuKernels) -> None:
    # One feature: x / rms(x) is 1 or -1 but for eps, so the cast rounds it away and only the weight is left.
    x, weight = torch.tensor([[2.0], [-3.0]]).bfloat16(), torch.tensor([1.7]).bfloat16()
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), torch.stack([weight, -weight]))
