"""The answer to a generation request, streamed or whole.

1. The call is opened and the client is watched: `http.disconnect` cancels at once.
2. The status line is held back until the first token, or 10 s in a stream: failures before that are real 4xx and 5xx.
3. Each wake-up sends everything that has arrived in one piece.
4. After the status line a failure is an error event, never [DONE]. However it ends, the call is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import NeapError
from cluster.metrics import RouterMetrics
from cluster.router import sse
from cluster.router.answer import Delta
from cluster.router.call import Call
from cluster.router.openai.answers import AnswerFormat, Json

# tokens with logprobs in one body above which it is written off the event loop (20 alternatives each: some 10 ms)
INLINE_LOGPROBS = 500
PENDING = "pending"  # x-neap-path, while it is not known
ABORT = "neap.abort"  # key in the ASGI scope: breaks the connection at once, unsent bytes included


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What the client asked of the form of its answer. `ping_s`: how long a stream may be silent before its text."""

    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    ping_s: float = sse.PING_S


class GenerationResponse(Response):
    """Opens the call when it is sent, so that who opens also closes. `make_call` takes what breaks the connection."""

    def __init__(
        self,
        make_call: Callable[[Callable[[], None]], Call],
        answer_format: AnswerFormat,
        options: AnswerOptions,
        metrics: RouterMetrics,
    ):
        super().__init__()
        self._make_call = make_call
        self._format = answer_format
        self._options = options
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises NeapError while no status line has gone."""
        call = self._make_call(scope.get(ABORT, _nothing))
        watcher: asyncio.Task[None] | None = None
        try:
            call.open()
            watcher = asyncio.create_task(_watch(receive, call))
            if self._options.stream:
                await _Stream(call, self._format, self._options, self._metrics, send).run()
            else:
                await self._whole(call, send)
        finally:
            if call.gone:
                self._metrics.client_gone.inc()
            call.close()
            if watcher is not None:
                watcher.cancel()

    async def _whole(self, call: Call, send: Send) -> None:
        parts: dict[int, list[Delta]] = {index: [] for index in range(call.plan.num_choices)}
        while not call.done:
            deltas = await call.take()
            if call.gone:
                return
            for delta in deltas:
                parts[delta.choice].append(delta)

        def encode() -> bytes:
            return orjson.dumps(self._format.body([_join(index, parts[index]) for index in parts], call.usage))

        num_logprobs = sum(len(delta.tokens) for deltas in parts.values() for delta in deltas)
        body = encode() if num_logprobs <= INLINE_LOGPROBS else await asyncio.to_thread(encode)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-neap-path", (call.path or PENDING).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Stream:
    """One stream's state while it is sent."""

    def __init__(
        self, call: Call, answer_format: AnswerFormat, options: AnswerOptions, metrics: RouterMetrics, send: Send
    ):
        self._call = call
        self._format = answer_format
        self._options = options
        self._metrics = metrics
        self._send = send
        self._started = False
        self._header_said_pending = False
        self._opened: set[int] = set()
        self._ping_due = False
        self._ping_timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Send everything. Raises NeapError while no status line has gone."""
        self._arm_ping()
        try:
            await self._send_answer()
        except NeapError as error:
            if not self._started:
                raise
            if not self._call.gone:
                self._metrics.errors.labels(error.code).inc()
                await self._body(sse.error_event(error, self._call.plan.request_id), more=False)
        finally:
            if self._ping_timer is not None:
                self._ping_timer.cancel()

    async def _send_answer(self) -> None:
        call = self._call
        while not call.done:
            deltas = await call.take()
            if call.gone:
                return
            last = deltas[-1] if deltas and call.done else None
            out = b"".join(piece for delta in deltas for piece in self._pieces(delta, is_last=delta is last))
            if out:
                await self._start()
                await self._body(out)
            elif self._ping_due and not self._opened:
                await self._start()
                await self._body(sse.PING)
            self._ping_due = False
        end = sse.event(self._format.usage_chunk(call.usage)) if self._options.include_usage else b""
        await self._body(end + sse.DONE, more=False)

    def _pieces(self, delta: Delta, *, is_last: bool) -> list[bytes]:
        """The events of one delta, the choice's opening before the first."""
        pieces: list[bytes] = []
        if delta.choice not in self._opened:
            self._opened.add(delta.choice)
            first = self._format.first_chunk(delta.choice)
            if first is not None:
                pieces.append(self._event(first))
        chunk = self._format.chunk(delta)
        if is_last and self._header_said_pending and self._call.path is not None:
            chunk["neap"] = {"path": self._call.path}
        pieces.append(self._event(chunk))
        return pieces

    def _event(self, chunk: Json) -> bytes:
        if self._options.continuous_usage:
            chunk["usage"] = self._call.usage.to_json()
        elif self._options.include_usage:
            chunk["usage"] = None
        return sse.event(chunk)

    async def _start(self) -> None:
        if self._started:
            return
        self._started = True
        self._header_said_pending = self._call.path is None
        headers = [*sse.HEADERS, (b"x-neap-path", (self._call.path or PENDING).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _body(self, body: bytes, *, more: bool = True) -> None:
        self._call.inbox.blocked(True)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._call.inbox.blocked(False)

    def _arm_ping(self) -> None:
        self._ping_timer = asyncio.get_running_loop().call_later(self._options.ping_s, self._ping)

    def _ping(self) -> None:
        if not self._opened:
            self._ping_due = True
            self._call.inbox.wake()
            self._arm_ping()


async def _watch(receive: Receive, call: Call) -> None:
    """Wait for the client to go. The body has been read, so nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.leave()


def _join(choice: int, deltas: list[Delta]) -> Delta:
    """All of one choice in one."""
    return Delta(
        choice=choice,
        text="".join(delta.text for delta in deltas),
        tokens=[pair for delta in deltas for pair in delta.tokens],
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def _nothing() -> None:
    """Where the server can't break a connection (in-process clients) there is none to break."""
