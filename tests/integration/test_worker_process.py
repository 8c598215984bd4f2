"""Workers as real processes with the exact fake: a prefill and a decode worker on loopback, faults, and ends.

The test is the router: it holds a LinkClient to each worker and compares every text with the oracle's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from cluster.rpc.link import LinkClient
from cluster.spec import FakeSpec, WorkerSpec
from cluster.types import (
    AbortRequest,
    CacheNews,
    Choice,
    Dispatch,
    Entry,
    Failed,
    Heartbeat,
    Moved,
    News,
    Release,
    SourceFailed,
    SourceRef,
    Tokens,
    Transport,
    WorkerInfo,
)
from cluster.worker.rank import fake_config
from engine.config import EngineConfig, Role
from engine.request import SamplingParams

FAST = FakeSpec()
SLOW = FakeSpec(ms_per_token=1.0)  # a prompt of 1,500 tokens takes 1.5 s, in chunks of 0.1 s
ENGINE = EngineConfig(model="fake", max_step_ms=100.0, max_num_served=32)  # as many as a test sends at once
BOTH: list[Transport] = ["local", "grpc"]


@dataclass
class Request:
    """One request as its client sees it."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    tokens: list[int] = field(default_factory=list)
    news: list[News] = field(default_factory=list)
    path: str | None = None
    finish: str | None = None
    failed: Failed | None = None
    moved: Moved | None = None

    @property
    def is_over(self) -> bool:
        return self.finish is not None or self.failed is not None

    def oracle(self, fake: FakeSpec) -> list[int]:
        return fake_config(ENGINE, fake).model.oracle(self.prompt, self.params, seed=self.seed)


