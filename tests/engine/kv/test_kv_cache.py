"""The KV memory as tensors: writes and gathers agree with the layout, and digests see every byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash

from engine.kv.kv_cache import DEVICE_ALGORITHM, HOST_ALGORITHM, KVCache
from engine.kv.layout import KVLayout
from engine.kv.memory import KVMemory

LAYOUT = KVLayout(num_blocks=6, num_layers=3, num_kv_heads=2, block_size=16, head_dim=4, dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture
def kv() -> Iterator[KVCache]:
    memory = KVMemory.create(LAYOUT)
    cache = KVCache.in_memory(memory)
    cache.tensor.copy_(torch.randn(LAYOUT.shape, generator=torch.Generator().manual_seed(0)))
    yield cache
    memory.close()


def test_the_tensor_is_the_shared_memory(kv: KVCache) -> None:
    assert kv.memory is not None and kv.tensor.shape == LAYOUT.shape
    kv.tensor[3] = 1.5
    assert (kv.memory.bytes6[3].reshape(-1).view(np.float32) == 1.5).all()


def test_a_write_lands_in_its_layer_block_and_slot_only(kv: KVCache) -> None:
    before = kv.tensor.clone()
    blocks, offsets = torch.tensor([5, 2, 5]), torch.tensor([0, 15, 7])
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    kv.write(1, kv.write_rows(blocks, offsets), k, v)
    for i, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
        assert torch.equal(kv.tensor[block, 1, 0, :, offset], k[i])
        assert torch.equal(kv.tensor[block, 1, 1, :, offset], v[i])
    kv.tensor[blocks, 1, :, :, offsets] = before[blocks, 1, :, :, offsets]
    assert torch.equal(kv.tensor, before)


def test_a_gather_follows_the_block_tables(kv: KVCache) -> None:
    tables = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32)
    keys, values = kv.gather(2, kv.gather_rows(tables))
    assert keys.shape == (2, 2, 32, 4)
    for row, table in enumerate(tables.tolist()):
        for i, block in enumerate(table):
            assert torch.equal(keys[row, :, 16 * i : 16 * i + 16], kv.tensor[block, 2, 0])
            assert torch.equal(values[row, :, 16 * i : 16 * i + 16], kv.tensor[block, 2, 1])


def test_clearing_leaves_other_blocks_and_earlier_tokens(kv: KVCache) -> None:
    before = kv.tensor.clone()
    kv.clear(torch.tensor([1, 4]))
    kv.clear_tail(2, 5)
    assert not kv.tensor[[1, 4]].any() and not kv.tensor[2, :, :, :, 5:].any()
    assert torch.equal(kv.tensor[2, :, :, :, :5], before[2, :, :, :, :5])
    assert torch.equal(kv.tensor[[0, 3, 5]], before[[0, 3, 5]])


def test_host_digests_are_over_the_bytes_a_receiver_reads(kv: KVCache) -> None:
    assert kv.memory is not None and kv.checksum_algorithm == HOST_ALGORITHM
    ids = np.array([1, 3], dtype=np.int32)
    assert kv.checksum_blocks(ids) == [xxhash.xxh3_64_intdigest(kv.memory.block(int(i)).tobytes()) for i in ids]
    assert kv.checksum_partial(3, 5) == xxhash.xxh3_64_intdigest(kv.memory.partial(3, 5).tobytes())


def words_digest(data: bytes) -> int:
    """The device digest as its docstring describes it, in Python's integers."""
    total, bits = 0, (1 << 64) - 1
    for i, word in enumerate(np.frombuffer(data, dtype="<u2").tolist()):
        mix = ((i + 1) * 0x9E3779B97F4A7C15) & bits
        total += (word + 1) * ((mix ^ (mix >> 29)) | 1)
    return total & bits


def test_device_digests_are_as_described(kv: KVCache) -> None:
    device = KVCache.on_device(LAYOUT, CPU)
    device.tensor.copy_(kv.tensor)
    assert device.checksum_algorithm == DEVICE_ALGORITHM
    data = device.tensor.numpy()
    assert device.checksum_blocks(np.array([2, 5], dtype=np.int32)) == [words_digest(data[i].tobytes()) for i in (2, 5)]
    assert device.checksum_partial(2, 7) == words_digest(data[2][:, :, :, :7].tobytes())


def test_device_digests_notice_swaps_and_single_bits() -> None:
    device = KVCache.on_device(LAYOUT, CPU)
    block = np.array([1], dtype=np.int32)
    seen = {device.checksum_blocks(block)[0]}
    words = device.tensor[1].view(-1).view(torch.int32)
    for change in (0, 1, 2):
        words.zero_()
        words[7 * change] = 1 << (10 * change)
        seen.add(device.checksum_blocks(block)[0])
    assert len(seen) == 4
