"""A cluster for real faults: worker processes, and the real router, registry and TCP proxies in the test's event loop.

    client --HTTP--> RouterProcess --LinkClient--> [link proxy] --> worker process
                                                    worker -------> [fetch proxy] --> worker
The router runs here so that the test sees each link go up and down, and can put a proxy into each connection: the
links by connecting elsewhere, the Fetch calls by rewriting the addresses in each Dispatch. Nobody restarts workers
but the test itself.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
from msgspec import structs

from cluster.registry.registry import RegistryServer
from cluster.router.server import RouterProcess, listen
from cluster.router.workers import Link, LinkEvents
from cluster.rpc.link import LinkClient
from cluster.spec import FakeSpec, RouterSpec, WorkerSpec
from cluster.types import Dispatch, Heartbeat, RouterMessage, WorkerInfo
from engine.config import EngineConfig, Role
from engine.tiny.byte_tokenizer import write_byte_tokenizer
from tests.integration.fault_proxy import FaultProxy

MODEL = "ernie-fault"
LIMIT_S = 90.0  # of every wait: only there so that a fault of ours ends


@dataclass
class Answer:
    """What a client saw of one request."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    num_events: int = 0
    has_done: bool = False
    stamps: list[float] = field(default_factory=list)  # of each event, monotonic

    @property
    def told(self) -> tuple[Any, ...]:
        """What has to be the same with and without a fault."""
        return self.text, self.logprobs, self.finish, self.error, self.has_done


class _ProxiedLink:
    """A LinkClient to a worker's proxy, whose Dispatches name the sources' proxies."""

    def __init__(self, cluster: FaultCluster, link: LinkClient) -> None:
        self._cluster = cluster
        self._link = link
        self.start, self.drop, self.close = link.start, link.drop, link.close

    def send(self, message: RouterMessage) -> None:
        if isinstance(message, Dispatch):
            proxies = self._cluster.fetch_proxies
            sources = [
                structs.replace(
                    ref, address=proxies[ref.worker_id].address if ref.worker_id in proxies else ref.address
                )
                for ref in message.sources
            ]
            message = structs.replace(message, sources=tuple(sources))
        self._link.send(message)


