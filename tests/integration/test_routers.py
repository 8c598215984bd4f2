"""Two routers on the same workers, and a Redis that dies under load: neither is noticed by a client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.spec import FakeSpec
from tests.cluster.registry.keepers import RedisKeeper
from tests.integration.test_http import MODEL, STEADY, Cluster, eventually, oracle, start_all

FAKE = FakeSpec(vocab_size=272, num_blocks=1024, max_model_len=4096, fixed_ms=2.0, ms_per_token=0.02)
WORKERS = ("prefill-1", "decode-1", "decode-2")
AWAY_S = 60.0


def sdk(cluster: Cluster) -> openai.OpenAI:
    """To be closed: a connection that the garbage collector has to find fails whichever test runs by then."""
    return openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)


@contextmanager
def redis() -> Iterator[RedisKeeper]:
    keeper = RedisKeeper()
    asyncio.run(keeper.start())
    try:
        yield keeper
    finally:
        asyncio.run(keeper.stop())


@pytest.fixture
def keeper() -> Iterator[RedisKeeper]:
    with redis() as running:
        yield running


@pytest.fixture
def pair(keeper: RedisKeeper, tmp_path: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """Two routers over one prefill and two decode workers; the second has no processes but its own router."""
    with (
        start_all(tmp_path / "one", FAKE, keeper.url, WORKERS) as one,
        start_all(tmp_path / "two", FAKE, keeper.url, ()) as two,
    ):
        eventually(lambda: min(c.health()["decode_ready"] for c in (one, two)) == 2, "a router misses a worker")
        yield one, two


class Load:
    """Clients that ask without a pause, on threads, until told to stop; every text is compared with the oracle's."""

    def __init__(self, clusters: tuple[Cluster, ...], num_clients: int) -> None:
        self.num_right = [0] * len(clusters)
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(i % len(clusters), clusters[i % len(clusters)], i))
            for i in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, index: int, cluster: Cluster, number: int) -> None:
        with sdk(cluster) as client:
            self._ask_on(client, index, cluster, number)

    def _ask_on(self, client: openai.OpenAI, index: int, cluster: Cluster, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            prompt = [30 + (number * 31 + turn * 7 + position * (number + 3)) % 200 for position in range(150)]
            turn += 1
            try:
                text = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, **STEADY).choices[0].text
            except openai.OpenAIError as error:
                self.wrong.append(repr(error))
                continue
            if text == oracle(cluster, prompt, 20):
                self.num_right[index] += 1
            else:
                self.wrong.append(text)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _generated(cluster: Cluster) -> dict[str, int]:
    workers: list[dict[str, Any]] = cluster.status()["workers"]
    return {w["worker_id"]: w["load"]["generation_tokens"] for w in workers if w["role"] == "decode"}


def test_two_routers_share_the_workers_rightly_and_a_killed_one_leaves_nothing(pair: tuple[Cluster, Cluster]) -> None:
    load = Load(pair, num_clients=8)
    eventually(lambda: min(load.num_right) >= 20, f"too few answers: {load.num_right} {load.wrong}")
    load.end()
    assert load.wrong == []
    eventually(lambda: sum(_generated(pair[0]).values()) >= 20 * sum(load.num_right), "the last heartbeats")
    shares = sorted(_generated(pair[0]).values())
    assert shares[0] >= sum(shares) / 4, f"one decode worker did nearly everything: {shares}"
    eventually(lambda: pair[0].referenced() == 0, "blocks stay referenced")
    _killed_router_leaves_nothing(*pair)


def _killed_router_leaves_nothing(stays: Cluster, dies: Cluster) -> None:
    clients = [
        threading.Thread(target=_ask_in_vain, args=(dies, [30 + (i * 31 + p * (i + 3)) % 200 for p in range(300)]))
        for i in range(6)
    ]
    for client in clients:
        client.start()
    eventually(lambda: sum(load["running"] for load in stays.loads()) == 6, "the requests do not run")
    dies.processes["router"].kill()
    killed_at = time.monotonic()
    eventually(lambda: stays.referenced() == 0, "blocks of a dead router's requests stay referenced")
    print(f"all free {time.monotonic() - killed_at:.2f} s after the kill, as heartbeats of every 0.5 s tell")
    assert sum(load["running"] + load["served"] for load in stays.loads()) == 0
    for client in clients:
        client.join()


def _ask_in_vain(cluster: Cluster, prompt: list[int]) -> None:
    with sdk(cluster) as client, pytest.raises((openai.APIError, httpx.HTTPError)):
        for _ in client.completions.create(model=MODEL, prompt=prompt, max_tokens=3000, stream=True, **STEADY):
            pass


def _redis_dies_under_load(keeper: RedisKeeper, pair: tuple[Cluster, Cluster], away_s: float) -> None:
    load = Load(pair, num_clients=4)
    eventually(lambda: min(load.num_right) >= 3, "no answers")
    asyncio.run(keeper.stop())
    time.sleep(away_s)
    asyncio.run(keeper.start())
    before = list(load.num_right)
    eventually(lambda: min(now - then for now, then in zip(load.num_right, before, strict=True)) >= 3, "it stopped")
    load.end()
    assert load.wrong == []
    pair[0].start_worker("decode-2")  # a change that the routers can only learn from the new Redis
    eventually(lambda: min(c.health()["decode_ready"] for c in pair) == 1, "the loss was not noticed")
    eventually(lambda: min(c.health()["decode_ready"] for c in pair) == 2, "the new worker is not found")


def test_redis_may_die_and_come_back_empty(keeper: RedisKeeper, pair: tuple[Cluster, Cluster]) -> None:
    _redis_dies_under_load(keeper, pair, away_s=6.0)  # longer than an entry lives


@pytest.mark.long
@pytest.mark.timeout(AWAY_S + 240)
def test_redis_away_for_a_minute_fails_no_request(keeper: RedisKeeper, pair: tuple[Cluster, Cluster]) -> None:
    _redis_dies_under_load(keeper, pair, AWAY_S)
