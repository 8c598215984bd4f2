"""Server-sent events, byte for byte.

The order in a stream: `: ping` comments (only before the first token), per choice a first chunk with its role, content
chunks, one with finish_reason; then the usage chunk if asked for, then [DONE]. A failure after the first byte is one
`{"error": ...}` event and the end, never [DONE]: an SDK raises on that, while it takes a plain cut for a short answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from cluster.errors import NeapError
from cluster.router.openai.errors import error_payload

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
PING_S = 10.0

HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def event(chunk: Mapping[str, Any]) -> bytes:
    """One data event. JSON has no raw newline, so one line is enough."""
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def error_event(error: NeapError, request_id: str) -> bytes:
    """The last event of a stream that failed."""
    return event({"error": error_payload(error, request_id)})
