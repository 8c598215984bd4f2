"""Attention over blocks: right against float64, and the same bits as a decode row, in any chunk, with more padding."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engine.forward_context import DecodeGroup, ForwardStep, GatheredKeys, PrefillChunk
from engine.kv.kv_cache import KVCache
from engine.kv.layout import KVLayout
from engine.layers.attention import attention
from engine.layers.attention.attention import GatheredAttention
from engine.layers.options import LayerOptions, round_up

CPU = torch.device("cpu")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
BLOCK = 16


class Bench:
    """One sequence of random q, k, v in scattered blocks of layer 1 of 2, and ways to run parts of it."""

    def __init__(self, dtype: torch.dtype, length: int, kv_heads: int, group: int, head_dim: int, tile: int = 512):
        self.length, self.tile = length, tile
        self.q = torch.randn(length, kv_heads * group, head_dim).to(dtype)
        self.k = torch.randn(length, kv_heads, head_dim).to(dtype)
        self.v = torch.randn(length, kv_heads, head_dim).to(dtype)
        num_blocks = 2 * round_up(length, 512) // BLOCK + 2
        layout = KVLayout(
            num_blocks=num_blocks,
            num_layers=2,
            num_kv_heads=kv_heads,
            block_size=BLOCK,
            head_dim=head_dim,
            dtype=NAMES[dtype],  # type: ignore[arg-type]
        )
        self.kv = KVCache.on_device(layout, CPU)
        self.kv.tensor.copy_(torch.randn(layout.shape))  # stale, but finite
        own = random.Random(0).sample(range(1, num_blocks), -(-length // BLOCK))
        self.table = torch.zeros(num_blocks, dtype=torch.int64)
        self.table[: len(own)] = torch.tensor(own)
        options = LayerOptions(device=CPU, dtype=dtype)
        self.attention = GatheredAttention(1, kv_heads * group, kv_heads, head_dim, options)

    def write_rows(self, positions: Tensor) -> Tensor:
        return self.kv.write_rows(self.table[positions // BLOCK], positions % BLOCK)

    def gather_rows(self, num_keys: int) -> Tensor:
        return self.kv.gather_rows(self.table[None, : round_up(num_keys, self.tile) // BLOCK])

    def prefill(self, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        chunk = PrefillChunk(start=0, length=end - start, gather_rows=self.gather_rows(end))
        return self.run(positions, (), (chunk,))

    def decode(self, positions: list[int], more_keys: int = 0) -> Tensor:
        index = torch.tensor(positions)
        num_keys = round_up(max(positions) + 1, self.tile) + more_keys
        mask = attention.causal_mask(index, torch.arange(num_keys), self.q.dtype)[:, None, None]
        rows = self.gather_rows(num_keys).expand(-1, len(positions), -1, -1).contiguous()
        group = DecodeGroup(token_index=torch.arange(len(positions)), gather_rows=rows, mask=mask)
        return self.run(index, (group,), ())

    def run(self, positions: Tensor, decode: tuple[DecodeGroup, ...], prefill: tuple[PrefillChunk, ...]) -> Tensor:
        step = ForwardStep(
            token_ids=positions,
            positions=positions.expand(3, -1),
            valid=torch.ones(len(positions), dtype=torch.bool),
            keys=GatheredKeys(write_rows=self.write_rows(positions), decode=decode, prefill=prefill),
        )
        return self.attention.attend(self.q[positions], self.k[positions], self.v[positions], self.kv, step)

    def reference(self) -> Tensor:
        """float64 [length, N * H]."""
        kv_heads, group = self.k.shape[1], self.q.shape[1] // self.k.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (self.k, self.v))
        scores = torch.einsum("tnh,snh->nts", self.q.double(), k) / self.q.shape[-1] ** 0.5
        scores.masked_fill_(torch.ones(self.length, self.length).triu(1).bool(), float("-inf"))
        assert kv_heads * group == k.shape[1]
        return torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("dtype", NAMES)
def test_attention_is_the_float64_one(dtype: torch.dtype) -> None:
    bench = Bench(dtype, length=70, kv_heads=2, group=3, head_dim=32)
    found = torch.cat([bench.prefill(0, 33), bench.prefill(33, 69), bench.decode([69])])
    torch.testing.assert_close(found.double(), bench.reference(), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 8, 128), (4, 5, 64), (1, 1, 32)])
def test_bits_do_not_depend_on_chunks_batch_or_padding(
    dtype: torch.dtype, kv_heads: int, group: int, head_dim: int
) -> None:
    bench = Bench(dtype, 600, kv_heads, group, head_dim)
    whole = bench.prefill(0, 600)
    for start, end in ((0, 1), (1, 37), (37, 512), (500, 530), (599, 600)):
        assert torch.equal(bench.prefill(start, end), whole[start:end])
    for positions in ([599], [0, 511, 512, 599, 3], [17]):
        assert torch.equal(bench.decode(positions), whole[positions])
        assert torch.equal(bench.decode(positions, more_keys=512), whole[positions])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_key_padding_bits_differ(dtype: torch.dtype) -> None:
    bench = Bench(dtype, 600, 2, 8, 64, tile=BLOCK)
    whole = bench.prefill(0, 600)
    parts = torch.cat([bench.prefill(start, start + 100) for start in range(0, 600, 100)])
    assert not torch.equal(parts, whole)


def test_a_chunk_whose_mask_is_too_large_takes_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.float32, 200, 2, 3, 32)
    whole = bench.prefill(0, 200)
    monkeypatch.setattr(attention, "_MAX_MASK_ELEMENTS", 512 * 3 * 40)
    assert torch.equal(bench.prefill(0, 200), whole)
