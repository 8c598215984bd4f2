"""The router's process: sockets, signals, start and stop.

1. bind, serve /health at once; the tokenizer loads and the registry is watched meanwhile
2. SIGTERM or SIGINT: admit nothing more (503 shutting_down), let streams finish for DRAIN_S, end the rest with an
   error event, close links and sockets. A second signal, or the parent's end, cuts the waiting short.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

import uvicorn
import uvloop
from prometheus_client import disable_created_metrics
from starlette.types import ASGIApp

from cluster.metrics import RouterMetrics
from cluster.registry.connect import connect
from cluster.router.app import create_app
from cluster.router.dispatch import Dispatcher
from cluster.router.metrics_port import metrics_app
from cluster.router.policies import policy_named
from cluster.router.protocol import BoundedHttpProtocol
from cluster.router.service import RouterService
from cluster.router.workers import Connect, Link, LinkEvents, WorkerLinks
from cluster.rpc.link import LinkClient
from cluster.spec import RouterSpec
from cluster.types import WorkerInfo
from cluster.worker.lifeline import is_pipe, watch_pipe

DRAIN_S = 20.0  # below the controller's patience
CLOSE_S = 2.0  # for connections whose answers are written
KEEP_ALIVE_S = 65
BACKLOG = 1024
GC_THRESHOLD = (5000, 20, 50)

log = logging.getLogger("neap.router")


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class RouterProcess:
    """Everything of one router, on one event loop. Raises ValueError for a spec that can't be."""

    def __init__(self, spec: RouterSpec, *, connect: Connect | None = None):
        self.spec = spec
        self._metrics = RouterMetrics()
        self._dispatcher = Dispatcher(
            policy_named(spec.policy),
            Random(spec.router_id),
            max_waiting=spec.max_queue + spec.max_running,
            may_be_alone=not spec.require_prefill,
        )
        self._links = WorkerLinks(
            self._dispatcher, connect or self._connect, metrics=self._metrics, clock=time.monotonic
        )
        self.service = RouterService(spec, self._links, metrics=self._metrics)
        self._server = _server(create_app(spec, self.service, self._dispatcher.status))
        self._metrics_server = _server(metrics_app(self._metrics, spec.api_key)) if spec.metrics_port else None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def _connect(self, info: WorkerInfo, events: LinkEvents) -> Link:
        return LinkClient(
            info, self.spec.router_id, events.on_welcome, events.on_heartbeat, events.on_entries, events.on_down
        )

    def stop(self) -> None:
        """Begin to drain; the second time: stop waiting."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def abandon(self) -> None:
        """Whoever started us is gone: nobody is left to wait."""
        log.warning("the process that started this one is gone")
        self._stop.set()
        self._hurry.set()

    async def run(self, sock: socket.socket, on_listening: Callable[[str, int], None]) -> None:
        """Serve until stopped. Raises ValueError when the checkpoint's folder has no tokenizer."""
        registry = connect(self.spec.registry) if self.spec.registry else None
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            background = [group.create_task(self.service.load_text()), group.create_task(self.service.measure_lag())]
            if registry is not None:
                background.append(group.create_task(self._links.follow(registry.watch())))
            serving = [group.create_task(self._server.serve(sockets=[sock]))]
            if self._metrics_server is not None:
                own = stack.enter_context(contextlib.closing(listen(self.spec, self.spec.metrics_port)))
                serving.append(group.create_task(self._metrics_server.serve(sockets=[own])))
            host, port = sock.getsockname()[:2]
            on_listening(host, port)
            await self._stop.wait()
            await self._drain()
            self._server.should_exit = True
            if self._metrics_server is not None:
                self._metrics_server.should_exit = True
            await asyncio.wait(serving)
            for task in background:
                task.cancel()
        await self._links.close()
        self.service.close()
        if registry is not None:
            await registry.close()

    async def _drain(self) -> None:
        log.info("stopping: %d requests are running", self._links.num_requests)
        draining = asyncio.create_task(self.service.drain(DRAIN_S))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        hurrying.cancel()
        await self.service.drain(0.0)


def _server(app: ASGIApp) -> _Server:
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(CLOSE_S),
    )
    return _Server(config)


def listen(spec: RouterSpec, port: int | None = None) -> socket.socket:
    """A listening socket whose connections get a small send buffer, so that a client that doesn't read is noticed.

    `port` None: the one of the API.
    Raises OSError if the port is taken.
    """
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted sockets inherit it; the kernel doubles it for its own book-keeping
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, spec.stream_buffer_bytes // 4)
        sock.bind((spec.host.strip("[]"), spec.port if port is None else port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def run_router(spec: RouterSpec, on_listening: Callable[[str, int], None]) -> None:
    """Run a router until a signal, or until the parent's pipe on stdin ends. Raises OSError, ValueError."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
    sock = listen(spec)

    async def main() -> None:
        process = RouterProcess(spec)
        # what is here by now stays; a full collection would walk all of it while every stream waits. Streams leave few
        # cycles behind them, so looking for some at every 700 objects (17 tokens) is too often
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, process.stop)
        if is_pipe(sys.stdin.fileno()):
            watch_pipe(sys.stdin.fileno(), partial(loop.call_soon_threadsafe, process.abandon))
        await process.run(sock, on_listening)

    with contextlib.closing(sock), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(main())
        except ExceptionGroup as group:  # of the tasks; a wrong checkpoint folder is the user's
            values = group.subgroup(ValueError)
            if values is None:
                raise
            raise ValueError(str(values.exceptions[0])) from None
