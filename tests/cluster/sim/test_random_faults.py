"""Random clusters, requests and faults: every request ends exactly once, with the oracle's text or a catalogue error.

"Exactly once" and "no hole in the text" are asserted by the simulated clients themselves (cluster/sim/router.py), and
that no copy lands in a block that is somebody else's by cluster/sim/copies.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from msgspec.structs import replace

from cluster.errors import ERRORS
from cluster.sim.cluster import SimCluster
from cluster.sim.workload import cluster, fake, mixed_requests
from cluster.types import FetchBusy, FetchOpen, FetchRefused, FetchReply

NUM_REQUESTS = 40
SETTLE_S = 20.0  # past every limit: restarts, cut-offs, late copies


def build(rng: Random, seed: int) -> SimCluster:
    """One or two sources, one or two decode workers, with random speeds, pools, batches and hosts."""
    names = ["prefill-1", "decode-1"]
    names += ["prefill-2"] if rng.random() < 0.6 else []
    names += ["decode-2"] if rng.random() < 0.5 else []
    hosts = {name: rng.choice(("host-1", "host-2")) for name in names} if rng.random() < 0.5 else None
    engine = fake(
        num_blocks=rng.choice((48, 64, 128, 256)),
        max_num_seqs=rng.choice((2, 4, 8)),
        stop_probability=0.02,
        ms_per_token=rng.choice((0.05, 0.3)),
        max_step_ms=rng.choice((5.0, 20.0)),
        steps_in_flight=rng.randrange(2),
    )
    return cluster(*names, engine=engine, seed=seed, hosts=hosts)


def add_requests(sim: SimCluster, rng: Random) -> None:
    """Requests of the first 0.6 s; some with a short deadline, some whose client leaves."""
    for request in mixed_requests(rng, NUM_REQUESTS):
        at = 0.05 + rng.random() * 0.6
        if rng.random() < 0.1:
            request = replace(request, deadline=at + rng.random() * 0.5)
        sim.submit(request, at=at)
        if rng.random() < 0.15:
            name = request.request_id
            sim.clock.at(at + rng.random() * 0.3, lambda name=name: sim.router.cancel(name))  # type: ignore[misc]


def add_bad_luck(sim: SimCluster, rng: Random) -> None:
    """Copies that are slow or spoiled, sources that turn calls away."""
    luck = Random(rng.random())
    if rng.random() < 0.5:
        sim.faults.copy_s = lambda *_: luck.choice((0.0, 0.05, 3.0)) if luck.random() < 0.1 else None
    if rng.random() < 0.5:
        sim.faults.corrupt = lambda *_: luck.random() < 0.1
    if rng.random() < 0.4:

        def answer(worker_id: str, call: FetchOpen) -> FetchReply | None:
            if luck.random() >= 0.2:
                return None
            return luck.choice((FetchBusy(retry_ms=5), FetchRefused(code="state", message="no")))

        sim.faults.answer = answer


def add_disasters(sim: SimCluster, rng: Random) -> None:
    """Up to three of: a worker dies and is restarted, stops for a while, hangs, or loses its link."""

    def kill(name: str) -> None:
        sim.kill_worker(name, restart_after_s=rng.choice((0.1, 1.0, 5.0)))

    def stop(name: str) -> None:
        sim.freeze_worker(name, rng.choice((0.3, 1.5, 2.5, 6.0)))

    def hang(name: str) -> None:
        sim.hang_worker(name)
        sim.clock.after(15.0, lambda: kill(name))

    def cut(name: str) -> None:
        sim.router.break_link(name)

    disasters: tuple[Callable[[str], None], ...] = (kill, stop, hang, cut)
    for _ in range(rng.randrange(4)):
        disaster, name = rng.choice(disasters), rng.choice(sorted(sim.workers))
        sim.clock.at(0.1 + rng.random() * 0.8, lambda disaster=disaster, name=name: disaster(name))  # type: ignore[misc]


def run(seed: int) -> SimCluster:
    """One random history."""
    rng = Random(seed)
    sim = build(rng, seed)
    add_requests(sim, rng)
    add_bad_luck(sim, rng)
    add_disasters(sim, rng)
    assert sim.drain(limit_s=300), [name for name, result in sim.results.items() if result.live]
    sim.run_for(SETTLE_S)
    return sim


def check(sim: SimCluster) -> None:
    """Every request has the oracle's text, whole if it ended well; nothing is held by anybody."""
    assert len(sim.results) == NUM_REQUESTS
    for name, result in sim.results.items():
        assert result.code is None or result.code in ERRORS
        expected = sim.oracle(result.submit)
        if result.ended_at is not None and result.code is None:
            assert result.outputs == expected, name
        for choice, outputs in result.outputs.items():
            assert outputs == expected[choice][: len(outputs)], name
    assert sim.leaks() == []


@pytest.mark.parametrize("seed", range(20))
def test_random_faults(seed: int) -> None:
    check(run(seed))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_random_faults() -> None:
    reached: Counter[str] = Counter()
    for seed in range(1000, 2500):
        sim = run(seed)
        check(sim)
        for worker in sim.workers.values():
            reached += worker.decode.counters + worker.prefill.counters
        reached += sim.router.dispatcher.counters
    wanted = ("copies_stuck", "checksum_failures", "calls_restarted", "sources_silent", "sources_broken", "no_space")
    assert all(reached[name] for name in wanted), reached


def test_the_same_seed_gives_the_same_history() -> None:
    assert run(7).journal.lines() == run(7).journal.lines()