class Worker:
    """A worker process and this test's link to it."""

    def __init__(self, role: Role, transport: Transport, fake: FakeSpec, folder: Path, step_ms: float) -> None:
        engine = replace(ENGINE, max_step_ms=step_ms)
        spec = WorkerSpec(
            worker_id=f"{role}-1", pool=role, role=role, engine=engine, fake=fake, transports=(transport,)
        )
        path = folder / f"{role}.json"
        path.write_bytes(msgspec.json.encode(spec))
        self.log = (folder / f"{role}.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        self.worker_id = spec.worker_id
        self.requests: dict[str, Request] = {}
        self.beat: Heartbeat | None = None
        self.downs = 0
        self.link: LinkClient

    async def connect(self) -> None:
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        info = WorkerInfo(
            worker_id=self.worker_id,
            incarnation="",
            epoch=0,
            role="decode",
            state="starting",
            address=json.loads(line)["listening"],
        )
        self.link = LinkClient(info, "test", lambda _: None, self._on_beat, self._on_entries, self._on_down)
        self.link.start()
        await until(lambda: self.beat is not None and self.beat.info.state == "ready")

    def _on_beat(self, beat: Heartbeat) -> None:
        self.beat = beat

    def _on_down(self, worker_id: str) -> None:
        assert worker_id == self.worker_id
        self.downs += 1

    def _on_entries(self, worker_id: str, entries: tuple[Entry, ...]) -> None:
        assert worker_id == self.worker_id
        for entry in entries:
            if isinstance(entry, CacheNews | SourceFailed):
                continue
            request = self.requests[entry.request_id]
            if isinstance(entry, Tokens):
                assert entry.position == len(request.tokens), "a gap, or a token twice"
                request.tokens += entry.token_ids
                request.path = request.path or entry.path
                request.finish = entry.finish_reason
            elif isinstance(entry, News):
                request.news.append(entry)
            elif isinstance(entry, Failed):
                request.failed = entry
            elif isinstance(entry, Moved):
                request.moved = entry

    def info(self) -> WorkerInfo:
        assert self.beat is not None
        return self.beat.info

    def submit(self, request_id: str, request: Request, source: Worker) -> None:
        self.requests[request_id] = request
        ref = SourceRef(
            worker_id=source.worker_id, incarnation=source.info().incarnation, address=source.info().address
        )
        dispatch = Dispatch(
            request_id=request_id,
            attempt=1,
            incarnation=self.info().incarnation,
            epoch=self.info().epoch,
            prompt=np.array(request.prompt, dtype="<i4").tobytes(),
            choices=(Choice(index=0, seed=request.seed),),
            params=request.params,
            remaining_ms=60_000,
            sources=(ref,),
        )
        self.link.send(dispatch)

    def is_idle(self) -> bool:
        """Whether the last heartbeat shows no block that anybody holds."""
        assert self.beat is not None
        load = self.beat.load
        return not (load.num_referenced_blocks or load.num_quarantined_blocks or load.num_running or load.num_served)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    async def close(self) -> None:
        if hasattr(self, "link"):
            await self.link.close()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            stream.close()


@dataclass
class Pair:
    """The cluster under test."""

    decode: Worker
    prefill: Worker
    fake: FakeSpec


@asynccontextmanager
async def cluster(
    transport: Transport, fake: FakeSpec, folder: Path, step_ms: float = ENGINE.max_step_ms
) -> AsyncIterator[Pair]:
    decode = Worker("decode", transport, fake, folder, step_ms)
    prefill = Worker("prefill", transport, fake, folder, step_ms)
    try:
        await asyncio.gather(decode.connect(), prefill.connect())
        yield Pair(decode, prefill, fake)
    finally:
        await asyncio.gather(decode.close(), prefill.close())


async def until(condition: Callable[[], object], limit_s: float = 60) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 (what is awaited lies behind callbacks)
            await asyncio.sleep(0.005)


def make_request(number: int, num_tokens: int, max_tokens: int = 12) -> Request:
    prompt = np.random.default_rng(number).integers(3, FAST.vocab_size, num_tokens).tolist()
    params = SamplingParams(temperature=0.8 if number % 2 else 0.0, max_tokens=max_tokens)
    return Request(prompt, params, seed=1000 + number)


async def finish(pair: Pair, *requests: Request) -> None:
    """Wait for the ends, and compare every text with the oracle's."""
    await until(lambda: all(request.is_over for request in requests))
    for request in requests:
        assert request.failed is None
        assert request.tokens == request.oracle(pair.fake)


@pytest.mark.parametrize("transport", BOTH)
def test_every_text_equals_the_oracles_and_every_block_is_given_back(transport: Transport, tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(transport, FAST, tmp_path) as pair:
            requests = [make_request(i, 40 + 37 * i) for i in range(24)]
            for i, request in enumerate(requests):
                pair.decode.submit(f"r{i}", request, pair.prefill)
            await finish(pair, *requests)
            assert {request.path for request in requests} == {"prefill-decode"}
            again = Request(requests[9].prompt, requests[9].params, seed=5)  # held by the decode worker now
            pair.decode.submit("again", again, pair.prefill)
            await finish(pair, again)
            assert again.path == "decode-only"
            await until(lambda: pair.decode.is_idle() and pair.prefill.is_idle())

    asyncio.run(run())


async def _fault_in_mid_transfer(pair: Pair, number: signal.Signals) -> Request:
    request = make_request(1, 1500)
    pair.decode.submit("r", request, pair.prefill)
    await until(lambda: any(news.stage == "transferring" for news in request.news))
    assert not request.tokens
    os.kill(pair.prefill.process.pid, number)
    await finish(pair, request)
    return request


@pytest.mark.parametrize("transport", BOTH)
def test_a_source_killed_in_mid_transfer_changes_no_token(transport: Transport, tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(transport, SLOW, tmp_path) as pair:
            request = await _fault_in_mid_transfer(pair, signal.SIGKILL)
            assert request.path != "prefill-decode"  # the source did not get to the end
            await until(pair.decode.is_idle)
            await until(lambda: pair.prefill.downs == 1)

    asyncio.run(run())


@pytest.mark.parametrize("transport", BOTH)
def test_a_source_stopped_in_mid_transfer_changes_no_token(transport: Transport, tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(transport, SLOW, tmp_path) as pair:
            request = await _fault_in_mid_transfer(pair, signal.SIGSTOP)
            assert request.path != "prefill-decode"
            await until(pair.decode.is_idle)
            await until(lambda: pair.prefill.downs == 1)  # the keepalive of the link finds it too
            os.kill(pair.prefill.process.pid, signal.SIGCONT)
            await until(lambda: pair.prefill.link.is_up)
            await until(pair.prefill.is_idle)  # the call was the lease

    asyncio.run(run())


def _told(stage: str) -> Callable[[Request], object]:
    return lambda request: any(news.stage == stage for news in request.news)


LENGTH = 400
STAGES: dict[str, Callable[[Request], object]] = {
    "queued": _told("queued"),
    "prefilling": _told("prefilling"),
    "transferring": _told("transferring"),
    "first token": lambda request: request.tokens,
    "mid-stream": lambda request: len(request.tokens) >= LENGTH // 2,
    "last token": lambda request: len(request.tokens) >= LENGTH - 1,
    "after": lambda request: request.is_over,
}


@pytest.mark.parametrize("transport", BOTH)
def test_a_source_whose_rank_alone_is_stopped_changes_no_token_and_is_ended(
    transport: Transport, tmp_path: Path
) -> None:
    async def run() -> None:
        async with cluster(transport, SLOW, tmp_path) as pair:
            request = make_request(1, 1500)
            pair.decode.submit("r", request, pair.prefill)
            await until(lambda: any(news.stage == "transferring" for news in request.news))
            (rank,) = pair.prefill.children()
            rank.suspend()
            await finish(pair, request)
            assert request.path != "prefill-decode"
            assert await asyncio.to_thread(pair.prefill.process.wait, 60) == 1  # whoever started it starts it again
            assert psutil.wait_procs([rank], 30)[1] == []

    asyncio.run(run())


@pytest.mark.parametrize("transport", BOTH)
def test_an_abort_at_each_of_seven_stages_gives_every_block_back(transport: Transport, tmp_path: Path) -> None:
    async def run() -> None:
        # steps of up to 1 s: the news of each half second tell the long first chunk from the transfer after it
        async with cluster(transport, SLOW, tmp_path, step_ms=1000.0) as pair:
            for number, (stage, is_reached) in enumerate(STAGES.items()):
                victims = {f"{stage}-{number}": make_request(number, 1700, max_tokens=LENGTH)}
                if stage == "queued":
                    blocker = make_request(100, 2500)
                    pair.decode.submit("blocker", blocker, pair.prefill)
                    await until(lambda b=blocker: b.news)  # type: ignore[misc]
                    victims["blocker"] = blocker
                (name, request), *_ = victims.items()
                pair.decode.submit(name, request, pair.prefill)
                await until(lambda reached=is_reached, request=request: reached(request))  # type: ignore[misc]
                for victim in victims:
                    pair.decode.link.send(AbortRequest(request_id=victim, attempt=1))
                beats = pair.decode.beat, pair.prefill.beat
                await until(lambda b=beats: pair.decode.beat is not b[0] and pair.prefill.beat is not b[1])  # type: ignore[misc]
                await until(lambda: pair.decode.is_idle() and pair.prefill.is_idle())
                assert not request.is_over or stage in ("last token", "after")
                assert request.tokens == request.oracle(SLOW)[: len(request.tokens)]

    asyncio.run(run())


def test_a_broken_link_drops_its_requests(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster("local", SLOW, tmp_path) as pair:
            pair.decode.submit("r", make_request(1, 100, max_tokens=4000), pair.prefill)
            await until(lambda: pair.decode.requests["r"].tokens)
            pair.decode.link.drop("test")
            await until(lambda: pair.decode.downs == 1 and pair.decode.link.is_up)
            await until(pair.decode.is_idle)

    asyncio.run(run())


def test_no_process_outlives_a_worker_that_is_killed_or_whose_rank_dies(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster("local", FAST, tmp_path) as pair:
            (decode_rank,) = pair.decode.children()
            (prefill_rank,) = pair.prefill.children()
            pair.decode.process.kill()
            await asyncio.to_thread(decode_rank.wait, 60)
            prefill_rank.kill()
            assert await asyncio.to_thread(pair.prefill.process.wait, 60) == 1
            await until(lambda: pair.decode.downs == pair.prefill.downs == 1)

    asyncio.run(run())


def test_a_signal_drains_a_lost_parent_does_not_wait_and_both_exit_with_zero(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster("local", SLOW, tmp_path) as pair:
            children = [*pair.decode.children(), *pair.prefill.children()]
            request = make_request(1, 200, max_tokens=100)
            pair.decode.submit("r", request, pair.prefill)
            await until(lambda: request.tokens)
            pair.decode.process.terminate()
            await until(lambda: request.moved)
            assert request.moved is not None and request.moved.held_tokens >= 200 // 16 * 16
            assert request.tokens == request.oracle(pair.fake)[: len(request.tokens)], "up to where it stands"
            pair.decode.link.send(Release(request_id="r", attempt=1))
            assert await asyncio.to_thread(pair.decode.process.wait, 60) == 0
            assert pair.prefill.process.stdin is not None
            pair.prefill.process.stdin.close()
            assert await asyncio.to_thread(pair.prefill.process.wait, 60) == 0
            assert psutil.wait_procs(children, 0)[1] == []

    asyncio.run(run())


def test_the_network_process_imports_no_torch() -> None:
    code = "import cluster.worker.__main__, sys; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
