"""Names follow the rules, and a worker's figures go with the worker."""

from __future__ import annotations

from msgspec.structs import replace
from prometheus_client import Counter, Gauge, Histogram

from cluster import metrics
from cluster.metrics import RouterMetrics
from cluster.types import Heartbeat, WorkerInfo
from engine.messages import Load

INFO = WorkerInfo(worker_id="d1", incarnation="i", epoch=1, role="decode", state="ready", address="a", pool="p")


def value(made: RouterMetrics, name: str, **labels: str) -> float | None:
    return made.registry.get_sample_value(name, labels)


def test_names_carry_their_unit_and_only_counters_end_in_total() -> None:
    made = RouterMetrics()
    for collector in vars(made).values():
        if isinstance(collector, Counter):
            assert not collector._name.endswith("_total")  # the library adds it
        elif isinstance(collector, Histogram):
            assert collector._name.endswith("_seconds")
        elif isinstance(collector, Gauge):
            assert not collector._name.endswith(("_total", "_gauge", "_time", "_size"))
    names = [text for name, text in vars(metrics).items() if name.isupper() and isinstance(text, str)]
    assert all(name.startswith("neap_") for name in names) and len(set(names)) == len(names)


def test_a_workers_gauges_follow_its_heartbeats_and_leave_with_it() -> None:
    made = RouterMetrics()
    load = Load(num_running=3, num_waiting=2, num_blocks=10, num_referenced_blocks=4, queued_tokens=9, num_served=1)
    made.on_heartbeat(Heartbeat(info=INFO, load=load, step_count=5, step_age_ms=250))
    assert value(made, metrics.WORKER_KV_USE, worker_id="d1") == 0.4
    assert value(made, metrics.WORKER_RUNNING, worker_id="d1") == 3
    assert value(made, metrics.WORKER_STEP_AGE, worker_id="d1") == 0.25
    assert value(made, metrics.WORKER_UP, worker_id="d1", role="decode", pool="p") == 1
    made.on_worker_down("d1")
    made.on_worker_down("d1")
    assert b'worker_id="d1"' not in made.render()


def test_a_worker_that_changes_its_role_is_not_counted_twice() -> None:
    made = RouterMetrics()
    made.on_heartbeat(Heartbeat(info=INFO))
    made.on_heartbeat(Heartbeat(info=replace(INFO, role="prefill")))
    assert value(made, metrics.WORKER_UP, worker_id="d1", role="decode", pool="p") is None
    assert value(made, metrics.WORKER_UP, worker_id="d1", role="prefill", pool="p") == 1
    assert value(made, metrics.WORKER_KV_USE, worker_id="d1") == 0.0  # no blocks told yet
