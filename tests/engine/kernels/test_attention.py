"""Paged attention against float64, and a token's bits as a decode row, in any chunk, in any blocks, on any threads."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.forward_context import PagedKeys
from engine.kernels.cpu.library import CpuKernels, KVView
from engine.layers.rotary import RotaryEmbedding

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Bench:
    """One sequence of random q, k, v in scattered blocks of layer 1 of 2 among garbage, and ways to run parts of it."""

    def __init__(
        self, dtype: torch.dtype, length: int, kv_heads: int, group: int, head_dim: int, block: int = 16
    ) -> None:
        self.num_heads, self.kv_heads, self.head_dim = kv_heads * group, kv_heads, head_dim
        self.qkv = torch.randn(length, (self.num_heads + 2 * kv_heads) * head_dim).to(dtype)
        num_blocks = 2 * (length // block + 2)
        self.kv = torch.full((num_blocks, 2, 2, kv_heads, block, head_dim), float("nan"), dtype=dtype)
        own = random.Random(0).sample(range(1, num_blocks), -(-length // block))
        self.tables = torch.zeros(3, num_blocks, dtype=torch.int32)
        self.tables[1, : len(own)] = torch.tensor(own, dtype=torch.int32)
        self.rotary = RotaryEmbedding(head_dim, 10000.0, CPU)

    def run(self, kernels: CpuKernels, spans: Sequence[tuple[int, int]]) -> Tensor:
        """One step that computes positions [first, end) of each span, all of the one request."""
        positions = torch.cat([torch.arange(*span) for span in spans])
        starts = torch.tensor([0, *(end - first for first, end in spans)]).cumsum(0)
        segments = [[1, int(start), end - first, first] for start, (first, end) in zip(starts, spans, strict=False)]
        keys = PagedKeys(block_tables=self.tables, segments=torch.tensor(segments, dtype=torch.int32))
        cos, sin = self.rotary.angles(positions.expand(3, -1))
        qkv = self.qkv[positions]  # a copy: the kernel rotates in place
        return kernels.attention(qkv, self.num_heads, cos, sin, KVView(tensor=self.kv, layer=1), keys)

    def reference(self) -> Tensor:
        """float64 [length, N * H]."""
        length, group = len(self.qkv), self.num_heads // self.kv_heads
        heads = self.qkv.view(length, -1, self.head_dim)
        rotated = self.num_heads + self.kv_heads
        cos, sin = self.rotary.angles(torch.arange(length).expand(3, -1))
        qk = self.rotary.rotate(heads[:, :rotated], cos, sin).double()
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (qk[:, self.num_heads :], heads[:, rotated:]))
        scores = torch.einsum("tnh,snh->nts", qk[:, : self.num_heads], k) / self.head_dim**0.5
        scores.masked_fill_(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block"), [(2, 8, 128, 16), (4, 5, 64, 48), (1, 1, 16, 16), (2, 3, 20, 16)]
)
def test_attention_is_the_float64_one_and_reads_nothing_it_has_not_written(
    kernels: CpuKernels, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, block: int
) -> None:
    bench = Bench(dtype, 150, kv_heads, group, head_dim, block)
    found = torch.cat(
        [bench.run(kernels, [(0, 70)]), bench.run(kernels, [(70, 149)]), bench.run(kernels, [(149, 150)])]
    )
    torch.testing.assert_close(found.double(), bench.reference(), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 8, 128), (4, 5, 64), (1, 20, 32)])
def test_bits_do_not_depend_on_chunks_batch_or_threads(
    kernels: CpuKernels, other_threads: CpuKernels, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int
) -> None:
    bench = Bench(dtype, 300, kv_heads, group, head_dim)
    whole = bench.run(kernels, [(0, 300)])
    for one in (kernels, other_threads):
        for first, end in ((0, 1), (1, 37), (37, 255), (250, 270), (299, 300)):
            assert torch.equal(bench.run(one, [(first, end)]), whole[first:end])
        decode = [(p, p + 1) for p in (299, 0, 63, 64, 127, 130)]
        expected = torch.cat([whole[first:end] for first, end in [*decode, (40, 90)]])
        assert torch.equal(bench.run(one, [*decode, (40, 90)]), expected)


def test_k_and_v_are_where_the_layout_says(kernels: CpuKernels) -> None:
    bench = Bench(torch.float32, 40, 2, 2, 32)
    bench.run(kernels, [(0, 40)])
    heads = bench.qkv.view(40, -1, 32)
    cos, sin = bench.rotary.angles(torch.arange(40).expand(3, -1))
    k = bench.rotary.rotate(heads[:, 4:6], cos, sin)
    for position in (0, 15, 16, 39):
        block = int(bench.tables[1, position // 16])
        torch.testing.assert_close(bench.kv[block, 1, 0, :, position % 16], k[position], rtol=1e-6, atol=1e-6)
        assert torch.equal(bench.kv[block, 1, 1, :, position % 16], heads[position, 6:])
    assert bench.kv[:, 0].isnan().all() and bench.kv[0].isnan().all()


def test_large_scores_neither_overflow_nor_vanish(kernels: CpuKernels) -> None:
    bench = Bench(torch.float32, 100, 1, 2, 32)
    bench.qkv[:, : 3 * 32] *= 30  # scores in the thousands
    torch.testing.assert_close(bench.run(kernels, [(0, 100)]).double(), bench.reference(), rtol=0, atol=2e-3)
