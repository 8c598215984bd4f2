"""A router with in-memory workers at the link's seam: the real dispatcher, shell, app and text, no gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import structs

from cluster.metrics import RouterMetrics
from cluster.router.app import create_app
from cluster.router.dispatch import Dispatcher
from cluster.router.openai.sampling import load_defaults
from cluster.router.policies import policy_named
from cluster.router.server import RouterProcess, listen
from cluster.router.service import RouterService
from cluster.router.workers import LinkEvents, WorkerLinks
from cluster.spec import RouterSpec
from cluster.types import (
    AbortRequest,
    Dispatch,
    Failed,
    Heartbeat,
    News,
    PromptScores,
    RouterMessage,
    Tokens,
    WorkerInfo,
)
from engine.messages import Load
from engine.request import FinishReason
from engine.scheduler.batch import TokenLogprobs
from engine.text.tokenizer import Tokenizer
from engine.tiny.byte_tokenizer import write_byte_tokenizer

MODEL = "ernie-test"


@dataclass(kw_only=True)
class Behaviour:
    """What a stub worker does with a request."""

    text: str = "Hello, world"
    step_s: float = 0.0
    first_token_s: float = 0.0
    hang: bool = False  # News, then nothing
    fail: str = ""  # a code, before any token
    fail_after: int = -1  # tokens, then the code "internal_error"
    die_after: int = -1  # tokens, then the link breaks
    path: str = "prefill-decode"


@dataclass(kw_only=True)
class StubWorker:
    """Answers a Dispatch with `behaviour.text`, one token of each choice per step. Records what it was sent."""

    info: WorkerInfo
    tokenizer: Tokenizer
    behaviour: Behaviour = field(default_factory=Behaviour)
    dispatched: list[Dispatch] = field(default_factory=list)
    aborted: list[AbortRequest] = field(default_factory=list)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    events: LinkEvents | None = None

    def connect(self, events: LinkEvents) -> StubLink:
        self.events = events
        return StubLink(self)

    def take(self, message: RouterMessage) -> None:
        if isinstance(message, Dispatch):
            self.dispatched.append(message)
            task = asyncio.get_running_loop().create_task(self._answer(message))
            self.running[message.request_id] = task
            task.add_done_callback(lambda _: self.running.pop(message.request_id, None))
        elif isinstance(message, AbortRequest):
            self.aborted.append(message)
            running = self.running.get(message.request_id)
            if running is not None:
                running.cancel()

    async def _answer(self, dispatch: Dispatch) -> None:
        does = self.behaviour
        key, attempt = dispatch.request_id, dispatch.attempt
        self._say(News(request_id=key, attempt=attempt, stage="prefilling"))
        if does.hang:
            await asyncio.sleep(3600)
        await asyncio.sleep(does.first_token_s)
        if does.fail:
            self._say(Failed(request_id=key, attempt=attempt, code=does.fail))
            return
        self._say(*self._scores(dispatch))
        eos = self.tokenizer.eos_token_ids[0]
        ids = self.tokenizer.encode(does.text)
        if dispatch.params.ignore_eos:
            ids = ids * (dispatch.params.max_tokens or 1)
        else:
            ids = [*ids, eos]
        ids = ids[: dispatch.params.max_tokens]
        for position, token in enumerate(ids):
            if position == does.fail_after:
                self._say(Failed(request_id=key, attempt=attempt, code="internal_error"))
                return
            if position == does.die_after:
                assert self.events is not None
                self.events.on_down(self.info.worker_id)
                return
            last = position == len(ids) - 1
            reason = None if not last else FinishReason.STOP if token == eos else FinishReason.LENGTH
            self._say(*(self._tokens(dispatch, choice.index, position, token, reason) for choice in dispatch.choices))
            await asyncio.sleep(does.step_s)

    def _scores(self, dispatch: Dispatch) -> tuple[PromptScores, ...]:
        """Logprob -i for prompt token i, in two pieces."""
        num_top, num_tokens = dispatch.params.prompt_logprobs, len(dispatch.prompt) // 4
        if num_top is None:
            return ()
        scores = [
            TokenLogprobs(logprob=-float(i), top_ids=(65, 66)[:num_top], top_logprobs=(-0.5, -0.75)[:num_top])
            for i in range(1, num_tokens)
        ]
        half = len(scores) // 2
        pieces = ((1, scores[:half]), (1 + half, scores[half:]))
        return tuple(
            PromptScores(
                request_id=dispatch.request_id, attempt=dispatch.attempt, first_position=first, logprobs=tuple(piece)
            )
            for first, piece in pieces
            if piece
        )

    def _tokens(
        self, dispatch: Dispatch, choice: int, position: int, token: int, reason: FinishReason | None
    ) -> Tokens:
        top = dispatch.params.logprobs
        ids = (token, *(other for other in range(20, 45) if other != token))[: top or 0]
        entry = TokenLogprobs(logprob=-0.5, top_ids=ids, top_logprobs=tuple(-0.5 - i for i in range(len(ids))))
        return Tokens(
            request_id=dispatch.request_id,
            attempt=dispatch.attempt,
            choice=choice,
            position=position,
            token_ids=(token,),
            logprobs=() if top is None else (entry,),
            finish_reason=reason,
            stop_token=token if reason == FinishReason.STOP else None,
            num_cached_tokens=3,
            path=self.behaviour.path if position == 0 else None,  # type: ignore[arg-type]
        )

    def _say(self, *entries: Tokens | PromptScores | News | Failed) -> None:
        assert self.events is not None
        self.events.on_entries(self.info.worker_id, entries)


@dataclass(kw_only=True)
class StubLink:
    """workers.Link in memory."""

    worker: StubWorker
    _beating: asyncio.Task[None] | None = None

    def __init__(self, worker: StubWorker):
        self.worker = worker
        self._beating = None

    def start(self) -> None:
        assert self.worker.events is not None
        self.worker.events.on_welcome(self.worker.info)
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            assert self.worker.events is not None
            load = Load(
                num_running=len(self.worker.running), num_blocks=100, num_free_blocks=75, num_referenced_blocks=25
            )
            self.worker.events.on_heartbeat(Heartbeat(info=self.worker.info, load=load, step_count=7))
            await asyncio.sleep(0.3)

    def send(self, message: RouterMessage) -> None:
        self.worker.take(message)

    def drop(self, reason: str) -> None:
        assert self.worker.events is not None
        self.worker.events.on_down(self.worker.info.worker_id)

    async def close(self) -> None:
        for task in [*self.worker.running.values(), *([self._beating] if self._beating else [])]:
            task.cancel()


@dataclass(kw_only=True)
class Rig:
    """What a test holds of a running router."""

    service: RouterService
    links: WorkerLinks
    workers: dict[str, StubWorker]
    client: httpx.AsyncClient
    app: Any

    @property
    def decode(self) -> StubWorker:
        return self.workers["decode-1"]

    def behave(self, **changes: Any) -> None:
        self.decode.behaviour = replace(self.decode.behaviour, **changes)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer and generation_config.json (temperature 0.8, top_p 0.8)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_byte_tokenizer(folder)
    return folder


def worker_info(worker_id: str, **changes: Any) -> WorkerInfo:
    base = WorkerInfo(
        worker_id=worker_id,
        incarnation=f"{worker_id}-{'0' * 24}",
        epoch=1,
        role="prefill" if worker_id.startswith("prefill") else "decode",
        state="ready",
        address=f"stub:{worker_id}",
        model=MODEL,
        max_model_len=512,
        max_num_seqs=64,
        vocab_size=288,
        pool="pool-0",
    )
    return structs.replace(base, **changes)


@pytest.fixture
def spec(checkpoint: Path) -> RouterSpec:
    return RouterSpec(router_id="router-1", model_path=str(checkpoint), served_model_name=MODEL, registry="", port=0)


def stub_workers(checkpoint: Path) -> dict[str, StubWorker]:
    tokenizer = Tokenizer.load(checkpoint)
    return {name: StubWorker(info=worker_info(name), tokenizer=tokenizer) for name in ("decode-1", "prefill-1")}


@pytest.fixture
def rig(spec: RouterSpec, checkpoint: Path) -> Callable[..., Any]:
    """`async with rig() as r`: a router whose workers are up, and an httpx client on its app."""

    @asynccontextmanager
    async def make(*, ready: bool = True, **changes: Any) -> AsyncIterator[Rig]:
        chosen = msgspec.structs.replace(spec, **changes)
        workers = stub_workers(checkpoint)
        dispatcher = Dispatcher(policy_named("least-loaded"), Random(1))
        metrics, loop = RouterMetrics(), asyncio.get_running_loop()
        links = WorkerLinks(
            dispatcher,
            lambda info, events: workers[info.worker_id].connect(events),
            metrics=metrics,
            clock=loop.time,
        )
        service = RouterService(
            chosen,
            links,
            metrics=metrics,
            text=workers["decode-1"].tokenizer if ready else None,
            defaults=load_defaults(checkpoint),
            clock=loop.time,
        )
        if ready:
            links.on_map(tuple(worker.info for worker in workers.values()))
        app = create_app(chosen, service, dispatcher.status)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
            yield Rig(service=service, links=links, workers=workers, client=client, app=app)
        await links.close()
        service.close()

    return make


@dataclass(kw_only=True)
class Live:
    """A router behind a real socket, on a thread of its own."""

    process: RouterProcess
    workers: dict[str, StubWorker]
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def decode(self) -> StubWorker:
        return self.workers["decode-1"]

    def call(self, function: Callable[[], Any]) -> Any:
        """Run something on the router's loop and wait for its result."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)


@pytest.fixture
def live(spec: RouterSpec, checkpoint: Path) -> Callable[..., Any]:
    """`with live() as l`: the server as it runs in its process, with stub workers."""

    @contextmanager
    def make(**changes: Any) -> Iterator[Live]:
        chosen = msgspec.structs.replace(spec, **changes)
        workers = stub_workers(checkpoint)
        made: list[Live] = []
        listening = Event()

        async def main() -> None:
            process = RouterProcess(chosen, connect=lambda info, events: workers[info.worker_id].connect(events))
            await process.service.load_text()
            process.service.links.on_map(tuple(worker.info for worker in workers.values()))

            def on_listening(host: str, port: int) -> None:
                made.append(Live(process=process, workers=workers, port=port, loop=asyncio.get_running_loop()))
                listening.set()

            await process.run(listen(chosen), on_listening)

        thread = Thread(target=lambda: asyncio.run(main()))
        thread.start()
        assert listening.wait(30), "the server did not start"
        try:
            yield made[0]
        finally:
            made[0].loop.call_soon_threadsafe(made[0].process.abandon)
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"

    return make
