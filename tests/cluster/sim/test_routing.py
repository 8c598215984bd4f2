"""Routing in a whole cluster on the virtual clock: what workers say of themselves decides, and the texts stay right."""

from __future__ import annotations

from random import Random

import pytest

from cluster.router.breakers import OPEN_S
from cluster.sim.cluster import SimCluster, SimConfig
from cluster.sim.workload import cluster, fake, mixed_requests, submit, tokens, worker
from cluster.types import FetchOpen, FetchRefused, FetchReply

FOUR = ("prefill-1", "prefill-2", "decode-1", "decode-2")


def routed(policy: str, *names: str, seed: int = 0, **options: object) -> SimCluster:
    """Workers of one engine under a policy, with their links up."""
    engine = fake(**options)  # type: ignore[arg-type]
    workers = tuple(worker(name, engine) for name in names or FOUR)
    sim = SimCluster(SimConfig(workers=workers, seed=seed, policy=policy))
    sim.run_for(0.6)
    return sim


def run(policy: str, seed: int) -> SimCluster:
    sim, rng = routed(policy, seed=seed, num_blocks=56, max_num_seqs=6, stop_probability=0.02), Random(seed)
    for request in mixed_requests(rng, 50):
        sim.submit(request, at=sim.clock.now + rng.random() * 1.5)
    assert sim.drain(limit_s=300)
    sim.run_for(1.0)
    return sim


@pytest.mark.parametrize("policy", ["predicted", "prefix-aware", "power-of-two"])
def test_the_same_seed_gives_the_same_choices_and_the_oracles_texts(policy: str) -> None:
    sim = run(policy, 3)
    assert run(policy, 3).journal.lines() == sim.journal.lines()
    for result in sim.results.values():
        assert result.code is None and result.outputs == sim.oracle(result.submit)
    assert sim.leaks() == []


def test_the_index_knows_what_the_caches_hold() -> None:
    sim = run("predicted", 4)
    index = sim.router.dispatcher.chooser.index
    for result in sim.results.values():
        prompt = result.submit.prompt
        hint = index.match(prompt, identity="fake", cache_salt=b"", block_size=16)
        for name, held in sim.workers.items():
            scheduler = held.core.scheduler
            keys = scheduler._book.chain(b"").hash_blocks(_array(prompt))
            cached = len(scheduler.blocks.match(keys[: (len(prompt) // 4 - 1) // 16])) * 16
            assert hint.tokens(name) == cached, f"{name}: {hint.tokens(name)} hinted, {cached} cached"


def _array(prompt: bytes) -> object:
    import numpy as np

    return np.frombuffer(prompt, dtype="<i4")


def test_a_pair_that_fails_is_avoided_then_tried_and_trusted_again() -> None:
    sim = routed("round-robin", "prefill-1", "prefill-2", "decode-1")
    ill = [True]

    def answer(source: str, call: FetchOpen) -> FetchReply | None:
        if ill[0] and source == "prefill-1":
            return FetchRefused(code="transport", message="no way from here to there")
        return None

    sim.faults.answer = answer

    def ask(name: str) -> str | None:
        sim.router.submit(submit(name, tokens(Random(name), 200), max_tokens=2))
        assert sim.drain(limit_s=5)
        assert sim.results[name].outputs == sim.oracle(sim.results[name].submit)
        (decision,) = sim.router.dispatcher.chooser.decisions(name)
        return decision.sources[0] if decision.sources else None

    first = [ask(f"a{i}") for i in range(6)]
    assert first.count("prefill-1") == 1, "it failed once, and was not asked again"
    (status,) = sim.router.dispatcher.status().breakers
    assert (status.source_id, status.reason, status.num_failures) == ("prefill-1", "refused", 1)
    sim.run_for(OPEN_S)
    assert "prefill-1" in [ask(f"b{i}") for i in range(2)]
    (status,) = sim.router.dispatcher.status().breakers
    assert status.num_failures == 2, "the trial failed: longer now"
    ill[0] = False
    sim.run_for(2 * OPEN_S)
    assert "prefill-1" in [ask(f"c{i}") for i in range(2)]
    assert sim.router.dispatcher.status().breakers == ()


def test_a_busy_decode_worker_leaves_prompts_to_the_prefill_worker() -> None:
    sim = routed("predicted", "prefill-1", "decode-1")
    sim.router.submit(submit("idle", tokens(Random(1), 300), max_tokens=4))
    assert sim.drain(limit_s=5)
    for i in range(6):
        sim.router.submit(submit(f"load-{i}", tokens(Random(10 + i), 20), max_tokens=300))
    sim.run_for(0.1)
    sim.router.submit(submit("busy", tokens(Random(2), 300), max_tokens=4))
    assert sim.drain(limit_s=20)
    assert sim.results["idle"].paths == ["decode-only"] and sim.results["busy"].paths == ["prefill-decode"]
    assert sim.router.dispatcher.counters["decode_only_chosen"] >= 1
    assert sim.router.dispatcher.counters["decode_only_fallback"] == 0


def test_workers_learn_how_fast_their_peers_are_reached() -> None:
    sim = cluster("prefill-1", "decode-1", hosts={"prefill-1": "host-2"})
    for i in range(12):
        sim.router.submit(submit(f"r{i}", tokens(Random(i), 40 * (i + 1)), max_tokens=2))
        assert sim.drain(limit_s=5)
    sim.run_for(0.6)
    (peer,) = [p for w in sim.router.dispatcher.status().workers for p in w.peers]
    assert (peer.peer_id, peer.transport) == ("decode-1", "grpc")
    # a block of 256 bytes takes 0.1 ms to copy, and a call 0.5 ms and two ways through the network
    assert peer.gb_per_s == pytest.approx(256 / 0.1e-3 / 1e9, rel=0.25)
    assert 0.4 < peer.latency_ms < 1.5
