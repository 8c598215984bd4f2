"""Networks that delay, cut, stall, slow, corrupt and pass one way only, between real processes over real gRPC.

Whatever happens to a link (router - worker) or to the Fetch calls (worker - worker): every client gets exactly the
undisturbed text, or an error of the catalogue after a true beginning, and afterwards nobody holds a block.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from cluster.errors import ERRORS
from cluster.spec import FakeSpec
from engine.config import EngineConfig
from tests.integration.fault_cluster import Answer, FaultCluster, fault_cluster
from tests.integration.fault_load import Load
from tests.integration.fault_proxy import HEALTHY, Direction, Fault, FaultProxy

FAKE = FakeSpec(vocab_size=272, num_blocks=2048, max_model_len=4096, fixed_ms=5.0, ms_per_token=0.3)
ENGINE = EngineConfig(model="fake", max_num_seqs=16, max_num_served=16, max_step_ms=100.0)
THREE = ("prefill-1", "decode-1", "decode-2")
NUM_CORRUPT_RUNS = 12
DIRECTIONS: list[Direction] = ["to_client", "to_target"]
LASTS_S = 2.6  # longer than anybody waits for news
FAULTS = {
    "delay": Fault(kind="delay", delay_s=0.15),
    "stall": Fault(kind="stall"),
    "slow": Fault(kind="slow", bytes_per_s=30_000),
    "towards-target-only": Fault(kind="one_way", direction="to_client"),
    "towards-client-only": Fault(kind="one_way", direction="to_target"),
    "corrupt-to-client": Fault(kind="corrupt", direction="to_client"),
    "corrupt-to-target": Fault(kind="corrupt", direction="to_target"),
}


async def disturb(cluster: FaultCluster, load: Load, proxy: FaultProxy, name: str) -> Counter[str]:
    """One run of the load with this fault for a while; how the requests ended."""

    async def fault(_: list[Answer]) -> None:
        if name == "cut":
            proxy.cut()
            return
        proxy.fault = FAULTS[name]
        await asyncio.sleep(LASTS_S)
        proxy.fault = HEALTHY

    num_before = proxy.num_bytes
    answers = await load.run(fault, errors=frozenset(ERRORS))
    await cluster.until_ready(*THREE)
    await cluster.until(cluster.is_idle, "something is still held somewhere")
    ends = Counter(answer.error or "right" for answer in answers)
    print(name, dict(ends), f"{proxy.num_bytes - num_before} bytes, {proxy.num_corrupted} corrupted")
    assert proxy.num_bytes > num_before, "the fault met nobody"
    return ends


async def disturb_all(cluster: FaultCluster, names: list[str], num_requests: int = 8) -> None:
    load = Load(cluster, num_requests, num_prompt=900, max_tokens=15 * num_requests + 30)
    await load.learn()
    for name in names:
        for proxies, worker_id in ((cluster.link_proxies, "decode-1"), (cluster.fetch_proxies, "prefill-1")):
            print("link" if proxies is cluster.link_proxies else "fetch", end=" ")
            ends = await disturb(cluster, load, proxies[worker_id], name)
            assert set(ends) == {"right"} or name.startswith("corrupt"), "nothing was lost for good"


async def corrupt_often(cluster: FaultCluster) -> None:
    """Wrong bytes everywhere, every few messages, while requests run."""
    load = Load(cluster, 8, num_prompt=900, max_tokens=150)
    await load.learn()
    random = Random(5)
    ends: Counter[str] = Counter()

    async def fault(_: list[Answer]) -> None:
        for _ in range(20):
            proxies = random.choice([cluster.link_proxies, cluster.fetch_proxies])
            direction = random.choice(DIRECTIONS)
            proxies[random.choice(THREE)].fault = Fault(kind="corrupt", direction=direction)
            await asyncio.sleep(0.1)

    for _ in range(NUM_CORRUPT_RUNS):
        answers = await load.run(fault, errors=frozenset(ERRORS))
        ends.update(answer.error or "right" for answer in answers)
        for proxy in [*cluster.link_proxies.values(), *cluster.fetch_proxies.values()]:
            proxy.fault = HEALTHY
        await cluster.until_ready(*THREE)
        await cluster.until(cluster.is_idle, "something is still held somewhere")
    num = sum(proxy.num_corrupted for proxy in [*cluster.link_proxies.values(), *cluster.fetch_proxies.values()])
    print(f"{num} wrong bytes: {dict(ends)}")
    assert num >= 5 * NUM_CORRUPT_RUNS, "too few met anybody"
    assert ends["right"] > sum(ends.values()) // 2


def run(folder: Path, scenario: Callable[[FaultCluster], Awaitable[None]]) -> None:
    async def main() -> None:
        workers = dict.fromkeys(THREE, "")
        async with fault_cluster(folder, workers, fake=FAKE, engine=ENGINE, proxied=True) as cluster:
            await scenario(cluster)

    asyncio.run(main())


def test_a_cut_connection_changes_no_text(tmp_path: Path) -> None:
    run(tmp_path, lambda cluster: disturb_all(cluster, ["cut"], num_requests=4))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_many_wrong_bytes_change_no_text(tmp_path: Path) -> None:
    run(tmp_path, corrupt_often)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_each_fault_of_a_network_changes_no_text(tmp_path: Path) -> None:
    run(tmp_path, lambda cluster: disturb_all(cluster, [*FAULTS, "cut"]))
