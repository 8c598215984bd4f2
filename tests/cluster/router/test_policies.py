"""What each policy prefers, and what none may ever do. (test_dispatch_policies.py has the two plain ones.)"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster.router.policies import POLICY_NAMES, Placement, WorkerView, policy_named
from cluster.router.views import RequestView
from tests.cluster.router.views_for_tests import rate, request, worker


def place(
    name: str, decode: list[WorkerView], prefill: list[WorkerView], seed: int = 0, asked: RequestView | None = None
) -> Placement:
    return policy_named(name).place(asked or request(), decode, prefill, Random(seed))


workers = st.builds(
    worker,
    st.just("w"),
    factor=st.floats(0.5, 10.0),
    max_num_seqs=st.integers(1, 16),
    num_sequences=st.integers(0, 20),
    queued_tokens=st.integers(0, 10_000),
    context_tokens=st.integers(0, 100_000),
    backlog_ms=st.floats(0, 1e5),
    cached_tokens=st.integers(0, 4096),
    num_free_blocks=st.none() | st.integers(0, 1000),
    scales=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)


def named(views: list[WorkerView], letter: str) -> list[WorkerView]:
    return [replace(view, info=replace(view.info, worker_id=f"{letter}{i}")) for i, view in enumerate(views)]


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=40)
@given(
    decode=st.lists(workers, min_size=1, max_size=5),
    prefill=st.lists(workers, max_size=5),
    avoid=st.lists(st.integers(0, 4), max_size=3),
    num_tokens=st.integers(1, 9000),
    choices=st.integers(1, 4),
    turn=st.integers(0, 100),
    seed=st.integers(0, 1000),
)
def test_a_placement_names_workers_that_were_offered(
    name: str,
    decode: list[WorkerView],
    prefill: list[WorkerView],
    avoid: list[int],
    num_tokens: int,
    choices: int,
    turn: int,
    seed: int,
) -> None:
    avoided = frozenset(f"p{i}" for i in avoid)
    decode = [replace(view, avoid=avoided) for view in named(decode, "d")]
    prefill = named(prefill, "p")
    asked = request(num_tokens, num_choices=choices, turn=turn)
    placement = place(name, decode, prefill, seed, asked)
    assert placement.decode in {view.info.worker_id for view in decode}
    offered = {view.info.worker_id for view in prefill}
    assert set(placement.sources) <= offered and len(set(placement.sources)) == len(placement.sources)
    assert not (placement.alone and placement.sources) and not (placement.alone and not prefill)
    if placement.sources and offered - avoided:
        assert placement.sources[0] not in avoided, "one that failed this decode worker comes last"
    assert placement.why and place(name, decode, prefill, seed, asked) == placement


def test_power_of_two_takes_the_better_of_two_and_spreads() -> None:
    decode = [worker("d1", num_sequences=1), worker("d2", num_sequences=2), worker("d3", num_sequences=8)]
    prefill = [worker("p1", queued_tokens=10), worker("p2", queued_tokens=20), worker("p3", queued_tokens=900)]
    placements = [place("power-of-two", decode, prefill, seed) for seed in range(200)]
    chosen = Counter(placement.decode for placement in placements)
    assert chosen["d1"] > chosen["d2"] > 40 and chosen["d3"] == 0
    assert not any(placement.sources[0] == "p3" for placement in placements)
    assert all(len(placement.sources) == 3 for placement in placements)


def test_power_of_two_with_one_worker() -> None:
    assert place("power-of-two", [worker("d1")], [worker("p1")]).sources == ("p1",)


def test_prefix_aware_goes_where_the_prefix_is() -> None:
    decode = [worker("d1"), worker("d2", cached_tokens=500, num_sequences=1)]
    prefill = [worker("p1"), worker("p2", cached_tokens=600, queued_tokens=100), worker("p3", queued_tokens=50)]
    placement = place("prefix-aware", decode, prefill)
    assert placement.decode == "d2" and placement.sources == ("p2", "p1", "p3")
    assert "holds 500 of 1001" in placement.why


def test_prefix_aware_does_not_crowd_one_worker() -> None:
    decode = [worker("d1"), worker("d2", cached_tokens=500, num_sequences=7)]
    prefill = [worker("p1"), worker("p2", cached_tokens=600, queued_tokens=5000)]
    placement = place("prefix-aware", decode, prefill)
    assert placement.decode == "d1" and placement.sources[0] == "p1"


def test_predicted_knows_that_a_slow_machine_with_a_short_queue_is_still_slow() -> None:
    decode = [worker("d1", num_sequences=4, factor=1.0), worker("d2", factor=5.0)]
    prefill = [
        worker("p1", queued_tokens=900, backlog_ms=100.0, rates=rate("d1")),
        worker("p2", factor=5.0, rates=rate("d1")),
    ]
    placement = place("predicted", decode, prefill)
    assert placement.decode == "d1" and placement.sources == ("p1", "p2")
    assert placement.considered[0].cost_ms <= min(one.cost_ms for one in placement.considered)


def test_predicted_leaves_a_fast_worker_that_is_too_busy() -> None:
    decode = [worker("d1", num_sequences=14, max_num_seqs=8), worker("d2", factor=1.5)]
    assert place("predicted", decode, [worker("p1")]).decode == "d2"


def test_of_many_equal_decode_workers_each_is_chosen_and_the_one_that_holds_the_prompt_is_seen() -> None:
    decode = [worker(f"d{i}") for i in range(12)]
    chosen = {place("predicted", decode, [worker("p1")], seed).decode for seed in range(120)}
    assert len(chosen) == 12
    decode[7] = worker("d7", cached_tokens=992, num_sequences=1)
    assert place("predicted", decode, [worker("p1")]).decode == "d7"


def test_a_short_prompt_is_computed_where_it_is_decoded() -> None:
    prefill = [worker("p1", backlog_ms=5.0, rates=rate("d1"))]
    short = place("predicted", [worker("d1")], prefill, asked=request(20))
    assert short.alone and short.sources == ()


def test_what_is_cached_at_the_decode_worker_moves_the_break_even() -> None:
    def alone(cached: int) -> bool:
        decode = [worker("d1", num_sequences=4, cached_tokens=cached)]
        return place("predicted", decode, [worker("p1", rates=rate("d1"))], asked=request(1001)).alone

    assert not alone(0) and alone(990)


def test_behind_a_full_batch_only_what_the_decode_worker_holds_more_of_is_computed_there() -> None:
    """One short prompt looks cheap there beside the queue of the source; with each of many, all rows get slower."""
    prefill = [worker("p1", backlog_ms=9000.0, cached_tokens=16, rates=rate("d1"))]

    def alone(num_sequences: int, cached: int) -> bool:
        decode = [worker("d1", max_num_seqs=8, num_sequences=num_sequences, cached_tokens=cached)]
        return place("predicted", decode, prefill, asked=request(40)).alone

    assert alone(7, 0) and alone(9, 32)
    assert not alone(8, 0) and not alone(9, 16)


def test_running_requests_are_not_held_up_for_a_long_prompt() -> None:
    prefill = [worker("p1", rates=rate("d1"))]
    idle, busy = [worker("d1")], [worker("d1", num_sequences=6)]
    assert place("predicted", idle, prefill, asked=request(4000)).alone
    assert not place("predicted", busy, prefill, asked=request(4000)).alone


def test_a_router_that_requires_prefill_workers_leaves_no_decode_worker_alone() -> None:
    asked = replace(request(20), may_be_alone=False)
    placement = place("predicted", [worker("d1")], [worker("p1", rates=rate("d1"))], asked=asked)
    assert placement.sources == ("p1",) and not placement.alone
    failed = [worker("d1", avoid=frozenset({"p1"}))]
    assert place("predicted", failed, [worker("p1")], asked=asked).decode == "d1"
    assert place("predicted", [worker("d1")], [], asked=asked).decode == "d1"


def test_without_prefill_workers_alone_is_no_choice() -> None:
    placement = place("predicted", [worker("d1")], [])
    assert placement.sources == () and not placement.alone


def test_a_source_that_fails_this_decode_worker_is_left_to_others() -> None:
    decode = [worker("d1", num_sequences=6, avoid=frozenset({"p1"}))]
    prefill = [worker("p1", rates=rate("d1")), worker("p2", backlog_ms=50.0, rates=rate("d1"))]
    assert place("predicted", decode, prefill).sources == ("p2", "p1")
