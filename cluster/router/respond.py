"""The answer to a generation request, streamed or whole.

1. The call is opened and the client is watched: `http.disconnect` cancels at once.
2. A stream is sent by stream.py, its status line held back until the first text; a whole answer when all of it is here.
   Failures before the status line are real 4xx and 5xx.
3. After the status line a failure is an error event, never [DONE]. However it ends, the call is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.metrics import RouterMetrics
from cluster.router.answer import Delta
from cluster.router.call import Call
from cluster.router.openai.answers import AnswerFormat
from cluster.router.stream import PENDING, AnswerOptions, EventStream, label_header

# tokens with logprobs in one body above which it is written off the event loop (20 alternatives each: some 10 ms)
INLINE_LOGPROBS = 500
# keys in the ASGI scope, put there by protocol.py
ABORT = "neap.abort"  # breaks the connection at once, unsent bytes included
WRITER = "neap.writer"  # a stream.ChunkWriter for this response


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
                writer = scope.get(WRITER)
                await EventStream(call, self._format, self._options, self._metrics, send, writer).run()
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

        num_logprobs = sum(delta.num_logprobs for deltas in parts.values() for delta in deltas)
        body = encode() if num_logprobs <= INLINE_LOGPROBS else await asyncio.to_thread(encode)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-neap-path", (call.path or PENDING).encode()),
            *label_header(call.plan.label),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


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
        prompt=deltas[0].prompt,
    )


def _nothing() -> None:
    """Where the server can't break a connection (in-process clients) there is none to break."""
