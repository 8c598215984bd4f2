"""A rank as a real process with the exact fake: start, work, death from both sides, shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cluster.spec import FakeSpec
from cluster.worker.engine_loop import EngineLoop, layout_of, map_kv_memory
from cluster.worker.rank import fake_config
from engine.config import EngineConfig
from engine.messages import Add, NewTokens, RankProgress, RankReady, StepEvents
from engine.request import SamplingParams

ENGINE = EngineConfig(model="fake")
FAKE = FakeSpec(num_blocks=64)
PROMPT = list(range(3, 43))


@dataclass
class Shell:
    """Keeps what the rank tells."""

    ready: RankReady | None = None
    tokens: list[NewTokens] = field(default_factory=list)
    steps: int = 0
    deaths: list[str] = field(default_factory=list)

    def on_progress(self, progress: RankProgress) -> None:
        pass

    def on_ready(self, ready: RankReady) -> None:
        self.ready = ready

    def on_step_events(self, events: StepEvents) -> None:
        self.steps += 1
        self.tokens += events.tokens

    def on_death(self, reason: str) -> None:
        self.deaths.append(reason)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (what is awaited lies behind callbacks)
            await asyncio.sleep(0.005)


def add(max_tokens: int = 20) -> Add:
    return Add(
        request_id="a",
        prompt=np.array(PROMPT, dtype="<i4").tobytes(),
        params=SamplingParams(max_tokens=max_tokens),
        seed=7,
    )


def test_a_rank_generates_what_the_oracle_says_and_leaves_when_asked() -> None:
    async def run() -> int:
        shell = Shell()
        loop = EngineLoop(ENGINE, FAKE, shell)
        loop.start()
        await until(lambda: shell.ready)
        loop.send(add())
        await until(lambda: shell.tokens and shell.tokens[-1].finish_reason)
        got = [token for tokens in shell.tokens for token in tokens.token_ids]
        model = fake_config(ENGINE, FAKE).model
        assert got == model.oracle(PROMPT, SamplingParams(max_tokens=20), seed=7)
        assert loop.step_count >= shell.steps > 0
        await loop.close()
        assert shell.deaths == []
        return loop.pid

    assert not os.path.exists(f"/proc/{asyncio.run(run())}")


def test_the_network_side_maps_the_kv_memory_and_sees_the_ranks_writes() -> None:
    async def run() -> None:
        shell = Shell()
        loop = EngineLoop(ENGINE, FAKE, shell)
        loop.start()
        await until(lambda: shell.ready)
        assert shell.ready is not None
        memory = map_kv_memory(shell.ready)
        assert memory is not None
        assert memory.layout == layout_of(shell.ready)
        assert not memory.bytes6.any()
        loop.send(add())
        await until(lambda: shell.tokens)
        assert memory.bytes6.any()
        await loop.close()
        memory.close()

    asyncio.run(run())


def test_a_rank_that_is_killed_is_noticed_once() -> None:
    async def run() -> None:
        shell = Shell()
        loop = EngineLoop(ENGINE, FAKE, shell)
        loop.start()
        await until(lambda: shell.ready)
        os.kill(loop.pid, signal.SIGKILL)
        await until(lambda: shell.deaths)
        loop.send(add())
        assert shell.deaths == ["the rank exited with code -9"]
        await loop.close()

    asyncio.run(run())


def test_a_rank_that_cannot_build_says_why() -> None:
    async def run() -> None:
        shell = Shell()
        loop = EngineLoop(ENGINE, FakeSpec(vocab_size=2), shell)
        loop.start()
        await until(lambda: shell.deaths)
        assert "vocabulary" in shell.deaths[0]
        await loop.close()

    asyncio.run(run())


def test_a_stopped_rank_shows_a_step_that_grows_old() -> None:
    async def run() -> None:
        shell = Shell()
        loop = EngineLoop(ENGINE, FakeSpec(fixed_ms=50), shell)
        loop.start()
        await until(lambda: shell.ready)
        loop.send(add(max_tokens=4000))
        while not loop.step_age_ms():
            os.kill(loop.pid, signal.SIGCONT)
            await asyncio.sleep(0.02)
            os.kill(loop.pid, signal.SIGSTOP)  # most likely within a step
        await until(lambda: loop.step_age_ms() > 500)
        count = loop.step_count
        os.kill(loop.pid, signal.SIGCONT)
        await until(lambda: loop.step_count > count)
        await loop.close()

    asyncio.run(run())


def test_signals_are_left_to_the_parent() -> None:
    async def run() -> None:
        shell = Shell()
        loop = EngineLoop(ENGINE, FAKE, shell)
        loop.start()
        await until(lambda: shell.ready)
        os.kill(loop.pid, signal.SIGINT)
        os.kill(loop.pid, signal.SIGTERM)
        loop.send(add())
        await until(lambda: shell.tokens and shell.tokens[-1].finish_reason)
        assert shell.deaths == []
        await loop.close()

    asyncio.run(run())


_PARENT = """
import asyncio, sys
from cluster.spec import FakeSpec
from cluster.worker.engine_loop import EngineLoop
from engine.config import EngineConfig

class Shell:
    def on_progress(self, progress): ...
    def on_ready(self, ready): print(loop.pid, flush=True)
    def on_step_events(self, events): ...
    def on_death(self, reason): ...

async def run():
    global loop
    loop = EngineLoop(EngineConfig(model="fake"), FakeSpec(num_blocks=8), Shell())
    loop.start()
    assert "torch" not in sys.modules
    await asyncio.sleep(600)

asyncio.run(run())
"""


def test_a_rank_dies_with_its_parent_and_the_parent_needs_no_torch() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    rank = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{rank}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{rank}")
