"""An observer that did not run itself condemns nobody when it wakes."""

from __future__ import annotations

from random import Random

import pytest

from cluster import timers
from cluster.sim.cluster import SimCluster
from cluster.sim.workload import cluster, fake, submit, tokens


def slow_prefill() -> SimCluster:
    """A prompt of 1500 tokens takes 15 s at the source: there are only news meanwhile."""
    sim = cluster(engine=fake(ms_per_token=10.0, max_step_ms=400.0))
    sim.router.submit(submit("request", tokens(Random(1), 1500), max_tokens=4))
    sim.run_for(3.0)
    return sim


@pytest.mark.parametrize("lag_s", [1.1, 1.95, 5.0])
def test_decode_worker_that_slept_keeps_its_source(lag_s: float) -> None:
    """Asleep for 2 s and more it loses its link, as it must; what it never does is to blame its source."""
    sim = slow_prefill()
    sim.freeze_worker("decode-1", lag_s)
    assert sim.drain(limit_s=60)
    result, counters = sim.results["request"], sim.workers["decode-1"].decode.counters
    assert result.outputs == sim.oracle(result.submit) and result.paths == ["prefill-decode"]
    assert counters["sources_silent"] == 0
    if lag_s < 1.5:
        assert sim.router.dispatcher.counters["silent_workers"] == 0


@pytest.mark.parametrize("lag_s", [1.1, 2.5, 8.0])
def test_router_that_slept_keeps_its_workers(lag_s: float) -> None:
    sim = slow_prefill()
    sim.router.process.freeze()
    sim.clock.after(lag_s, sim.router.process.thaw)
    assert sim.drain(limit_s=40)
    result = sim.results["request"]
    assert result.outputs == sim.oracle(result.submit) and result.paths == ["prefill-decode"]
    assert sim.router.dispatcher.counters["silent_workers"] == 0
    assert sim.router.dispatcher.counters["dispatched"] == 1


@pytest.mark.parametrize("lag_s", [1.1, 5.0])
def test_source_that_slept_keeps_its_receivers(lag_s: float) -> None:
    """Nothing is taken while the source itself sleeps; the receiver looks elsewhere after 2 s and closes."""
    sim = slow_prefill()
    sim.freeze_worker("prefill-1", lag_s)
    assert sim.drain(limit_s=60)
    assert sim.results["request"].outputs == sim.oracle(sim.results["request"].submit)
    assert sim.workers["prefill-1"].prefill.counters["cut_off_taken"] == 0
    assert sim.workers["decode-1"].decode.counters["sources_silent"] == (lag_s > 2)


def load_fully(seconds: float) -> SimCluster:
    """Long prompts, one every 6.7 s of computing, steps of 0.5 s."""
    sim = cluster("prefill-1", "decode-1", engine=fake(ms_per_token=4.0, max_step_ms=500.0, num_blocks=1024))
    rng = Random(2)
    for i in range(round(seconds * 0.15)):
        request = submit(f"request-{i}", tokens(rng, 1800), max_tokens=30, deadline=5000.0)
        sim.submit(request, at=rng.random() * seconds)
    assert sim.drain(limit_s=5000)
    return sim


@pytest.mark.parametrize("seconds", [60.0, pytest.param(600.0, marks=pytest.mark.long)])
def test_steps_of_the_longest_allowed_time_are_no_silence(seconds: float) -> None:
    sim = load_fully(seconds)
    assert sim.clock.now > seconds * 0.8
    for name in ("sources_silent", "sources_broken"):
        assert sim.workers["decode-1"].decode.counters[name] == 0
    assert sim.router.dispatcher.counters["lost_workers"] == 0
    assert all(result.code is None for result in sim.results.values())


def test_without_the_rule_the_source_would_be_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the tests above would notice."""
    monkeypatch.setattr(timers, "OBSERVER_LAG_S", float("inf"))
    sim = slow_prefill()
    sim.freeze_worker("decode-1", 1.95)
    assert sim.drain(limit_s=60)
    assert sim.workers["decode-1"].decode.counters["sources_silent"] > 0
