"""Workers that change their role under load: every text is the undisturbed one, and nothing is left behind."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from cluster.sim.cluster import SimCluster
from cluster.sim.workload import cluster, fake, mixed_requests, submit, tokens
from tests.cluster.sim.switching import ask, switch


def running(num: int, *workers: str, max_tokens: int = 300, **options: Any) -> SimCluster:
    """Requests that run, spread over the decode workers."""
    sim = cluster(*workers, engine=fake(**options))
    rng = Random(4)
    for i in range(num):
        temperature = 0.8 if i % 2 else 0.0
        sim.router.submit(
            submit(f"r{i}", tokens(rng, 40 + 17 * i), max_tokens=max_tokens, temperature=temperature, seed=i)
        )
    assert sim.run_while(lambda: any(len(r.outputs.get(0, ())) < 5 for r in sim.results.values()), limit_s=10)
    return sim


def check_texts(sim: SimCluster) -> None:
    assert sim.drain(limit_s=60)
    for name, result in sim.results.items():
        assert result.code is None and result.outputs == sim.oracle(result.submit), name
    sim.run_for(1.0)
    assert sim.leaks() == []


def test_running_requests_move_to_the_other_decode_worker_and_keep_their_text() -> None:
    sim = running(8, "prefill-1", "decode-1", "decode-2")
    mine = sim.workers["decode-1"].decode.num_live
    reply = switch(sim, "decode-1", "prefill")
    assert (reply.outcome, reply.moved, reply.finished_in_place) == ("switched", mine, 0) and mine >= 2
    assert (reply.info.role, reply.info.state, reply.info.epoch) == ("prefill", "ready", 5)
    assert sim.workers["decode-2"].decode.num_live == 8
    sim.run_for(0.5)
    pulled = [d for d in sim.router.decisions if d.attempt == 2]
    assert len(pulled) == mine
    assert sim.workers["decode-1"].prefill.counters["accepted"] == mine, "their KV came from where they were"
    check_texts(sim)


def test_what_is_nearly_done_finishes_where_it_is() -> None:
    sim = running(4, "prefill-1", "decode-1", "decode-2", max_tokens=12)
    reply = switch(sim, "decode-1", "prefill")
    assert reply.outcome == "switched" and reply.moved == 0 and reply.finished_in_place >= 1
    check_texts(sim)


def test_a_moved_request_is_pinned_until_the_next_attempt_speaks() -> None:
    sim = running(4, "prefill-1", "decode-1", "decode-2")
    sim.faults.copy_s = lambda *_: 0.2
    reply = switch(sim, "decode-1", "prefill")
    assert reply.moved >= 1
    assert sim.num_held_blocks("decode-1")[0] > 0
    sim.run_for(2.0)
    assert sim.num_held_blocks("decode-1") == (0, 0), "released"
    check_texts(sim)


def test_a_prefill_worker_hands_long_prompts_on_and_receivers_keep_what_they_have() -> None:
    sim = cluster("prefill-1", "prefill-2", "decode-1", engine=fake(ms_per_token=0.5, max_step_ms=20.0))
    request = submit("long", tokens(Random(1), 800), max_tokens=8)
    sim.router.submit(request)
    source = next(d for d in sim.router.decisions).sources[0]
    assert sim.run_while(lambda: not any(r.reservation for r in sim.workers["decode-1"].decode.status()), limit_s=5)
    sim.run_for(0.1)
    reply = switch(sim, source, "decode")
    assert reply.outcome == "switched" and sim.workers[source].prefill.counters["sent_on"] == 1
    check_texts(sim)
    assert sim.workers["decode-1"].decode.counters["sources_moved"] == 1
    assert sim.router.dispatcher.counters["sources_broken"] == 0, "no failure of the pair"


def test_there_and_back_again_under_load_keeps_every_text_and_the_prefix_cache() -> None:
    sim = cluster("prefill-1", "prefill-2", "decode-1", "decode-2", engine=fake(num_blocks=512))
    for request in mixed_requests(Random(3), 60):
        sim.submit(request, at=sim.clock.now + Random(request.request_id).random() * 2.0)
    hits = sim.workers["prefill-2"].core.load().prefix_cache_hits
    for _ in range(3):
        sim.run_for(0.25)
        assert switch(sim, "prefill-2", "decode").outcome == "switched"
        assert switch(sim, "decode-1", "prefill").outcome == "switched"
        sim.run_for(0.25)
        assert switch(sim, "decode-1", "decode").outcome == "switched"
        assert switch(sim, "prefill-2", "prefill").outcome == "switched"
    check_texts(sim)
    assert sim.workers["prefill-2"].core.load().prefix_cache_hits > hits
    assert sim.workers["prefill-2"].info.epoch == 1 + 6 * 4


def test_a_drained_worker_has_nothing_and_comes_back() -> None:
    sim = running(6, "prefill-1", "decode-1", "decode-2")
    reply = switch(sim, "decode-1", None)
    assert (reply.outcome, reply.info.state, reply.info.role) == ("drained", "draining", "decode")
    sim.run_for(0.5)
    assert sim.workers["decode-1"].decode.num_live == 0
    again = switch(sim, "decode-1", "decode")
    assert (again.outcome, again.info.state) == ("switched", "ready")
    sim.router.submit(submit("new", tokens(Random(9), 30)))
    check_texts(sim)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"incarnation": "0" * 32}, "not 0000"),
        ({"expected_epoch": 7}, "epoch is 1"),
        ({"role": "decode"}, "already"),
    ],
)
def test_a_switch_for_another_worker_epoch_or_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    sim = cluster("prefill-1", "decode-1", "decode-2")
    reply = switch(sim, "decode-1", **{"role": "prefill", **changes})
    assert reply.outcome == "refused" and words in reply.reason
    assert sim.workers["decode-1"].info.epoch == 1


def test_a_second_switch_meanwhile_is_refused() -> None:
    sim = running(4, "prefill-1", "decode-1", "decode-2")
    first = ask(sim, "decode-1", "prefill")
    second = switch(sim, "decode-1", "prefill")
    assert second.outcome == "refused" and "draining" in second.reason
    assert sim.run_while(lambda: not first.replies, limit_s=5) and first.replies[0].outcome == "switched"
    check_texts(sim)


def test_a_refused_switch_counts_nothing_and_spoils_no_count() -> None:
    sim = running(8, "prefill-1", "decode-1", "decode-2")
    mine = sim.workers["decode-1"].decode.num_live
    first = ask(sim, "decode-1", "prefill")
    assert sim.run_while(lambda: sim.workers["decode-1"].info.state != "verifying", limit_s=5)
    second = ask(sim, "decode-1", "prefill")
    sim.run_for(0.001)
    assert [(reply.outcome, reply.moved) for reply in second.replies] == [("refused", 0)]
    assert sim.run_while(lambda: not first.replies, limit_s=5)
    assert first.replies[0].moved == mine >= 2
    check_texts(sim)


def test_a_wrong_canary_brings_the_old_role_back() -> None:
    sim = running(6, "prefill-1", "decode-1", "decode-2")
    machine = sim.workers["decode-1"].machine
    machine.role._known["prefill"] = (1, 2, 3)
    reply = switch(sim, "decode-1", "prefill")
    assert reply.outcome == "rolled_back" and "canary" in reply.reason
    assert (reply.info.role, reply.info.state, reply.info.epoch) == ("decode", "ready", 5)
    assert sim.workers["decode-1"].core.scheduler.role == "decode"
    sim.router.submit(submit("new", tokens(Random(9), 30)))
    check_texts(sim)


def test_a_switch_that_takes_too_long_is_rolled_back_and_what_moved_stays_moved() -> None:
    sim = running(4, "prefill-1", "decode-1", "decode-2")
    sim.hang_worker("decode-1")
    sim.run_for(0.1)
    reply = switch(sim, "decode-1", "prefill", timeout_ms=500)
    assert (reply.outcome, reply.info.role, reply.info.epoch) == ("rolled_back", "decode", 3)
    assert "draining" in reply.reason


def test_a_client_that_leaves_during_the_move_frees_both_workers() -> None:
    sim = running(4, "prefill-1", "decode-1", "decode-2")
    sim.faults.copy_s = lambda *_: 0.3
    switch(sim, "decode-1", "prefill")
    for name in sim.results:
        sim.router.cancel(name)
    sim.run_for(1.0)
    assert sim.leaks() == []


def test_an_old_worker_that_dies_while_it_is_pulled_from_costs_only_time() -> None:
    sim = running(6, "prefill-1", "decode-1", "decode-2")
    sim.faults.copy_s = lambda *_: 0.3
    assert switch(sim, "decode-1", "prefill").moved >= 1
    sim.kill_worker("decode-1", restart_after_s=1.0)
    check_texts(sim)


def test_a_worker_in_mid_switch_refuses_what_was_sent_under_the_old_epoch() -> None:
    sim = cluster("prefill-1", "decode-1", "decode-2")
    ask(sim, "decode-1", "prefill")
    for i in range(6):
        sim.router.submit(submit(f"r{i}", tokens(Random(i), 60)))
    check_texts(sim)
    assert sim.router.dispatcher.counters["attempts_refused"] >= 1