class FaultCluster:
    """See the module. Use it through `fault_cluster`."""

    def __init__(
        self, folder: Path, *, fake: FakeSpec, engine: EngineConfig, proxied: bool, model_path: Path | None
    ) -> None:
        self.folder = folder
        self.fake = None if model_path else fake
        self.model_path = model_path or folder
        self.engine = replace(engine, model=str(model_path) if model_path else "fake", served_model_name=MODEL)
        self.proxied = proxied
        self.registry = RegistryServer()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.link_proxies: dict[str, FaultProxy] = {}
        self.fetch_proxies: dict[str, FaultProxy] = {}
        self.downs: dict[str, list[float]] = defaultdict(list)  # monotonic seconds of each broken link
        self.ups: dict[str, bool] = defaultdict(bool)
        self.infos: dict[str, WorkerInfo] = {}  # as last told over a link
        self.on_info: Callable[[WorkerInfo], None] = lambda _: None  # with each heartbeat
        self.client: httpx.AsyncClient
        self.router: RouterProcess
        self.running: asyncio.Task[None]
        self._ended: set[str] = set()  # incarnations
        self._proxies: list[FaultProxy] = []
        self._starting: list[asyncio.Task[None]] = []

    # ---- workers

    def start_worker(self, worker_id: str, *, failpoint: str = "") -> None:
        """Start a worker process (again). Its role is the part of the id before the dash."""
        self.reap(worker_id)
        role: Role = "prefill" if worker_id.startswith("prefill") else "decode"
        spec = WorkerSpec(
            worker_id=worker_id,
            pool="p",
            role=role,
            engine=replace(self.engine, role=role),
            fake=self.fake,
            registry=self.registry.address,
            transports=("grpc",) if self.proxied else ("local", "grpc"),
            **({"failpoint": failpoint} if failpoint else {}),  # type: ignore[arg-type]
        )
        path = self.folder / f"{worker_id}.json"
        path.write_bytes(msgspec.json.encode(spec))
        with (self.folder / f"{worker_id}.log").open("ab") as log:
            command = [sys.executable, "-m", "cluster.worker", str(path)]
            self.processes[worker_id] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def family(self, worker_id: str) -> list[psutil.Process]:
        """A worker's rank, then its network process."""
        process = psutil.Process(self.processes[worker_id].pid)
        return [*process.children(recursive=True), process]

    def signal(self, worker_id: str, number: signal.Signals, *, with_rank: bool = True) -> float:
        """Send a signal to a worker; the moment, in monotonic seconds."""
        for process in self.family(worker_id) if with_rank else self.family(worker_id)[-1:]:
            process.send_signal(number)
        return time.monotonic()

    def is_stopped(self, worker_id: str) -> bool:
        """Whether the network process is stopped by a signal."""
        return self.family(worker_id)[-1].status() == psutil.STATUS_STOPPED

    def is_down(self, worker_id: str) -> bool:
        """Whether the router's link to it is broken."""
        return not self.ups[worker_id]

    def is_gone(self, worker_id: str) -> bool:
        """Whether the network process has ended."""
        return self.processes[worker_id].poll() is not None

    def reap(self, worker_id: str) -> None:
        """End a worker and take its pipe away."""
        process = self.processes.pop(worker_id, None)
        if process is not None:
            self._ended.add(self.infos[worker_id].incarnation if worker_id in self.infos else "")
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    # ---- the router's links

    def connect(self, info: WorkerInfo, events: LinkEvents) -> Link:
        worker_id = info.worker_id

        def on_welcome(welcome: WorkerInfo) -> None:
            self.infos[worker_id], self.ups[worker_id] = welcome, True
            events.on_welcome(welcome)

        def on_heartbeat(beat: Heartbeat) -> None:
            self.infos[worker_id] = beat.info
            self.on_info(beat.info)
            events.on_heartbeat(beat)

        def on_down(down_id: str) -> None:
            self.downs[worker_id].append(time.monotonic())
            self.ups[worker_id] = False
            events.on_down(down_id)

        if not self.proxied:
            return LinkClient(info, "faults", on_welcome, on_heartbeat, events.on_entries, on_down)
        self._put_proxies(info)
        near = structs.replace(info, address=self.link_proxies[worker_id].address)
        link = LinkClient(near, "faults", on_welcome, on_heartbeat, events.on_entries, on_down)
        return _ProxiedLink(self, link)

    def _put_proxies(self, info: WorkerInfo) -> None:
        for proxies in (self.link_proxies, self.fetch_proxies):
            proxy = proxies[info.worker_id] = FaultProxy(info.address)
            self._proxies.append(proxy)
            self._starting.append(asyncio.get_running_loop().create_task(proxy.start()))

    async def close_proxies(self) -> None:
        await asyncio.gather(*self._starting)
        for proxy in self._proxies:
            await proxy.close()

    # ---- what is seen

    async def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = (await self.client.get("/status")).json()
        return answer

    async def ready(self) -> set[str]:
        """Workers that the router has a standing link to, and that are ready. What was ended here does not count."""
        workers = (await self.status())["workers"]
        standing = [w for w in workers if (w["link"], w["state"]) == ("up", "ready") and w["load"]]
        return {w["worker_id"] for w in standing if w["incarnation"] not in self._ended}

    async def is_idle(self) -> bool:
        """Whether nobody holds anything, anywhere, as of the last heartbeats."""
        status = await self.status()
        busy = status["requests"]["queued"] + status["requests"]["running"]
        for worker in status["workers"]:
            if worker["link"] != "up" or not worker["load"]:
                return False
            load = worker["load"]
            busy += load["running"] + load["waiting"] + load["served"]
            busy += load["paused"] + load["referenced_blocks"] + load["quarantined_blocks"]
        return bool(busy == 0)

    async def until(self, wanted: Callable[[], Any], what: str) -> None:
        """Wait for something, a bool or what can be awaited for one."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            value = wanted()
            if (await value) if asyncio.iscoroutine(value) else value:
                return
            assert time.monotonic() < deadline and not self.running.done(), what
            await asyncio.sleep(0.02)

    async def until_ready(self, *worker_ids: str) -> None:
        async def are_ready() -> bool:
            return set(worker_ids) <= await self.ready()

        await self.until(are_ready, f"{worker_ids} never ready")

    # ---- clients

    async def ask(self, body: dict[str, Any], answer: Answer) -> Answer:
        """Stream one completion into `answer`."""
        request = {"model": MODEL, "stream": True, **body}
        async with self.client.stream("POST", "/v1/completions", json=request) as response:
            if response.status_code != 200:
                answer.error = json.loads(await response.aread())["error"]["code"]
                return answer
            rest = b""
            async for data in response.aiter_bytes():  # not aiter_lines: it also ends lines at U+2028 and the like
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        _take(answer, line.removeprefix(b"data: "))
        return answer

    async def ask_all(self, bodies: list[dict[str, Any]]) -> list[Answer]:
        """All at once; what each client saw."""
        return list(await asyncio.gather(*(self.ask(body, Answer()) for body in bodies)))


def _take(answer: Answer, data: bytes) -> None:
    assert not answer.has_done, "something came after the end"
    answer.num_events += 1
    answer.stamps.append(time.monotonic())
    if data.strip() == b"[DONE]":
        answer.has_done = True
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = event["error"]["code"]
        return
    for choice in event["choices"]:
        answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
        if choice.get("logprobs"):
            logprobs = choice["logprobs"]
            answer.logprobs += list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


@asynccontextmanager
async def fault_cluster(
    folder: Path,
    workers: dict[str, str],
    *,
    fake: FakeSpec,
    engine: EngineConfig,
    proxied: bool = False,
    model_path: Path | None = None,
) -> AsyncIterator[FaultCluster]:
    """The workers (id -> failpoint, or "") and a router, ready; ended afterwards, the workers' logs printed."""
    cluster = FaultCluster(folder, fake=fake, engine=engine, proxied=proxied, model_path=model_path)
    if model_path is None:
        write_byte_tokenizer(folder)
    await cluster.registry.start()
    spec = RouterSpec(
        router_id="faults",
        model_path=str(cluster.model_path),
        served_model_name=MODEL,
        registry=cluster.registry.address,
        port=0,
        policy="least-loaded",  # names a source always
    )
    sock = listen(spec)
    cluster.router = RouterProcess(spec, connect=cluster.connect)
    listening = asyncio.Event()
    cluster.running = asyncio.create_task(cluster.router.run(sock, lambda *_: listening.set()))
    try:
        for worker_id, failpoint in workers.items():
            cluster.start_worker(worker_id, failpoint=failpoint)
        await listening.wait()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=limits) as cluster.client:
            await cluster.until_ready(*workers)
            yield cluster
    finally:
        await _end(cluster)
        sock.close()


async def _end(cluster: FaultCluster) -> None:
    for worker_id in list(cluster.processes):
        cluster.reap(worker_id)
    cluster.router.stop()
    cluster.router.stop()
    await asyncio.wait({cluster.running}, timeout=30)
    await cluster.close_proxies()
    await cluster.registry.stop()
    print("".join(f"--- {log.name}\n{log.read_text()[-2500:]}" for log in sorted(cluster.folder.glob("*.log"))))
