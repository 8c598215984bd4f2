"""What a decode worker reports of a source to the router, and what a source learns of its receivers."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.types import FetchBusy, FetchMoved, FetchRefused, FetchReply, FetchTaken, SourceFailed
from cluster.worker.effects import SendEntry
from tests.cluster.worker.test_decode_pull import Pulling, source
from tests.cluster.worker.test_prefill import accepted_machine, events, served


def reported(p: Pulling) -> list[tuple[str, str]]:
    """(source, reason) of what the last effects tell the router."""
    found = [e.entry for e in p.effects if isinstance(e, SendEntry) and isinstance(e.entry, SourceFailed)]
    assert all((entry.request_id, entry.attempt) == ("r", 1) for entry in found)
    assert all(entry.source_incarnation == source(entry.source_id).incarnation for entry in found)
    return [(entry.source_id, entry.reason) for entry in found]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (FetchRefused(code="identity", message=""), [("p1", "refused")]),
        (FetchRefused(code="transport", message=""), [("p1", "refused")]),
        (FetchRefused(code="capacity", message=""), []),
        (FetchRefused(code="deadline", message=""), []),
        (FetchBusy(retry_ms=5), []),
        (FetchMoved(to=source("p3")), []),
    ],
    ids=["identity", "transport", "too long for it", "too late", "busy", "moved"],
)
def test_a_pair_is_reported_a_prompt_or_a_load_is_not(reply: FetchReply, expected: list[Any]) -> None:
    p = Pulling("p1", "p2")
    p.says(reply)
    assert reported(p) == expected


def test_a_broken_call_is_reported() -> None:
    p = Pulling("p1", "p2")
    p.effects = p.machine.on_fetch_broken(0.1, p.call.call_id)
    assert reported(p) == [("p1", "broken")]


def test_silence_is_reported() -> None:
    p = Pulling("p1", "p2")
    assert p.call
    found: list[tuple[str, str]] = []
    while not found:
        at = p.machine.next_timer()
        assert at is not None and at < 3.0
        p.effects = p.machine.on_timer(at)
        found = reported(p)
    assert found == [("p1", "silent")]


def test_spoiled_bytes_and_broken_fences_are_reported() -> None:
    p = Pulling("p1", "p2").to_copying()
    p.copied(1, ok=False)
    assert reported(p) == [("p1", "spoiled")]
    p = Pulling("p1", "p2")
    p.accepts()
    p.reserved()
    p.says(p.piece(0, 0, 48, source_incarnation="another"))
    assert reported(p) == [("p1", "protocol")]


def test_an_aborted_request_reports_nobody() -> None:
    p = Pulling("p1", "p2").to_copying()
    p.effects = p.machine.on_link_broken(0.2, "link")
    assert reported(p) == []


def test_a_source_times_pieces_that_travel_alone() -> None:
    m = accepted_machine()
    m.on_events(1.0, events(served(0, 48)))
    m.on_events(1.001, events(served(3, 96)))  # while the first is on its way: not timed
    m.on_taken(1.010, FetchTaken(call_id="call", piece_index=0))
    m.on_taken(1.900, FetchTaken(call_id="call", piece_index=1))
    (rate,) = m.peers.rates()
    assert rate.transport == "local"
    layout = m._layout
    assert rate.latency_ms + 48 * layout.token_bytes / (rate.gb_per_s * 1e6) == pytest.approx(10.0, rel=0.01)
