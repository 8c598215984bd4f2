"""Both connectors: the same bytes arrive, only where they may, and anything that is not as agreed is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from cluster.transfer.connector import CallFence, Connector, ReceiverConnector, SourceUnreachableError, TransferError
from cluster.transfer.grpc_connector import GrpcConnector
from cluster.transfer.local_connector import IDLE_S, LocalConnector
from cluster.types import FetchAccepted, LocalMemory, Piece, Transport
from engine.kv.layout import KVLayout
from engine.kv.memory import KVMemory

# many processes may share this machine's two cores
LOADED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LAYOUT = KVLayout(num_blocks=12, num_layers=3, num_kv_heads=2, block_size=16, head_dim=8, dtype="float16")
FENCE = CallFence(call_id="call", source_incarnation="source")
SOURCE_BLOCKS = (7, 2, 9, 4)
BLOCK_SIZE = LAYOUT.block_size


@dataclass
class Pair:
    """A source and a receiver of one transport, with memories of different sizes."""

    source: KVMemory
    target: KVMemory
    sending: Connector
    receiver: ReceiverConnector

    def piece(self, end_tokens: int, first_block: int = 0) -> Piece:
        """What the source offers of a sequence whose blocks are SOURCE_BLOCKS, packed."""
        num_blocks = LAYOUT.blocks_for(end_tokens)
        block_ids = SOURCE_BLOCKS[first_block:num_blocks]
        counts = [min(BLOCK_SIZE, end_tokens - BLOCK_SIZE * i) for i in range(first_block, num_blocks)]
        piece = Piece(
            call_id="call",
            source_incarnation="source",
            index=0,
            first_block=first_block,
            end_tokens=end_tokens,
            num_layers=LAYOUT.num_layers,
            dtype=LAYOUT.dtype,
            shape=LAYOUT.shape[1:],
            checksum_algorithm="xxh3_64",
            checksums=tuple(
                xxhash.xxh3_64_intdigest(self.source.partial(block_id, count).tobytes())
                for block_id, count in zip(block_ids, counts, strict=True)
            ),
            block_ids=block_ids,
        )
        return self.sending.source().pack(piece)


def accepted(transport: Transport, memory: KVMemory) -> FetchAccepted:
    local = LocalMemory(path=memory.path, nonce=memory.nonce, num_blocks=memory.layout.num_blocks)
    return FetchAccepted(cached_tokens=0, end_tokens=64, queue_ms=0, transport=transport, local=local)


@pytest.fixture(params=["local", "grpc"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from make_pair(request.param)


def make_pair(transport: Transport) -> Iterator[Pair]:
    source = KVMemory.create(replace(LAYOUT, num_blocks=10))
    target = KVMemory.create(LAYOUT)
    source.bytes6[...] = np.random.default_rng(1).integers(0, 256, source.bytes6.shape, dtype=np.uint8)
    connectors: dict[Transport, type[LocalConnector] | type[GrpcConnector]] = {
        "local": LocalConnector,
        "grpc": GrpcConnector,
    }
    sending, receiving = connectors[transport](source), connectors[transport](target)
    receiver = receiving.receiver(accepted(transport, source), FENCE)
    yield Pair(source, target, sending, receiver)
    receiver.close()
    receiving.close()
    source.close()
    target.close()


def test_whole_and_partial_blocks_arrive_and_nothing_else_is_touched(pair: Pair) -> None:
    targets = (3, 11, 1)
    pair.receiver.copy(pair.piece(2 * BLOCK_SIZE + 5), targets)
    np.testing.assert_array_equal(pair.target.block(3), pair.source.block(7))
    np.testing.assert_array_equal(pair.target.block(11), pair.source.block(2))
    np.testing.assert_array_equal(pair.target.partial(1, 5), pair.source.partial(9, 5))
    assert not pair.target.bytes6[1, :, :, :, 5:].any()
    others = [block for block in range(LAYOUT.num_blocks) if block not in targets]
    assert not pair.target.bytes6[others].any()


def test_blocks_that_are_not_wanted_are_skipped(pair: Pair) -> None:
    pair.receiver.copy(pair.piece(4 * BLOCK_SIZE, first_block=1), (-1, 5, -1))
    np.testing.assert_array_equal(pair.target.block(5), pair.source.block(9))
    assert not pair.target.bytes6[[block for block in range(LAYOUT.num_blocks) if block != 5]].any()


@LOADED
@given(data=st.data())
@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_any_range_into_any_blocks(transport: Transport, data: st.DataObject) -> None:
    pairs = make_pair(transport)
    pair = next(pairs)
    end_tokens = data.draw(st.integers(1, 4 * BLOCK_SIZE))
    num_blocks = LAYOUT.blocks_for(end_tokens)
    first_block = data.draw(st.integers(0, num_blocks - 1))
    targets = tuple(data.draw(st.permutations(range(1, 12)))[: num_blocks - first_block])
    pair.receiver.copy(pair.piece(end_tokens, first_block), targets)
    for i, target in enumerate(targets, start=first_block):
        count = min(BLOCK_SIZE, end_tokens - i * BLOCK_SIZE)
        np.testing.assert_array_equal(pair.target.partial(target, count), pair.source.partial(SOURCE_BLOCKS[i], count))
    next(pairs, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"call_id": "another"}, "another call"),
        ({"source_incarnation": "another"}, "another call"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"shape": (3, 2, 2, 32, 8)}, "32"),
        ({"first_layer": 1}, "layers"),
        ({"num_layers": 2}, "layers"),
        ({"checksum_algorithm": "crc32"}, "crc32"),
        ({"checksum_algorithm": ""}, "algorithm"),
        ({"checksums": (1, 2)}, "checksums"),
        ({"checksums": (1, 2, 3)}, "did not arrive"),
        ({"end_tokens": 2 * BLOCK_SIZE}, "blocks"),
        ({"first_block": 9}, "blocks"),
    ],
)
def test_a_piece_that_is_not_as_agreed_is_refused(pair: Pair, changes: dict[str, object], words: str) -> None:
    piece = structs.replace(pair.piece(2 * BLOCK_SIZE + 5), **changes)  # type: ignore[arg-type]
    with pytest.raises(TransferError, match=words):
        pair.receiver.copy(piece, (3, 11, 1))
    if words != "did not arrive":
        assert not pair.target.bytes6.any()


@pytest.mark.parametrize("targets", [(0, 1, 2), (1, 2, 12), (1, 2)])
def test_targets_that_are_not_ours_to_write_are_refused(pair: Pair, targets: tuple[int, ...]) -> None:
    with pytest.raises(TransferError):
        pair.receiver.copy(pair.piece(2 * BLOCK_SIZE + 5), targets)
    assert not pair.target.bytes6.any()


def test_a_source_block_that_changed_since_its_commit_is_found(pair: Pair) -> None:
    stale = pair.piece(3 * BLOCK_SIZE)
    pair.source.block(2)[17] ^= 1
    fresh = pair.piece(3 * BLOCK_SIZE)
    with pytest.raises(TransferError, match="block 1 did not arrive"):
        pair.receiver.copy(structs.replace(fresh, checksums=stale.checksums), (3, 11, 1))


def test_a_payload_of_the_wrong_length_is_refused() -> None:
    pairs = make_pair("grpc")
    pair = next(pairs)
    piece = pair.piece(2 * BLOCK_SIZE + 5)
    for payload in (b"", piece.payload[:-1], piece.payload + b"x"):
        with pytest.raises(TransferError, match="bytes instead of"):
            pair.receiver.copy(structs.replace(piece, payload=payload), (3, 11, 1))
    next(pairs, None)


@pytest.mark.parametrize("block_ids", [(), (7, 2), (7, 2, 10), (7, 2, 0)])
def test_source_blocks_that_cannot_be_are_refused(block_ids: tuple[int, ...]) -> None:
    pairs = make_pair("local")
    pair = next(pairs)
    with pytest.raises(TransferError, match="block"):
        pair.receiver.copy(structs.replace(pair.piece(2 * BLOCK_SIZE + 5), block_ids=block_ids), (3, 11, 1))
    next(pairs, None)


def test_a_memory_that_is_not_the_one_meant_is_not_opened() -> None:
    memory = KVMemory.create(LAYOUT)
    connector = LocalConnector(memory)
    right = accepted("local", memory)
    assert right.local is not None
    wrong = [
        None,
        structs.replace(right.local, nonce=bytes(16)),
        structs.replace(right.local, path="/proc/1/fd/999"),
        structs.replace(right.local, num_blocks=5),
    ]
    for local in wrong:
        with pytest.raises(SourceUnreachableError):
            connector.receiver(structs.replace(right, local=local), FENCE)
    memory.close()


def test_a_mapping_is_shared_and_dropped_when_nobody_used_it_for_long() -> None:
    now = 0.0
    source, target = KVMemory.create(LAYOUT), KVMemory.create(LAYOUT)
    connector = LocalConnector(target, clock=lambda: now)
    baseline = _num_open_files()
    first = connector.receiver(accepted("local", source), FENCE)
    second = connector.receiver(accepted("local", source), FENCE)
    assert _num_open_files() == baseline + 2  # the memory's and its mapping's
    first.close()
    now += 2 * IDLE_S
    connector.sweep()
    assert _num_open_files() == baseline + 2
    second.close()
    del first, second
    now += IDLE_S
    connector.sweep()
    assert _num_open_files() == baseline
    for memory in (source, target):
        memory.close()


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
