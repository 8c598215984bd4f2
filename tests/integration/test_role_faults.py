"""Real worker processes that are killed and stopped under load: every client gets exactly the undisturbed text.

The long tests are the whole matrix: each failpoint of cluster/worker/failpoints.py, with both signals.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.rpc.switch_client import SwitchCallError, call_switch
from cluster.spec import FakeSpec
from cluster.types import SwitchRequest, WorkerInfo
from engine.config import EngineConfig, Role
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from engine.tiny.random_checkpoint import make_random_checkpoint
from tests.integration.fault_cluster import Answer, FaultCluster, fault_cluster
from tests.integration.fault_load import Load

# 1,200 tokens are a chunk of 100 ms, a piece, and so on, four times
FAKE = FakeSpec(vocab_size=272, num_blocks=2048, max_model_len=4096, fixed_ms=5.0, ms_per_token=0.3)
ENGINE = EngineConfig(model="fake", max_num_seqs=16, max_num_served=16, max_step_ms=100.0)
FOUND_S = 6.0  # 3 s are promised, on a machine that has nothing else to do
NUM_REQUESTS = 10
THREE = ("prefill-1", "decode-1", "decode-2")
Scenario = Callable[[FaultCluster], Awaitable[None]]


def run(folder: Path, workers: tuple[str, ...], scenario: Scenario, *, model_path: Path | None = None) -> None:
    """Run a scenario with these workers."""

    async def main() -> None:
        armed = dict.fromkeys(workers, "")
        engine = (
            ENGINE if model_path is None else replace(ENGINE, max_model_len=1024, kv_cache_bytes=64 << 20, threads=1)
        )
        async with fault_cluster(folder, armed, fake=FAKE, engine=engine, model_path=model_path) as cluster:
            await scenario(cluster)

    asyncio.run(main())


async def counter(cluster: FaultCluster, name: str) -> int:
    return int((await cluster.status())["counters"].get(name, 0))


async def wake_late(cluster: FaultCluster, worker_id: str, answers: list[Answer], *, with_rank: bool) -> None:
    """Continue a stopped worker while what it had is under way elsewhere."""
    found_at = cluster.downs[worker_id][-1]
    await cluster.until(
        lambda: any(answer.has_done or answer.stamps[-1:] > [found_at] for answer in answers), "nothing goes on"
    )
    cluster.signal(worker_id, signal.SIGCONT, with_rank=with_rank)


async def bring_back(cluster: FaultCluster, worker_id: str) -> None:
    """A dead worker is started again; then nobody holds anything, anywhere."""
    if cluster.is_gone(worker_id):
        cluster.start_worker(worker_id)
    await cluster.until_ready(worker_id)
    await cluster.until(cluster.is_idle, "something is still held somewhere")


async def strike(
    cluster: FaultCluster, load: Load, worker_id: str, number: signal.Signals, *, with_rank: bool = True
) -> None:
    """One run of the load with this fault in the middle, and the worker back afterwards."""

    async def fault(answers: list[Answer]) -> None:
        num_downs = len(cluster.downs[worker_id])
        at = cluster.signal(worker_id, number, with_rank=with_rank)
        await cluster.until(lambda: len(cluster.downs[worker_id]) > num_downs, "the fault was not found")
        found_s = cluster.downs[worker_id][num_downs] - at
        print(f"{number.name} of {worker_id}: found after {found_s:.2f} s")
        assert found_s < FOUND_S
        if number == signal.SIGSTOP:
            await wake_late(cluster, worker_id, answers, with_rank=with_rank)

    await load.run(fault)
    await bring_back(cluster, worker_id)


def test_workers_that_are_killed_or_stopped_under_load_change_no_text(tmp_path: Path) -> None:
    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, NUM_REQUESTS, max_tokens=150)
        await load.learn()
        for worker_id, number in (
            ("decode-1", signal.SIGKILL),
            ("decode-2", signal.SIGSTOP),
            ("prefill-1", signal.SIGKILL),  # the only one
        ):
            num_lost = await counter(cluster, "taken_over")
            await strike(cluster, load, worker_id, number)
            num_lost = await counter(cluster, "taken_over") - num_lost
            assert (num_lost >= 2) == worker_id.startswith("decode"), "what a decode worker has is taken over"
        assert await counter(cluster, "gaps") == 0

    run(tmp_path, THREE, scenario)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("with_rank", [True, False], ids=["whole", "network-process-only"])
def test_each_worker_killed_and_stopped_in_turn(tmp_path: Path, with_rank: bool) -> None:
    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, 2 * NUM_REQUESTS, num_prompt=900)
        await load.learn()
        for worker_id in (*THREE, "prefill-2", "decode-1"):
            for number in (signal.SIGKILL, signal.SIGSTOP):
                await strike(cluster, load, worker_id, number, with_rank=with_rank)

    run(tmp_path, (*THREE, "prefill-2"), scenario)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_model_continues_its_texts_bit_by_bit(tmp_path: Path) -> None:
    """Penalties and logprobs mean something here, and the KV is float32."""

    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, NUM_REQUESTS)
        await load.learn()
        for worker_id in THREE:
            for number in (signal.SIGKILL, signal.SIGSTOP):
                await strike(cluster, load, worker_id, number)

    folder = tmp_path / "model"
    vocab_size = write_byte_tokenizer(folder)
    make_random_checkpoint(folder, model_type="ernie4_5_moe", dtype="float32", vocab_size=vocab_size)
    run(tmp_path, THREE, scenario, model_path=folder)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_nap_that_nobody_notices_changes_no_text(tmp_path: Path) -> None:
    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, NUM_REQUESTS)
        await load.learn()

        async def nap(_: list[Answer]) -> None:
            for worker_id in (*THREE, *THREE):
                cluster.signal(worker_id, signal.SIGSTOP)
                await asyncio.sleep(0.4)
                cluster.signal(worker_id, signal.SIGCONT)

        await load.run(nap)
        await cluster.until(cluster.is_idle, "something is still held somewhere")
        assert not any(cluster.downs.values()), "who is back within half a second is not given up"

    run(tmp_path, THREE, scenario)


# ---- failpoints: the worker itself stops at a named point

PULL_POINTS = (
    ("prefill-1", "queued:2"),
    ("prefill-1", "mid_chunk:1"),
    ("prefill-1", "between_pieces:2"),
    ("decode-1", "queued:2"),
    ("decode-1", "before_commit:2"),
    ("decode-1", "after_commit:2"),
)
SWITCH_POINTS = ("draining:1", "switching:1", "verifying:1", "ready:2")  # the first "ready" is the start's


async def is_struck(cluster: FaultCluster, worker_id: str) -> bool:
    return cluster.is_gone(worker_id) or cluster.is_stopped(worker_id)


async def strike_itself(
    cluster: FaultCluster, load: Load, worker_id: str, failpoint: str, ask: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Arm a worker anew, run the load (and `ask` in the middle of it) until it strikes, and bring it back."""
    print(f"{worker_id} {failpoint}")
    cluster.start_worker(worker_id, failpoint=failpoint)
    await cluster.until_ready(*THREE)

    async def fault(answers: list[Answer]) -> None:
        asked = asyncio.create_task(ask()) if ask is not None else None  # type: ignore[arg-type]
        await cluster.until(lambda: is_struck(cluster, worker_id), f"{failpoint} is never reached")
        if not cluster.is_gone(worker_id):
            await cluster.until(lambda: cluster.is_down(worker_id), "the stop was not found")
            await wake_late(cluster, worker_id, answers, with_rank=False)
        if asked is not None:
            await asked

    await load.run(fault)
    await bring_back(cluster, worker_id)


