"""One streamed answer while it is sent.

1. The status line is held back until the first text, or 10 s (`: ping`): failures before that are real 4xx and 5xx.
2. After it nobody waits for tokens any more: whoever brings some schedules one `_pump` for this turn of the loop, which
   writes every event that is pending in one piece straight to the connection. No task wakes per token.
3. A client that takes no more blocks its own stream only: nothing is taken out of its inbox (which is bounded) until
   the connection can be written to again.
4. The end is the task's again: usage, [DONE], or an error event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson
from starlette.types import Send

from cluster.errors import NeapError
from cluster.metrics import RouterMetrics
from cluster.router import sse
from cluster.router.answer import Delta
from cluster.router.call import Call
from cluster.router.openai.answers import AnswerFormat, Json

PENDING = "pending"  # x-neap-path, while it is not known
# stands for the text in the one chunk that all plain chunks of a choice are cut from
_MARK = "\ue000\ue001text\ue001\ue000"


def label_header(label: str) -> list[tuple[bytes, bytes]]:
    """The client's request_id, given back; it names nothing in here. Checked by openai/fields.py."""
    return [(b"x-neap-label", label.encode())] if label else []


class ChunkWriter(Protocol):
    """Writes parts of a body whose head has gone, past ASGI (protocol.py). `on_resume`: the client takes more again."""

    on_resume: Callable[[], None] | None

    def write(self, body: bytes) -> bool:
        """Write one part; False when the client should get no more for now."""
        ...


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What the client asked of the form of its answer. `ping_s`: how long a stream may be silent before its text."""

    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    ping_s: float = sse.PING_S


class EventStream:
    """See the module's text. Without a `writer` (in-process clients) every part goes through `send`."""

    def __init__(
        self,
        call: Call,
        answer_format: AnswerFormat,
        options: AnswerOptions,
        metrics: RouterMetrics,
        send: Send,
        writer: ChunkWriter | None,
    ):
        self._call = call
        self._format = answer_format
        self._options = options
        self._metrics = metrics
        self._send = send
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._started = False
        self._header_said_pending = False
        self._opened: set[int] = set()
        self._cuts: dict[int, tuple[bytes, bytes] | None] = {}
        self._ping_due = False
        self._ping_timer: asyncio.TimerHandle | None = None
        self._over: asyncio.Future[bytes] = self._loop.create_future()
        self._scheduled = False
        self._blocked = False

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
        call, last = self._call, b""
        while not call.done:
            if self._started and self._writer is not None:
                last = await self._follow(self._writer)
            else:
                await self._step()
            if call.gone:
                return
        end = sse.event(self._format.usage_chunk(call.usage)) if self._options.include_usage else b""
        await self._body(last + end + sse.DONE, more=False)

    async def _step(self) -> None:
        """Wait for arrivals, send them."""
        out = self._events(await self._call.take())
        if self._call.gone:
            return
        if out:
            await self._start()
            await self._body(out)
        elif self._ping_due and not self._opened:
            await self._start()
            await self._body(sse.PING)
        self._ping_due = False

    # ---- past ASGI

    async def _follow(self, writer: ChunkWriter) -> bytes:
        """Write arrivals as they come until the call is over; the last events, unsent. Raises what a pump raised."""
        writer.on_resume = self._resume
        self._call.inbox.listener = self._schedule
        self._schedule()
        try:
            return await self._over
        finally:
            self._call.inbox.listener = writer.on_resume = None

    def _schedule(self) -> None:
        """Something has arrived: write it in this turn of the loop, with what else arrives until then."""
        if not self._scheduled:
            self._scheduled = True
            self._call.turn.add(self._pump)

    def _resume(self) -> None:
        if self._blocked:
            self._blocked = False
            self._call.inbox.blocked(False)
            self._schedule()

    def _pump(self) -> None:
        self._scheduled = False
        if self._over.done():
            return
        try:
            if self._call.gone:
                self._over.set_result(b"")
            elif not self._blocked:
                self._write(self._events(self._call.take_now()))
        except Exception as error:
            self._over.set_exception(error)

    def _write(self, out: bytes) -> None:
        assert self._writer is not None, "only a followed stream writes past ASGI"
        if self._call.done or self._call.gone:
            self._over.set_result(out)
        elif out and not self._writer.write(out):
            self._blocked = True
            self._call.inbox.blocked(True)

    # ---- events

    def _events(self, deltas: Sequence[Delta]) -> bytes:
        """The bytes of some deltas, each an event of its own; a choice's opening before its first."""
        if not deltas:
            return b""
        pieces: list[bytes] = []
        last = deltas[-1] if self._call.done else None
        for delta in deltas:
            choice = delta.choice
            if choice not in self._opened:
                self._opened.add(choice)
                first = self._format.first_chunk(choice)
                if first is not None:
                    pieces.append(self._event(first))
            is_plain = delta.finish_reason is None and not delta.tokens and delta.prompt is None
            cut = self._cut(choice) if is_plain else None
            if cut is not None:
                pieces += (cut[0], orjson.dumps(delta.text), cut[1])
                continue
            chunk = self._format.chunk(delta)
            if delta is last and self._header_said_pending and self._call.path is not None:
                chunk["neap"] = {"path": self._call.path}
            pieces.append(self._event(chunk))
        return b"".join(pieces)

    def _cut(self, choice: int) -> tuple[bytes, bytes] | None:
        """What stands before and after the text in this choice's plain events; None where they differ in more."""
        if self._options.continuous_usage:
            return None
        if choice not in self._cuts:
            parts = self._event(self._format.chunk(Delta(choice=choice, text=_MARK))).split(orjson.dumps(_MARK))
            self._cuts[choice] = (parts[0], parts[1]) if len(parts) == 2 else None
        return self._cuts[choice]

    def _event(self, chunk: Json) -> bytes:
        if self._options.continuous_usage:
            chunk["usage"] = self._call.usage.to_json()
        elif self._options.include_usage:
            chunk["usage"] = None
        return sse.event(chunk)

    # ---- through ASGI

    async def _start(self) -> None:
        if self._started:
            return
        self._started = True
        self._header_said_pending = self._call.path is None
        path = (b"x-neap-path", (self._call.path or PENDING).encode())
        headers = [*sse.HEADERS, path, *label_header(self._call.plan.label)]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _body(self, body: bytes, *, more: bool = True) -> None:
        self._call.inbox.blocked(True)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._call.inbox.blocked(False)

    def _arm_ping(self) -> None:
        self._ping_timer = self._loop.call_later(self._options.ping_s, self._ping)

    def _ping(self) -> None:
        if not self._opened:
            self._ping_due = True
            self._call.inbox.wake()
            self._arm_ping()
