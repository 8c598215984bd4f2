"""Pulls from workers that compute nothing: what a request that moved left behind."""

from __future__ import annotations

from cluster.types import FetchMoved, FetchOfferedAll, SourceFailed
from cluster.worker.effects import CloseFetch, OpenFetch
from engine.messages import PullClosed
from tests.cluster.worker.pulling import Pulling


def test_what_the_holder_lacks_is_asked_of_the_next_source() -> None:
    p = Pulling("d1", "p1", holder="d1")
    assert (p.call.source_incarnation, p.call.max_compute_tokens) == ("d1" * 16, 0)
    p.accepts(end_tokens=64, cached_tokens=64)
    p.reserved()
    p.says(p.piece(0, 0, 64))
    p.copied(1)
    p.says(FetchOfferedAll())
    (opened,) = p.of(OpenFetch)
    assert (opened.source.worker_id, opened.open.start, opened.open.end) == ("p1", 64, 104)
    assert opened.open.max_compute_tokens == -1 and p.of(SourceFailed) == []


def test_less_than_a_block_is_computed_here() -> None:
    p = Pulling("d1", "p1", holder="d1")
    assert p.call
    p.accepts(end_tokens=96, cached_tokens=96)
    p.reserved()
    p.says(p.piece(0, 0, 96))
    p.copied(1)
    p.says(FetchOfferedAll())
    assert p.of(OpenFetch) == []
    assert p.last(PullClosed).num_computed_tokens == 96


def test_a_holder_that_has_no_more_than_we_do_is_no_failure() -> None:
    p = Pulling("d1", "p1", holder="d1", cached=32)
    assert p.call.start == 32
    p.accepts(end_tokens=32, cached_tokens=32)
    assert len(p.of(CloseFetch)) == 1 and p.of(SourceFailed) == []
    assert p.last(OpenFetch).source.worker_id == "p1"


def test_a_source_that_changes_its_role_is_no_failure_and_the_next_one_goes_on() -> None:
    p = Pulling("p1", "p2").to_copying()
    p.copied(1)
    p.says(FetchMoved())
    assert p.of(SourceFailed) == []
    p.copied(2, ok=False)
    assert p.last(OpenFetch).open.start == 48
