"""uvicorn's HTTP protocol with the bounds it lacks: header bytes and count, time for a head, silent clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.errors import RequestError
from cluster.router.guard import MAX_HEADER_BYTES, MAX_HEADERS
from cluster.router.openai.errors import error_body
from cluster.router.respond import ABORT, WRITER

# the guard refuses what is over its bounds in good form; here is the wall for what never ends
MAX_HEAD_BYTES = 2 * MAX_HEADER_BYTES
MAX_HEAD_FIELDS = 2 * MAX_HEADERS
HEAD_TIMEOUT_S = 30.0
MAX_DISCARDED_BYTES = 512 << 20
STALL_S = 10.0


class BodyWriter:
    """Implements stream.ChunkWriter for one response: chunks straight to the transport, once uvicorn has sent the head.

    What uvicorn's own `send` adds per part (tasks that wait, checks, dicts) costs more than the socket at one part per
    token. The framing is the one that it chose in the head; its `send` still ends the body.
    """

    __slots__ = ("_cycle", "_protocol", "on_resume")

    def __init__(self, protocol: BoundedHttpProtocol):
        self._protocol = protocol
        self._cycle = protocol.cycle
        self.on_resume: Callable[[], None] | None = None

    def write(self, body: bytes) -> bool:
        """Write one part; False when the client should get no more for now."""
        cycle, protocol = self._cycle, self._protocol
        assert cycle.response_started and not cycle.response_complete, "parts come between a head and its end"
        if not cycle.disconnected:
            protocol.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if cycle.chunked_encoding else body)
        if protocol.flow.write_paused:
            protocol.blocked_writer = self
            return False
        return True


class HeadTooLarge(Exception):
    """Raised inside a parser callback; the parser wraps it."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._num_fields = 0
        self._discarded_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self.blocked_writer: BodyWriter | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head must follow within HEAD_TIMEOUT_S."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a head that goes on and on is cut off, also in the middle of one field."""
        if self._in_head:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_timeout)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """A new request on this connection."""
        super().on_message_begin()
        self._num_fields = 0
        self._discarded_bytes = 0
        cast(dict[str, Any], self.scope)[ABORT] = self.transport.abort

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the fields; trailers of a chunked body come here too."""
        self._num_fields += 1
        if self._num_fields > MAX_HEAD_FIELDS:
            self._head_bytes = MAX_HEAD_BYTES + 1
            raise HeadTooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()
        cast(dict[str, Any], self.scope)[WRITER] = BodyWriter(self)

    def pause_writing(self) -> None:
        """The client takes less than it is sent. It may be slow, but not stand still for STALL_S."""
        super().pause_writing()
        self._watch_stall(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has taken what was kept for it."""
        super().resume_writing()
        self._watch_stall(0)
        writer, self.blocked_writer = self.blocked_writer, None
        if writer is not None and writer.on_resume is not None:
            writer.on_resume()

    def on_body(self, body: bytes) -> None:
        """A body that was answered early (413) is read on and dropped, to a bound: else the client sees a reset."""
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next bytes are a head again."""
        super().on_message_complete()
        self._in_head = True

    def on_response_complete(self) -> None:
        """From here on nobody else notices a client that doesn't read."""
        super().on_response_complete()
        self._watch_stall(self.transport.get_write_buffer_size())

    def send_400_response(self, msg: str) -> None:
        """What can't be parsed, in our form: 431 for too large a head, else 400."""
        code = "headers_too_large" if self._head_bytes > MAX_HEAD_BYTES else "invalid_value"
        error = RequestError(code, "" if code == "headers_too_large" else "This is not a valid HTTP request.")
        body = error_body(error, "")
        head = b"content-type: application/json\r\nx-should-retry: false\r\nconnection: close\r\n"
        length = b"content-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.kind.status] + head + length + body)
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed; with unsent bytes it is not idle, and the stall watch decides."""
        if self.transport.get_write_buffer_size() == 0:
            super().timeout_keep_alive_handler()

    def _head_timeout(self) -> None:
        self._head_timer = None
        if self._in_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()

    def _watch_stall(self, unsent: int) -> None:
        """Abort a connection whose unsent bytes haven't shrunk for STALL_S: closing would wait for them for ever."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if unsent:
            self._stall_timer = self.loop.call_later(STALL_S, self._check_stall, unsent)

    def _check_stall(self, before: int) -> None:
        self._stall_timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent >= before:
            self.transport.abort()
        else:
            self._watch_stall(unsent)
            if not unsent and not self.transport.is_closing() and self.cycle.response_complete:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
