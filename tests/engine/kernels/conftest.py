"""This machine's kernels, compiled once, on several numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu.library import CpuKernels


@pytest.fixture(autouse=True)
def one_torch_thread_one_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> CpuKernels:
    return CpuKernels.load(Path.home() / ".cache" / "neap", threads=2)


@pytest.fixture(scope="session", params=[1, 3, 5])
def other_threads(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels.load(Path.home() / ".cache" / "neap", threads=request.param)
