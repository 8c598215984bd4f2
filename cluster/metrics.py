"""Prometheus metrics of a router: every name is a constant here, units are suffixes, `_total` only on counters.

One registry per router object, so that two routers in one process (tests) don't share counts. Labels come from closed
sets or from worker ids, never from clients.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.types import Heartbeat

# requests
REQUESTS: Final = "neap_requests_total"
FINISHED: Final = "neap_choices_finished_total"
ERRORS: Final = "neap_errors_total"
QUEUED: Final = "neap_requests_queued"
RUNNING: Final = "neap_requests_running"
PATHS: Final = "neap_request_path_total"
CLIENT_GONE: Final = "neap_client_disconnects_total"
# times
TTFT: Final = "neap_time_to_first_token_seconds"
ITL: Final = "neap_inter_token_latency_seconds"
E2E: Final = "neap_request_duration_seconds"
# tokens
PROMPT_TOKENS: Final = "neap_prompt_tokens_total"
CACHED_TOKENS: Final = "neap_cached_prompt_tokens_total"
GENERATION_TOKENS: Final = "neap_generation_tokens_total"
# workers, from their heartbeats
WORKER_UP: Final = "neap_worker_up"
WORKER_KV_USE: Final = "neap_worker_kv_use_ratio"
WORKER_RUNNING: Final = "neap_worker_requests_running"
WORKER_WAITING: Final = "neap_worker_requests_waiting"
WORKER_SERVED: Final = "neap_worker_calls_served"
WORKER_QUEUED_TOKENS: Final = "neap_worker_queued_tokens"
WORKER_STEP_AGE: Final = "neap_worker_step_age_seconds"
WORKER_STEPS: Final = "neap_worker_steps"
# the router itself
LOOP_LAG: Final = "neap_router_loop_lag_seconds"

TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS: Final = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    80.0,
)
E2E_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LAG_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class TokenHistogram(Collector):
    """A histogram for what happens once per token: prometheus_client's own takes two locks and a loop each time."""

    def __init__(self, name: str, text: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times, into the first bucket whose bound it does not pass."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        bounds = (*self._bounds, float("inf"))
        names = [floatToGoString(bound) for bound in bounds]  # type: ignore[no-untyped-call]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        return [HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)]


class TokenCounter(Collector):
    """A counter for what happens once per token, without prometheus_client's lock."""

    def __init__(self, name: str, text: str, *, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._value = 0
        registry.register(self)

    def inc(self, amount: int) -> None:
        """Count so many more."""
        self._value += amount

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        return [CounterMetricFamily(self._name, self._text, value=self._value)]


class RouterMetrics:
    """The router's counters, gauges and histograms. Call from the event loop's thread only."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(REQUESTS, "HTTP requests that asked for tokens", ["endpoint"], registry=registry)
        self.finished = Counter(FINISHED, "Choices that ended well, by finish reason", ["reason"], registry=registry)
        self.errors = Counter(ERRORS, "Errors told to clients, by code", ["code"], registry=registry)
        self.queued = Gauge(QUEUED, "Requests that no worker has begun with", registry=registry)
        self.running = Gauge(RUNNING, "Requests that a worker works on", registry=registry)
        self.paths = Counter(PATHS, "How a prompt's KV came to its decode worker", ["path"], registry=registry)
        self.client_gone = Counter(CLIENT_GONE, "Clients that left before their answer's end", registry=registry)
        self.ttft = Histogram(TTFT, "From the request to its first token", buckets=TTFT_BUCKETS, registry=registry)
        self.itl = TokenHistogram(ITL, "Between tokens of one choice", buckets=ITL_BUCKETS, registry=registry)
        self.e2e = Histogram(E2E, "From the request to its end", buckets=E2E_BUCKETS, registry=registry)
        self.prompt_tokens = Counter(PROMPT_TOKENS, "Prompt tokens of admitted requests", registry=registry)
        self.cached_tokens = Counter(CACHED_TOKENS, "Prompt tokens that nobody had to compute", registry=registry)
        self.generation_tokens = TokenCounter(GENERATION_TOKENS, "Tokens accepted from workers", registry=registry)
        self.loop_lag = Histogram(LOOP_LAG, "How late the event loop wakes", buckets=LAG_BUCKETS, registry=registry)
        self._add_worker_gauges(registry)

    def _add_worker_gauges(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["worker_id"], registry=registry)

        self._up = Gauge(WORKER_UP, "1 while the link stands", ["worker_id", "role", "pool"], registry=registry)
        self._labels: dict[str, tuple[str, str, str]] = {}
        self._kv_use = gauge(WORKER_KV_USE, "Share of KV blocks that requests hold, 0 to 1")
        self._worker_running = gauge(WORKER_RUNNING, "Requests in the running batch")
        self._worker_waiting = gauge(WORKER_WAITING, "Requests that wait for a row or blocks")
        self._served = gauge(WORKER_SERVED, "KVSource.Fetch calls that it serves now")
        self._queued_tokens = gauge(WORKER_QUEUED_TOKENS, "Prompt tokens still to compute")
        self._step_age = gauge(WORKER_STEP_AGE, "How long its present step has run; 0 between steps")
        self._steps = gauge(WORKER_STEPS, "Engine steps since its start")
        self._per_worker = (
            self._kv_use,
            self._worker_running,
            self._worker_waiting,
            self._served,
            self._queued_tokens,
            self._step_age,
            self._steps,
        )

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """Take over a worker's own figures."""
        worker_id, load = beat.info.worker_id, beat.load
        labels = (worker_id, beat.info.role, beat.info.pool)
        if self._labels.get(worker_id) != labels:
            self._drop_up(worker_id)
            self._labels[worker_id] = labels
            self._up.labels(*labels).set(1)
        self._kv_use.labels(worker_id).set(load.num_referenced_blocks / load.num_blocks if load.num_blocks else 0.0)
        self._worker_running.labels(worker_id).set(load.num_running)
        self._worker_waiting.labels(worker_id).set(load.num_waiting)
        self._served.labels(worker_id).set(load.num_served)
        self._queued_tokens.labels(worker_id).set(load.queued_tokens)
        self._step_age.labels(worker_id).set(beat.step_age_ms / 1000)
        self._steps.labels(worker_id).set(beat.step_count)

    def on_worker_down(self, worker_id: str) -> None:
        """Forget a worker's gauges: a stale figure is worse than none."""
        self._drop_up(worker_id)
        for gauge in self._per_worker:
            gauge.remove_by_labels({"worker_id": worker_id})

    def _drop_up(self, worker_id: str) -> None:
        labels = self._labels.pop(worker_id, None)
        if labels is not None:
            self._up.remove(*labels)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
