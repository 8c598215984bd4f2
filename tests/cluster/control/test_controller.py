"""The controller with a scripted backend: what dies is told, forgotten and restarted; what can't start is given up."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.config import Sources, load_config
from cluster.control.backend import LaunchError, Needs, WorkerStatus
from cluster.control.controller import Controller
from cluster.registry.registry import RegistryClient
from cluster.spec import WorkerSpec
from cluster.types import WorkerInfo
from tests.cluster.registry.keepers import RedisKeeper
from tests.cluster.registry.keepers import running as keeping

DEADLINE_S = 30.0
_ROUTER = "import sys, json; print(json.dumps({'listening': '127.0.0.1:1'}), flush=True); sys.stdin.read()"


def silent_router(spec: Path) -> list[str]:
    """A router that binds nothing and waits for its end."""
    return [sys.executable, "-c", _ROUTER]


@dataclass(kw_only=True)
class ScriptedBackend:
    """Launches nothing; tests set what it answers."""

    launched: list[WorkerSpec] = field(default_factory=list)
    needs: dict[str, Needs] = field(default_factory=dict)
    answers: dict[str, WorkerStatus] = field(default_factory=dict)
    stopped: bool = False
    notes: tuple[tuple[str, str], ...] = ()
    own_address: str = "127.0.0.1"

    async def start(self) -> None:
        """Nothing to start."""

    async def launch(self, spec: WorkerSpec, needs: Needs) -> None:
        self.launched.append(spec)
        self.needs[spec.worker_id] = needs
        self.answers[spec.worker_id] = WorkerStatus(worker_id=spec.worker_id, alive=True)

    async def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(self.answers.values())

    async def stop(self, grace_s: float) -> None:
        self.stopped = True

    def end(self, worker_id: str, words: str = "gone", failed: bool = False) -> None:
        self.answers[worker_id] = WorkerStatus(worker_id=worker_id, alive=False, last_words=words, failed=failed)


@dataclass(kw_only=True)
class Running:
    """A started controller and what belongs to it."""

    controller: Controller
    backend: ScriptedBackend
    told: list[str]
    task: asyncio.Task[None]

    async def until(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not wanted() and not self.task.done():  # noqa: ASYNC110 (the backend's polling tells nobody)
                await asyncio.sleep(0.02)
        assert wanted()


@contextlib.asynccontextmanager
async def running(tmp_path: Path, *sets: str) -> AsyncIterator[Running]:
    async def model() -> str:
        return str(tmp_path)

    told: list[str] = []
    backend = ScriptedBackend()
    config = load_config(Sources(sets=["engine.threads=2", "backend=process", *sets]))
    controller = Controller(config, backend, run_dir=tmp_path, tell=told.append, router_argv=silent_router)
    await controller.start(model())
    task = asyncio.create_task(controller.run())
    try:
        yield Running(controller=controller, backend=backend, told=told, task=task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await controller.stop(hurry=asyncio.Event())
        assert backend.stopped


def info_of(spec: WorkerSpec) -> WorkerInfo:
    return WorkerInfo(
        worker_id=spec.worker_id, incarnation="a" * 32, epoch=1, role=spec.role, state="ready", address="127.0.0.1:9"
    )


def test_a_worker_that_dies_is_told_taken_from_the_map_and_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as r:
            first = r.backend.launched[1]
            assert [s.worker_id for s in r.backend.launched] == ["prefill-0", "decode-0"]
            assert r.backend.needs["decode-0"] == Needs(num_cpus=2)
            client = RegistryClient(first.registry)
            await client.put(info_of(first), 60_000)
            await r.until(lambda: r.controller.snapshot().workers[1].state == "ready")
            r.backend.end("decode-0", "SIGKILL")
            await r.until(lambda: len(r.backend.launched) == 3)
            assert r.backend.launched[2].worker_id == "decode-0"
            assert any("decode-0 ended: SIGKILL" in line for line in r.told)
            assert r.controller.snapshot().workers[1].state == "launching"
            await client.close()

    asyncio.run(scenario())


def test_a_worker_that_says_that_it_cannot_start_ends_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as r:
            r.backend.end("prefill-0", "no such dtype", failed=True)
            with pytest.raises(LaunchError, match="prefill-0 does not start: no such dtype"):
                await asyncio.wait_for(r.task, DEADLINE_S)

    asyncio.run(scenario())


def test_a_worker_that_keeps_dying_before_it_was_ready_ends_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as r:

            async def keep_ending() -> None:
                while not r.task.done():
                    r.backend.end("prefill-0")
                    await asyncio.sleep(0.05)

            await asyncio.wait_for(keep_ending(), DEADLINE_S)
            with pytest.raises(LaunchError, match="prefill-0 does not start: gone"):
                r.task.result()
            assert len(r.backend.launched) == 4  # two workers, and two more tries of one

    asyncio.run(scenario())


def test_redis_keeps_the_map_and_the_last_one_holds_while_it_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keeping("redis") as keeper:
            assert isinstance(keeper, RedisKeeper)
            async with running(tmp_path, f"registry={keeper.url}", "routers=2") as r:
                assert {spec.registry for spec in r.backend.launched} == {keeper.url}
                assert len(r.controller._routers.names) == 2
                first = r.backend.launched[1]
                registry = keeper.client()
                await registry.put(info_of(first), 60_000)
                await r.until(lambda: r.controller.snapshot().workers[1].state == "ready")
                await keeper.stop()
                await asyncio.sleep(0.2)
                assert r.controller.snapshot().workers[1].state == "ready"
                r.backend.end("decode-0", "SIGKILL")
                await r.until(lambda: len(r.backend.launched) == 3)
                await keeper.start()
                await registry.put(info_of(first), 60_000)
                await r.until(lambda: r.controller.snapshot().workers[1].state == "ready")
                await registry.close()

    asyncio.run(scenario())


def test_a_redis_that_does_not_answer_ends_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(LaunchError, match="registry at"):
            async with running(tmp_path, "registry=redis://127.0.0.1:1/0"):
                pass

    asyncio.run(scenario())


def test_a_router_that_dies_is_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as r:
            router = r.controller._routers._children["router"]
            await r.until(lambda: bool(router.listening))
            router.kill()
            await r.until(lambda: r.controller._routers._children["router"] is not router)
            assert any(line.startswith("router ended") for line in r.told)

    asyncio.run(scenario())
