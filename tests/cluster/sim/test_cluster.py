"""The whole cluster on a virtual clock: determinism, texts against the oracle, nothing held after the drain."""

from __future__ import annotations

from random import Random

import pytest

from cluster.sim.cluster import SimCluster
from cluster.sim.workload import cluster, fake, mixed_requests, submit, tokens


def run_200_requests(seed: int, num_requests: int = 200) -> SimCluster:
    """200 mixed requests within 2 s on one prefill and one decode worker with tight pools."""
    rng = Random(seed)
    sim = cluster(engine=fake(num_blocks=56, max_num_seqs=6, stop_probability=0.02), seed=seed)
    for request in mixed_requests(rng, num_requests):
        sim.submit(request, at=sim.clock.now + rng.random() * 2)
    assert sim.drain(limit_s=300)
    sim.run_for(1.0)
    return sim


@pytest.fixture(scope="module")
def sim() -> SimCluster:
    return run_200_requests(seed=3)


def test_the_same_seed_gives_the_same_event_log(sim: SimCluster) -> None:
    assert run_200_requests(seed=3).journal.lines() == sim.journal.lines()


def test_another_seed_gives_another_event_log() -> None:
    assert run_200_requests(4, 10).journal.lines() != run_200_requests(5, 10).journal.lines()


def test_every_text_equals_the_oracles(sim: SimCluster) -> None:
    assert len(sim.results) == 200
    for result in sim.results.values():
        assert result.code is None
        assert result.outputs == sim.oracle(result.submit)


def test_the_workload_reaches_what_it_is_meant_to(sim: SimCluster) -> None:
    decode, prefill = sim.workers["decode-1"], sim.workers["prefill-1"]
    assert decode.decode.counters["no_space"] > 0
    assert decode.core.load().num_preemptions > 0
    assert decode.decode.counters["prefill-decode"] > 30
    assert decode.core.load().prefix_cache_hits > 0 and prefill.core.load().prefix_cache_hits > 0
    assert any(len(result.outputs) == 2 for result in sim.results.values())


def test_nothing_is_held_after_the_drain(sim: SimCluster) -> None:
    assert sim.leaks() == []


def test_a_source_on_another_host_sends_the_bytes() -> None:
    sim = cluster(hosts={"prefill-1": "host-2"})
    for i in range(3):
        sim.router.submit(submit(f"request-{i}", tokens(Random(i), 200)))
    assert sim.drain(limit_s=10)
    sim.run_for(1.0)
    assert sim.workers["decode-1"].decode.counters["local_unavailable"] >= 1
    for result in sim.results.values():
        assert result.outputs == sim.oracle(result.submit) and result.paths == ["prefill-decode"]
    assert sim.leaks() == []


def test_choices_share_one_pulled_prompt() -> None:
    sim = cluster()
    request = submit("request", tokens(Random(1), 330), temperature=0.8, num_choices=4)
    sim.router.submit(request)
    assert sim.drain(limit_s=10)
    result = sim.results["request"]
    assert result.outputs == sim.oracle(request) and len({tuple(out) for out in result.outputs.values()}) == 4
    assert sim.workers["prefill-1"].prefill.counters["accepted"] == 1
    prompt_tokens = sim.workers["decode-1"].core.load().prefix_cache_hits
    assert prompt_tokens >= 3 * 320, "the other choices hit the blocks of the first"


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt() -> None:
    sim = cluster("decode-1")
    request = submit("request", tokens(Random(1), 100))
    sim.router.submit(request)
    assert sim.drain(limit_s=10)
    assert sim.results["request"].outputs == sim.oracle(request)
    assert sim.results["request"].paths == ["decode-only"]
    assert sim.router.dispatcher.counters["no_prefill_worker"] == 1


def test_a_request_waits_for_a_decode_worker_that_is_coming_back() -> None:
    sim = cluster()
    sim.kill_worker("decode-1", restart_after_s=3.0)
    sim.run_for(0.1)
    request = submit("request", tokens(Random(1), 100))
    sim.router.submit(request)
    assert sim.drain(limit_s=10)
    assert sim.results["request"].outputs == sim.oracle(request)


def test_a_hung_engine_is_given_up() -> None:
    sim = cluster("prefill-1", "decode-1", "decode-2")
    sim.router.submit(submit("first", tokens(Random(1), 100), max_tokens=400))
    assert sim.run_while(lambda: not sim.results["first"].outputs, limit_s=5)
    worker_id = next(name for name in ("decode-1", "decode-2") if sim.workers[name].decode.num_live)
    sim.hang_worker(worker_id)
    assert sim.drain(limit_s=25)
    assert sim.results["first"].outputs == sim.oracle(sim.results["first"].submit), "taken over by the other one"
    assert sim.router.dispatcher.counters["hung_workers"] == 1
    sim.run_for(1.0)
    for i in range(4):
        sim.router.submit(submit(f"next-{i}", tokens(Random(i), 50)))
    assert sim.drain(limit_s=5)
    assert all(result.code is None for name, result in sim.results.items() if name.startswith("next"))
