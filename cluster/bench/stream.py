"""One HTTP connection for a load generator: sends a request, watches the stream come in, and reports when and what.

As cheap as can be, because the generator shares the machine with what it measures: bytes are counted as they arrive
and parsed only where the caller keeps them. Events are recognised by `data: {"`, which no JSON string can hold.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import cast

EVENT = b'data: {"'
DONE = b"data: [DONE]"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_TAIL = max(len(EVENT), len(DONE), len(_LAST_CHUNK)) - 1
_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)": ?"[^"]')
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
MAX_HEAD_BYTES = 64 << 10
MAX_KEPT_BYTES = 64 << 20


@dataclass(slots=True)
class Reply:
    """What one request brought. Times are seconds since it was sent; `error` is empty if it ended with [DONE].

    first_s: the first bytes that hold text (kept replies) or an event (others). `raw` is the whole answer as it came,
    if it was kept. `num_events` counts events with a JSON object, error events included.
    """

    status: int = 0
    num_events: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    error: str = ""
    raw: bytes = b""
    num_reads: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def later(self, seconds: float) -> Reply:
        """The same, with times that count from `seconds` earlier."""
        self.first_s += seconds if self.first_s else 0.0
        self.last_s += seconds if self.last_s else 0.0
        self.arrivals = [(at + seconds, num_events) for at, num_events in self.arrivals]
        return self


class StreamConnection(asyncio.Protocol):
    """Asks one question at a time; kept open between questions where the server lets it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[Reply] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reply = Reply()
        self._started = 0.0
        self._keep: list[bytes] | None = None
        self._kept_bytes = 0
        self._tail = b""
        self._head = b""
        self._done = False
        self._chunked = True

    @property
    def usable(self) -> bool:
        """Whether it can ask (again)."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, *, keep: bool, timeout_s: float) -> Reply:
        """Send a whole HTTP request for a stream; its Reply, whatever happens."""
        assert self._transport is not None and self._waiter is None, "one question at a time, on an open connection"
        self._waiter = self._loop.create_future()
        self._reply = Reply()
        self._keep = [] if keep else None
        self._kept_bytes, self._tail, self._head, self._done, self._chunked = 0, b"", b"", False, True
        self._timer = self._loop.call_later(timeout_s, self._finish, "timeout")
        self._started = time.perf_counter()
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            self._waiter = None
            self._timer.cancel()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being of the class

    def connection_lost(self, exc: Exception | None) -> None:
        """The server (or the network) ended it: the end of an answer only where nothing else says so."""
        self._transport = None
        self._finish("" if self._done else "cut off")

    def data_received(self, data: bytes) -> None:
        """Count, note the times, and see whether this is the end."""
        reply = self._reply
        if self._waiter is None:
            return
        now = time.perf_counter() - self._started
        reply.num_reads += 1
        if not reply.status:
            data = self._head = self._head + data
            if b"\r\n\r\n" not in data and len(data) < MAX_HEAD_BYTES:
                return
            self._read_head(data)
        seen = self._tail + data
        num_events = seen.count(EVENT, max(0, len(self._tail) - len(EVENT) + 1))  # none of them for the second time
        if num_events:
            reply.num_events += num_events
            reply.last_s = now
        if self._keep is not None:
            self._note(now, data, num_events)
        elif num_events and not reply.first_s:
            reply.first_s = now
        if DONE in seen:
            self._done = True
        self._tail = seen[-_TAIL:]
        if self._chunked and seen.endswith(_LAST_CHUNK):
            self._finish("" if self._done else "no [DONE]")
        elif not self._chunked and self._has_body():
            self._finish("no stream")

    def _note(self, now: float, data: bytes, num_events: int) -> None:
        assert self._keep is not None, "only kept replies are noted"
        self._keep.append(data)
        self._kept_bytes += len(data)
        if num_events:
            self._reply.arrivals.append((now, num_events))
            if not self._reply.first_s and _TEXT.search(data):
                self._reply.first_s = now
        if self._kept_bytes > MAX_KEPT_BYTES:
            self._finish("answer too large")

    def _read_head(self, data: bytes) -> None:
        status = data[9:12]
        self._reply.status = int(status) if data.startswith(b"HTTP/1.") and status.isdigit() else -1
        self._chunked = b"transfer-encoding: chunked" in data.partition(b"\r\n\r\n")[0].lower()
        if self._keep is None and (self._reply.status != 200 or not self._chunked):
            self._keep = []  # the body says what is wrong

    def _has_body(self) -> bool:
        """Whether an answer with a content-length is whole."""
        head, found, body = b"".join(self._keep or ()).partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        return bool(found and length) and len(body) >= int(length[1] if length else 0)

    def _finish(self, error: str) -> None:
        waiter, reply = self._waiter, self._reply
        if waiter is None or waiter.done():
            return
        reply.error = f"HTTP {reply.status}" if reply.status not in (0, 200) else error
        reply.raw = b"".join(self._keep) if self._keep is not None else b""
        waiter.set_result(reply)
        if reply.error and self._transport is not None:
            self._transport.abort()  # where the next answer would begin is not known


async def connect(host: str, port: int) -> StreamConnection:
    """A new connection. Raises OSError."""
    _, connection = await asyncio.get_running_loop().create_connection(StreamConnection, host, port)
    return connection
