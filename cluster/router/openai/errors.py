"""Error bodies and headers in OpenAI's form. The words come from the closed catalogue (cluster/errors.py) only."""

from __future__ import annotations

import math

import orjson
from starlette.responses import Response

from cluster.errors import NeapError

# what a client should wait when the error does not say (the SDKs' own back-off starts lower than this)
DEFAULT_RETRY_AFTER_S = 1.0


def error_payload(error: NeapError, request_id: str) -> dict[str, object]:
    """The value of `error` in a body or in an SSE event."""
    return {
        "message": error.message,
        "type": error.kind.type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
    }


def error_headers(error: NeapError) -> dict[str, str]:
    """x-should-retry always; Retry-After where trying again makes sense; WWW-Authenticate with a 401."""
    headers = {"x-should-retry": "true" if error.kind.retry else "false"}
    if error.kind.retry:
        seconds = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(seconds)))
    if error.kind.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_body(error: NeapError, request_id: str) -> bytes:
    """The JSON body {"error": {...}}."""
    return orjson.dumps({"error": error_payload(error, request_id)})


def error_response(error: NeapError, request_id: str) -> Response:
    """A whole response; the guard adds X-Request-Id."""
    return Response(
        error_body(error, request_id),
        status_code=error.kind.status,
        headers=error_headers(error),
        media_type="application/json",
    )
