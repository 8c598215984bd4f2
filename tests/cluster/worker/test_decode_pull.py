"""The decode machine's pulls: sources, fences, reservations, copies, quarantine."""

from __future__ import annotations

import pytest

from cluster.types import (
    AbortRequest,
    FetchBusy,
    FetchMoved,
    FetchNews,
    FetchOfferedAll,
    FetchRefused,
    FetchReply,
    Tokens,
)
from cluster.worker.effects import CloseFetch, OpenFetch, SendTaken, StartCopy, ToEngine
from engine.messages import (
    Abort,
    Add,
    Commit,
    NewTokens,
    NoSpace,
    Probe,
    Probed,
    PullClosed,
    Reserve,
    StepEvents,
)
from tests.cluster.worker.pulling import INFO, TABLE, Pulling, source


def test_the_call_asks_for_what_is_missing_but_the_last_token() -> None:
    p = Pulling(cached=32)
    assert (p.call.start, p.call.end, p.call.kv_fingerprint) == (32, 104, INFO.kv_fingerprint)
    assert p.call.source_incarnation == source().incarnation and p.call.receiver_incarnation == INFO.incarnation


def test_blocks_are_reserved_when_the_source_starts_not_while_it_queues() -> None:
    p = Pulling()
    assert p.call
    p.accepts(queue_ms=300)
    assert p.of(Reserve) == []
    p.says(FetchNews(computed_tokens=0, queue_ms=120))
    assert p.of(Reserve) == []
    p.says(FetchNews(computed_tokens=0, queue_ms=0))
    assert p.last(Reserve).add.request_id == p.engine_id


def test_news_before_the_acceptance_keep_a_source_alive() -> None:
    p = Pulling()
    assert p.call
    p.says(FetchNews(computed_tokens=0, queue_ms=1), now=1.9)
    p.effects = p.machine.on_timer(2.1)
    assert p.of(CloseFetch) == []
    p.accepts()
    assert p.of(Reserve)


def test_pieces_wait_for_the_reservation_and_are_committed_in_order() -> None:
    p = Pulling()
    assert p.call
    p.accepts()
    p.says(p.piece(0, 0, 48))
    assert p.of(StartCopy) == []
    p.reserved()
    assert p.last(StartCopy).target_block_ids == TABLE[:3]
    p.says(p.piece(1, 3, 104))
    assert p.last(StartCopy).target_block_ids == TABLE[3:7]
    p.copied(2)
    assert p.effects == []
    p.copied(1)
    commits = [(c.first_block, c.checksums) for c in p.of(Commit)]
    assert commits == [(0, (100, 101, 102)), (3, (103, 104, 105))], "the partial last block is not committed"
    assert p.last(SendTaken).taken.piece_index == 1
    assert p.last(PullClosed).num_computed_tokens == 104 and p.of(CloseFetch)


def test_further_choices_are_added_after_the_pull() -> None:
    p = Pulling(choices=3).to_copying()
    assert p.of(Add) == []
    p.copied(1)
    p.copied(2)
    kinds = [type(e.command) for e in p.effects if isinstance(e, ToEngine)]
    assert kinds.index(PullClosed) < kinds.index(Add) and kinds.count(Add) == 2
    token = NewTokens(request_id=p.engine_id, first_position=0, token_ids=(9,), num_cached_tokens=0)
    p.effects = p.machine.on_events(0.1, StepEvents(step=2, num_tokens=1, tokens=(token,)))
    assert p.last(Tokens).path == "prefill-decode"


def test_the_tail_of_a_grown_match_is_not_copied_again() -> None:
    p = Pulling()
    assert p.call
    p.accepts()
    p.reserved(cached=32)
    p.says(p.piece(0, 0, 48))
    assert p.last(StartCopy).target_block_ids == (-1, -1, TABLE[2])
    p.copied(1)
    assert [(c.first_block, c.checksums) for c in p.of(Commit)] == [(2, (102,))]


def test_a_piece_that_is_held_already_needs_no_copy() -> None:
    p = Pulling()
    assert p.call
    p.accepts()
    p.reserved(cached=48)
    p.says(p.piece(0, 0, 48))
    assert p.of(StartCopy) == [] and p.of(Commit) == [] and p.last(SendTaken).taken.piece_index == 0


def test_a_shrunk_match_restarts_the_call() -> None:
    p = Pulling(cached=48)
    old = p.call.call_id
    p.accepts()
    p.reserved(cached=16)
    assert p.last(CloseFetch).call_id == old
    assert p.call.start == 16 and p.call.call_id != old and p.machine.counters["calls_restarted"] == 1


@pytest.mark.parametrize("reply", [FetchBusy(retry_ms=5), FetchRefused(code="identity", message=""), FetchOfferedAll()])
def test_a_source_that_turns_us_away_is_followed_by_the_next(reply: FetchReply) -> None:
    p = Pulling("p1", "p2")
    assert p.call
    p.accepts() if isinstance(reply, FetchOfferedAll) else None
    if isinstance(reply, FetchOfferedAll):
        p.reserved()
    p.says(reply)
    assert p.call.source_incarnation == source("p2").incarnation


def test_without_another_source_the_prompt_is_computed_here() -> None:
    p = Pulling()
    assert p.call
    p.says(FetchBusy(retry_ms=5))
    assert p.last(Add).request_id == p.engine_id and p.of(CloseFetch)
    assert p.machine.counters["computed_here_after_all"] == 1


