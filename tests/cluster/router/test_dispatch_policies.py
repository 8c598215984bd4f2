"""Policies: pure, and deterministic given their random numbers."""

from __future__ import annotations

from random import Random

import pytest

from cluster.router.policies import POLICY_NAMES, RequestView, WorkerView, policy_named
from cluster.types import WorkerInfo


def view(worker_id: str, *, sequences: int = 0, queued: int = 0, max_num_seqs: int = 8) -> WorkerView:
    info = WorkerInfo(
        worker_id=worker_id,
        incarnation=worker_id,
        epoch=1,
        role="decode",
        state="ready",
        address="a:1",
        max_num_seqs=max_num_seqs,
    )
    return WorkerView(info=info, num_sequences=sequences, queued_tokens=queued)


def request(turn: int = 0) -> RequestView:
    return RequestView(num_tokens=100, num_choices=1, turn=turn)


def test_round_robin_takes_turns() -> None:
    policy = policy_named("round-robin")
    decode, prefill = [view("d1", sequences=9), view("d2")], [view("p1"), view("p2"), view("p3")]
    placements = [policy.place(request(turn), decode, prefill, Random(0)) for turn in range(4)]
    assert [placement.decode for placement in placements] == ["d1", "d2", "d1", "d2"]
    assert [placement.sources[0] for placement in placements] == ["p1", "p2", "p3", "p1"]
    assert placements[1].sources == ("p2", "p3", "p1")


def test_least_loaded_takes_the_smallest_share_and_the_shortest_queue() -> None:
    decode = [view("d1", sequences=3, max_num_seqs=4), view("d2", sequences=5, max_num_seqs=32)]
    prefill = [view("p1", queued=900), view("p2", queued=10), view("p3", queued=500)]
    placement = policy_named("least-loaded").place(request(), decode, prefill, Random(0))
    assert placement.decode == "d2" and placement.sources == ("p2", "p3", "p1")


def test_ties_are_broken_by_the_given_random_numbers() -> None:
    policy = policy_named("least-loaded")
    decode, prefill = [view("d1"), view("d2")], [view("p1"), view("p2")]
    chosen = {policy.place(request(), decode, prefill, Random(seed)) for seed in range(20)}
    assert len(chosen) == 4
    assert policy.place(request(), decode, prefill, Random(5)) == policy.place(request(), decode, prefill, Random(5))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_without_sources_there_are_none(name: str) -> None:
    assert policy_named(name).place(request(3), [view("d1")], [], Random(0)).sources == ()


def test_an_unknown_policy_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'fastest'"):
        policy_named("fastest")
