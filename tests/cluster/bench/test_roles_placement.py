"""The bench's quick placement chooses as the product's policy does."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from cluster.bench.roles.machine import Job
from cluster.bench.roles.placement import Placed, Placer
from cluster.bench.roles.setting import load_setting, tables_of
from cluster.router.policies.predicted import Predicted
from cluster.router.views import RequestView, WorkerView
from cluster.types import PeerRate, WorkerInfo

NUM_WORKERS, NUM_SOURCES = 12, 7


def _loaded_placer(rng: Random, *, is_full: bool) -> Placer:
    kinds = load_setting().hardware
    placer = Placer([kinds["l20" if index % 3 else "h100"] for index in range(NUM_WORKERS)])
    placer.set_roles(range(NUM_SOURCES, NUM_WORKERS), range(NUM_SOURCES))
    for number in range(60):
        job = Job(0.0, rng.randrange(100, 9000), 50, 2048)
        job.decode, job.source = rng.randrange(NUM_SOURCES, NUM_WORKERS), rng.randrange(NUM_SOURCES)
        work_ms = rng.uniform(50.0, 900.0)
        placed = Placed(decode=job.decode, source=job.source, ttft_ms=0.0, overhead_ms=0.0, work_ms=work_ms)
        placer.assign(number / 100, job, placed)
    placer.free_tokens[:] = [rng.choice((500.0, 300_000.0)) if is_full else 300_000.0 for _ in range(NUM_WORKERS)]
    return placer


def _views(placer: Placer, now: float, worker: int) -> WorkerView:
    kinds = load_setting().hardware
    hardware = kinds["l20" if worker % 3 else "h100"]
    rate = PeerRate(peer_id="", transport="grpc", gb_per_s=hardware.gb_per_s, latency_ms=hardware.latency_ms)
    info = WorkerInfo(
        worker_id=str(worker),
        incarnation="",
        epoch=1,
        role="decode",
        state="ready",
        address="",
        block_size=1,
        max_num_seqs=hardware.max_num_seqs,
        profile=hardware.profile,
    )
    return WorkerView(
        info=info,
        num_sequences=int(placer.sequences[worker]),
        queued_tokens=0,
        context_tokens=int(placer.keys[worker]),
        backlog_ms=float(placer.backlog_ms(now, np.array([worker]))[0]),
        num_free_blocks=int(placer.free_tokens[worker]),
        rates={str(peer): rate for peer in range(NUM_WORKERS)},
    )


@pytest.mark.parametrize("seed", range(8))
def test_requests_are_placed_where_the_policy_places_them(seed: int) -> None:
    rng = Random(seed)
    placer, now = _loaded_placer(rng, is_full=seed % 2 == 1), 1.0
    decode = [_views(placer, now, worker) for worker in range(NUM_SOURCES, NUM_WORKERS)]
    prefill = [_views(placer, now, worker) for worker in range(NUM_SOURCES)]
    for _ in range(10):
        prompt = rng.randrange(20, 20_000)
        view = RequestView(num_tokens=prompt, num_choices=1, turn=0, num_outputs=placer.accuracy.mean_outputs)
        expected = Predicted().place(view, decode, prefill, rng)
        placed = placer.place(now, Job(now, prompt, 50, 2048))
        assert placed is not None
        source = None if placed.source < 0 else str(placed.source)
        assert (str(placed.decode), source) == (expected.considered[0].decode, expected.considered[0].source)
        assert placed.ttft_ms == pytest.approx(expected.considered[0].ttft_ms)


def test_tables_say_what_the_profile_says() -> None:
    for hardware in load_setting().hardware.values():
        tables = tables_of(hardware)
        for num_tokens, cached in ((1, 0), (700, 0), (1700, 300), (1800, 0), (9000, 0), (31_000, 512)):
            expected = hardware.profile.prefill_ms(num_tokens, cached)
            assert tables.prefill_ms(num_tokens, cached) == pytest.approx(expected)


def test_backlog_shrinks_with_time_and_goes_with_the_first_token() -> None:
    setting = load_setting()
    placer = Placer([setting.kind] * 2)
    placer.set_roles([1], [0])
    jobs = [Job(0.0, 1000, 10, 2048) for _ in range(2)]
    for job in jobs:
        job.decode, job.source = 1, 0
        placer.assign(0.0, job, Placed(decode=1, source=0, ttft_ms=0.0, overhead_ms=0.0, work_ms=100.0))
    backlog = [float(placer.backlog_ms(now, np.array([0]))[0]) for now in (0.0, 0.05, 5.0)]
    assert backlog == pytest.approx([200.0, 150.0, 100.0])  # only the first one's work shrinks
    placer.prefilled(5.0, jobs[0])
    assert float(placer.backlog_ms(5.02, np.array([0]))[0]) == pytest.approx(80.0)