def test_moved_is_followed_but_not_for_ever() -> None:
    p = Pulling()
    seen = [p.call.source_incarnation]
    for name in ("p2", "p3", "p4"):
        p.says(FetchMoved(to=source(name)))
        if p.of(OpenFetch):
            seen.append(p.call.source_incarnation)
    assert seen == [source(name).incarnation for name in ("p1", "p2", "p3")] and p.of(Add)


def test_a_piece_that_fails_its_fences_ends_the_source() -> None:
    p = Pulling("p1", "p2")
    assert p.call
    p.accepts()
    p.reserved()
    p.says(p.piece(0, 0, 48, source_incarnation="another"))
    assert p.of(StartCopy) == [] and p.of(CloseFetch)
    assert p.call.source_incarnation == source("p2").incarnation
    assert p.machine.counters["source_protocol_errors"] == 1


def test_a_spoiled_copy_keeps_what_is_whole_before_it() -> None:
    p = Pulling("p1", "p2").to_copying()
    p.copied(1)
    p.copied(2, ok=False)
    assert p.of(CloseFetch) and p.call.source_incarnation == source("p2").incarnation and p.call.start == 48


def test_a_spoiled_copy_waits_for_its_neighbours_before_the_next_source() -> None:
    """The copy that still runs may write blocks that the next source's copies would write too."""
    p = Pulling("p1", "p2").to_copying()
    p.copied(1, ok=False)
    assert p.of(CloseFetch) and p.of(OpenFetch) == []
    p.copied(2)
    assert p.of(Commit) == [] and p.of(OpenFetch) and p.call.start == 0


def test_a_broken_source_leaves_what_landed() -> None:
    p = Pulling().to_copying()
    p.copied(1)
    p.effects = p.machine.on_fetch_broken(0.1, p.call.call_id)
    assert p.of(PullClosed) == []
    p.copied(2, ok=False)
    assert p.last(PullClosed).num_computed_tokens == 48
    assert p.machine.counters["prefill-decode+local"] == 1


def test_a_silent_source_is_left_after_2_s() -> None:
    p = Pulling("p1", "p2")
    assert p.call
    now = 0.0
    while not p.of(CloseFetch):
        at = p.machine.next_timer()
        assert at is not None
        now, p.effects = at, p.machine.on_timer(at)
    assert now == 2.0 and p.call.source_incarnation == source("p2").incarnation


def test_a_source_that_has_offered_all_may_be_silent() -> None:
    p = Pulling().to_copying()
    p.says(FetchOfferedAll())
    now = 0.0
    while now < 5.0:
        now = min(5.0, p.machine.next_timer() or 5.0)
        p.effects = p.machine.on_timer(now)
        assert p.of(CloseFetch) == []


def test_a_memory_that_cannot_be_opened_is_fetched_over_grpc_from_then_on() -> None:
    p = Pulling()
    first = p.call
    assert first.transports == ("local", "grpc")
    p.effects = p.machine.on_local_unavailable(0.0, first.call_id)
    assert p.call.source_incarnation == first.source_incarnation and p.call.transports == ("grpc",)
    p.dispatch("other")
    p.engine(Probed(request_id=p.last(Probe).request_id, num_cached_tokens=0))
    assert p.call.transports == ("grpc",)


def test_an_abort_while_a_copy_runs_closes_the_pull_only_after_it() -> None:
    p = Pulling().to_copying()
    p.copied(1)
    p.effects = p.machine.on_abort(0.1, "link", AbortRequest(request_id="r", attempt=1))
    assert p.of(Abort) and p.of(CloseFetch) and p.of(PullClosed) == []
    assert p.machine.num_live == 0
    p.copied(2)
    assert p.last(PullClosed).num_computed_tokens == 0 and p.of(Commit) == []


def test_an_abort_without_a_running_copy_closes_the_pull_at_once() -> None:
    p = Pulling()
    assert p.call
    p.accepts()
    p.reserved()
    p.effects = p.machine.on_abort(0.1, "link", AbortRequest(request_id="r", attempt=1))
    kinds = [type(e.command) for e in p.effects if isinstance(e, ToEngine)]
    assert kinds == [Abort, PullClosed] and p.machine.next_timer() is None


def test_copies_that_stay_out_cost_their_blocks_and_not_the_request() -> None:
    p = Pulling().to_copying()
    p.effects = p.machine.on_fetch_broken(0.0, p.call.call_id)
    p.effects = p.machine.on_timer(2.0)
    assert p.last(Abort).request_id == p.engine_id and p.of(PullClosed) == []
    assert p.last(Add).request_id != p.engine_id, "it starts anew under another id"
    p.copied(1)
    assert p.of(PullClosed) == []
    p.copied(2)
    assert p.last(PullClosed).request_id == p.engine_id


def test_never_enough_space_lets_the_rank_say_why() -> None:
    p = Pulling()
    assert p.call
    p.accepts()
    p.engine(NoSpace(request_id=p.engine_id, never=True))
    assert p.last(Add).request_id == p.engine_id and p.of(CloseFetch)


def test_requests_get_space_in_their_order() -> None:
    p = Pulling()
    assert p.call
    p.accepts()
    first = p.engine_id
    p.engine(NoSpace(request_id=first))
    p.dispatch("second")
    second = p.last(Probe).request_id
    p.engine(Probed(request_id=second, num_cached_tokens=0))
    assert p.call
    p.accepts()
    assert p.of(Reserve) == [], "the first one has not got its blocks yet"
    p.engine(free=6)
    assert p.of(Reserve) == []
    p.engine(free=7)
    assert p.last(Reserve).add.request_id == first
    p.engine_id = first
    p.reserved()
    assert p.last(Reserve).add.request_id == second