def test_a_source_that_stops_between_pieces_changes_no_text(tmp_path: Path) -> None:
    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, 4, num_prompt=1000, max_tokens=60)
        await load.learn()
        await strike_itself(cluster, load, "prefill-1", "between_pieces:2:SIGSTOP")

    run(tmp_path, THREE, scenario)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_each_point_of_a_pull(tmp_path: Path, number: str) -> None:
    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, NUM_REQUESTS, num_prompt=1000)
        await load.learn()
        for worker_id, point in PULL_POINTS:
            await strike_itself(cluster, load, worker_id, f"{point}:{number}")

    run(tmp_path, THREE, scenario)


async def switch(cluster: FaultCluster, worker_id: str, role: Role) -> None:
    """Ask for the other role. A worker that dies or stops meanwhile breaks the call."""
    info = cluster.infos[worker_id]
    request = SwitchRequest(incarnation=info.incarnation, expected_epoch=info.epoch, role=role, timeout_ms=6000)
    with suppress(SwitchCallError):
        reply = await call_switch(info.address, request)
        print(f"{worker_id} to {role}: {reply.outcome} {reply.reason}")


PHASES = ("draining", "switching", "verifying")


async def abandon_at(cluster: FaultCluster, worker_id: str, role: Role, phase: str) -> str:
    """Ask for another role, and be gone as soon as the worker tells of this phase or a later one. Tells which.

    Only the last of several states within a moment is told: the caller may come too late, and it is "" then.
    """
    before = cluster.infos[worker_id]
    asked = asyncio.create_task(switch(cluster, worker_id, role))
    left_at = ""

    def on_info(info: WorkerInfo) -> None:
        nonlocal left_at
        if info.worker_id == worker_id and info.state in PHASES[PHASES.index(phase) :] and asked.cancel():
            left_at = left_at or info.state

    cluster.on_info = on_info
    await cluster.until(lambda: cluster.infos[worker_id].epoch == before.epoch + 4, "the switch does not end")
    cluster.on_info = lambda _: None
    after = cluster.infos[worker_id]
    assert (after.state, after.role, after.incarnation) == ("ready", role, before.incarnation)
    await asyncio.wait({asked})
    return left_at


def test_a_switch_whose_caller_is_gone_is_run_to_its_end_under_load(tmp_path: Path) -> None:
    """A controller that dies in any phase: the worker goes on, and no text changes, moved or not."""

    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, 4, max_tokens=200)
        await load.learn()
        left: list[str] = []

        async def fault(_: list[Answer]) -> None:
            for phase in PHASES:
                for role in roles:
                    left.append(await abandon_at(cluster, "decode-1", role, phase))

        roles: tuple[Role, Role] = ("prefill", "decode")
        await load.run(fault)
        await cluster.until(cluster.is_idle, "something is still held somewhere")
        print(f"left at {left}, moved {await counter(cluster, 'moved')}")
        assert any(left) and await counter(cluster, "moved") > 0

    run(tmp_path, THREE, scenario)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("worker_id, role", [("decode-1", "prefill"), ("prefill-1", "decode")])
def test_each_phase_of_a_switch(tmp_path: Path, number: str, worker_id: str, role: Role) -> None:
    async def scenario(cluster: FaultCluster) -> None:
        load = Load(cluster, NUM_REQUESTS, num_prompt=600)
        await load.learn()
        for point in SWITCH_POINTS:
            await strike_itself(
                cluster, load, worker_id, f"{point}:{number}", ask=lambda: switch(cluster, worker_id, role)
            )

    run(tmp_path, THREE, scenario)
