"""The fences of a call at the receiver: what a source may say, and which pieces are believed."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cluster.types import FetchAccepted, LocalMemory, Piece, SourceRef
from cluster.worker.source_call import SourceCall
from engine.kv.layout import KVLayout

LAYOUT = KVLayout(num_blocks=64, num_layers=2, num_kv_heads=1, block_size=16, head_dim=8, dtype="uint8")
ACCEPTED = FetchAccepted(
    cached_tokens=0,
    end_tokens=104,
    queue_ms=0,
    transport="local",
    local=LocalMemory(path="/x", nonce=b"n", num_blocks=64),
)
PIECE = Piece(
    call_id="call",
    source_incarnation="p1",
    index=0,
    first_block=1,
    end_tokens=64,
    num_layers=2,
    dtype="uint8",
    shape=LAYOUT.shape[1:],
    checksum_algorithm="xxh3_64",
    checksums=(1, 2, 3),
    block_ids=(7, 8, 9),
)


def call(accepted: FetchAccepted | None = ACCEPTED) -> SourceCall:
    made = SourceCall(
        call_id="call",
        source=SourceRef(worker_id="p", incarnation="p1", address="a:1"),
        start=16,
        end=104,
        next_block=1,
    )
    if accepted is not None:
        assert made.accept(accepted) == ""
    return made


def test_pieces_in_order_up_to_the_partial_last_block_are_taken() -> None:
    made = call()
    assert made.take_piece(PIECE, LAYOUT, "xxh3_64") == ""
    last = replace(PIECE, index=1, first_block=4, end_tokens=104)
    assert made.take_piece(last, LAYOUT, "xxh3_64") == ""
    assert list(made.buffered) == [PIECE, last]


@pytest.mark.parametrize(
    "changes",
    [{"end_tokens": 16}, {"end_tokens": 0}, {"end_tokens": 105}, {"local": None}],
    ids=str,
)
def test_an_acceptance_that_makes_no_sense_is_of_no_use(changes: dict[str, Any]) -> None:
    assert call(None).accept(replace(ACCEPTED, **changes)) != ""


def test_a_second_acceptance_is_of_no_use() -> None:
    assert call().accept(ACCEPTED) != ""


BAD: dict[str, dict[str, Any]] = {
    "another call": {"call_id": "x"},
    "another incarnation": {"source_incarnation": "p2"},
    "a skipped index": {"index": 1},
    "a hole": {"first_block": 2, "end_tokens": 80},
    "again": {"first_block": 0, "end_tokens": 48},
    "too few checksums": {"checksums": (1, 2)},
    "no blocks": {"end_tokens": 16, "checksums": ()},
    "past the end": {"end_tokens": 120, "checksums": (1,) * 7, "block_ids": (1,) * 7},
    "a partial block in the middle": {"end_tokens": 56},
    "another shape": {"shape": (2, 2, 1, 16, 16)},
    "another dtype": {"dtype": "float32"},
    "some layers only": {"num_layers": 1},
    "other layers": {"first_layer": 1},
    "another algorithm": {"checksum_algorithm": "crc32"},
    "no algorithm": {"checksum_algorithm": ""},
    "no block ids": {"block_ids": ()},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
def test_a_piece_that_is_not_as_agreed_is_not_taken(changes: dict[str, Any]) -> None:
    made = call()
    assert made.take_piece(replace(PIECE, **changes), LAYOUT, "xxh3_64") != ""
    assert not made.buffered


def test_pieces_before_the_acceptance_and_after_the_end_are_not_taken() -> None:
    assert call(None).take_piece(PIECE, LAYOUT, "xxh3_64") != ""
    made = call()
    made.offered_all = True
    assert made.take_piece(PIECE, LAYOUT, "xxh3_64") != ""


def test_any_named_algorithm_is_taken_when_the_rank_has_none() -> None:
    assert call().take_piece(replace(PIECE, checksum_algorithm="device-1"), LAYOUT, None) == ""
