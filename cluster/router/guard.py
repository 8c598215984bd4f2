"""The outermost layer of the HTTP side: who may come in, and that every answer, error or not, has our form.

Default deny: every path but the health probes needs the key, whether a route exists there or not, and the decision
looks at the path of the ASGI scope only (a Host header can bend request.url). Nothing that is raised further in reaches
the client in its own words: it is a row of the closed catalogue, or `internal_error`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import NeapError, RequestError, UnavailableError
from cluster.metrics import RouterMetrics
from cluster.router.body import ClientGone
from cluster.router.openai.errors import error_response

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 << 10
REQUEST_ID = "neap.request_id"  # key in the ASGI scope

log = logging.getLogger("neap.router")


class Guard:
    """ASGI middleware. An empty `api_key` lets everybody in (the listener is then on 127.0.0.1)."""

    def __init__(self, app: ASGIApp, *, api_key: str, metrics: RouterMetrics):
        self._app = app
        self._key_digest = hashlib.sha256(api_key.encode()).digest() if api_key else None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        scope[REQUEST_ID] = request_id
        started = False

        async def send_labelled(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_labelled)
        except ClientGone:
            return
        except NeapError as error:
            await self._refuse(error, request_id, started, scope, receive, send_labelled)
        except Exception:
            log.exception("request %s: not foreseen", request_id)
            await self._refuse(UnavailableError("internal_error"), request_id, started, scope, receive, send_labelled)

    async def _refuse(
        self, error: NeapError, request_id: str, started: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._metrics.errors.labels(error.code).inc()
        if started:
            # too late for a status; the server closes the connection in mid-body, which is an error to any client
            raise ConnectionAbortedError("a response failed after its start")
        await error_response(error, request_id)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises RequestError headers_too_large or invalid_api_key."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise RequestError("headers_too_large")
        if self._key_digest is None or scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(token.strip()).digest()
        if not hmac.compare_digest(digest, self._key_digest) or scheme.lower() != b"bearer":
            raise RequestError("invalid_api_key")
