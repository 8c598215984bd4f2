"""Reading a request body: limited while it is read, then parsed with limits on depth."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import orjson
from starlette.types import Receive, Scope

from cluster.errors import NeapError, RequestError, UnavailableError

MAX_JSON_DEPTH = 64
BODY_TIMEOUT_S = 60.0
# after a 413 on a connection that will be closed, this much more is read and dropped: closing with unread bytes in the
# kernel resets the connection, and the client would see that instead of the error
LINGER_BYTES = 256 << 20
LINGER_S = 10.0


class BodyBudget:
    """Bytes of all bodies that are being read or tokenised now; one client can't fill the memory with many."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._held = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that takes more bytes; all are given back at the end. It raises UnavailableError overloaded."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            taken += size
            self._held += size
            if self._held > self._max_bytes:
                raise UnavailableError("overloaded", retry_after_s=2.0)

        try:
            yield take
        finally:
            self._held -= taken


class ClientGone(Exception):
    """The client closed the connection before it had sent everything."""


async def read_body(scope: Scope, receive: Receive, limit: int, take: Callable[[int], None]) -> bytes:
    """The whole body; `take` is told of every chunk. Raises RequestError body_too_large or deadline_exceeded (slow
    sender), ClientGone, and what `take` raises."""
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"")
    closing = scope.get("http_version") == "1.0" or b"close" in headers.get(b"connection", b"").lower()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if declared.isdigit() and int(declared) > limit:
                raise RequestError("body_too_large", f"The body is larger than {limit} bytes.")
            return await _read(receive, limit, take)
    except TimeoutError:
        raise RequestError("deadline_exceeded", "The body did not arrive in time.") from None
    except NeapError:
        if closing and b"expect" not in headers:
            await _linger(receive)
        raise


async def _read(receive: Receive, limit: int, take: Callable[[int], None]) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise RequestError("body_too_large", f"The body is larger than {limit} bytes.")
        if chunk:
            take(len(chunk))
            chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _linger(receive: Receive) -> None:
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def parse_object(body: bytes) -> dict[str, object]:
    """The JSON object in `body`. Raises RequestError invalid_json.

    NaN and Infinity are not JSON, but Python clients write them; they pass here so that the field that holds one can be
    named by validation.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _parse_non_finite(body)
    if not isinstance(value, dict):
        raise RequestError("invalid_json", "The body must be a JSON object.")
    _check_depth(value)
    return value


def _parse_non_finite(body: bytes) -> object:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError("invalid_json", "The body is not valid UTF-8.") from None
    if "NaN" not in text and "Infinity" not in text:
        raise RequestError("invalid_json")
    try:
        value: object = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate escape is not text
    except (ValueError, RecursionError):
        raise RequestError("invalid_json") from None
    return value


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[object] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner += [child for child in children if type(child) is dict or type(child) is list]
        if not inner:
            return
        level = inner
    raise RequestError("invalid_json", f"The body is nested deeper than {MAX_JSON_DEPTH} levels.")
