"""The admin API: change roles by hand, and see what the planner thinks. On its own port, never without its token.

    GET  /v1/workers                  every worker: role, state, epoch, pool, node
    POST /v1/workers/{id}/switch      {"role": "prefill" | "decode"}
    POST /v1/workers/{id}/drain       everything is given away; nothing comes until it is switched again
    GET  /v1/plans                    the last plan in words, and the last changes with what came of them

Errors are {"error": {"code", "message", "type"}} of the closed catalogue (cluster/errors.py).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.control.plan_words import switch_words
from cluster.control.roles import Record, Roles
from cluster.errors import NeapError, RequestError, UnavailableError
from cluster.types import SwitchReply, WorkerInfo

MAX_BODY_BYTES = 4096
log = logging.getLogger("neap.control")


class SwitchBody(BaseModel):
    """The body of a switch."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["prefill", "decode"]


class _TokenOnly:
    """The outermost layer: nothing is answered, and no route told, without the token. Bodies are small."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        assert token, "the admin API is never open"
        self._app = app
        self._digest = hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        try:
            self._check(scope["headers"])
        except NeapError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Raises RequestError invalid_api_key or body_too_large."""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        same = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._digest)
        if not same or scheme.lower() != b"bearer":
            raise RequestError("invalid_api_key", "The admin token is missing or wrong.")
        sizes = [value for name, value in headers if name == b"content-length"]
        is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
        if is_chunked or any(not size.isdigit() or int(size) > MAX_BODY_BYTES for size in sizes):
            raise RequestError("body_too_large")


def admin_app(roles: Roles, token: str, routers: Any) -> ASGIApp:
    """The app. `routers()` gives the routers' URLs, by which a client finds out whose admin API this is."""
    app = FastAPI(title="neap admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_error_handlers(app)

    @app.get("/v1/workers")
    async def workers() -> Response:
        """Every registered worker, as it was heard last."""
        return JSONResponse({"workers": [worker_json(info) for info in roles.workers()]})

    @app.post("/v1/workers/{worker_id}/switch")
    async def switch(worker_id: str, body: SwitchBody) -> Response:
        """Change a worker's role; answers when it is over."""
        return JSONResponse(reply_json(await roles.switch(worker_id, body.role)))

    @app.post("/v1/workers/{worker_id}/drain")
    async def drain(worker_id: str) -> Response:
        """Let a worker give everything away; answers when it is empty."""
        return JSONResponse(reply_json(await roles.drain(worker_id)))

    @app.get("/v1/plans")
    async def plans() -> Response:
        """What the planner thinks, and what was changed lately, newest first."""
        return JSONResponse(plans_json(roles) | {"routers": list(routers())})

    return _TokenOnly(app, token)


def worker_json(info: WorkerInfo) -> dict[str, Any]:
    """One worker."""
    names = ("worker_id", "incarnation", "epoch", "role", "state", "pool", "node", "address")
    return {name: getattr(info, name) for name in names}


def reply_json(reply: SwitchReply) -> dict[str, Any]:
    """How a change ended."""
    return {
        "outcome": reply.outcome,
        "moved": reply.moved,
        "finished_in_place": reply.finished_in_place,
        "duration_ms": round(reply.duration_ms, 3),
        "canary_ms": round(reply.canary_ms, 3),
        "worker": worker_json(reply.info),
        "words": switch_words(reply),
    }


def plans_json(roles: Roles) -> dict[str, Any]:
    """The last plan and the last changes."""
    plan, age_s = roles.plan()
    return {
        "auto": roles.auto,
        "plan": {
            "age_s": round(age_s, 3),
            "pressure": _finite(plan.pressure),
            "prefill_per_s": _finite(plan.prefill_per_s),
            "decode_per_s": _finite(plan.decode_per_s),
            "words": list(plan.words),
        },
        "changes": [_record_json(record, roles.now()) for record in reversed(roles.records)],
    }


def _record_json(record: Record, now: float) -> dict[str, Any]:
    return {
        "age_s": round(now - record.at, 3),
        "worker_id": record.worker_id,
        "role": record.role,
        "why": record.why,
        "outcome": record.outcome or "under way",
        "words": record.words,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: what can't be done at all has no number."""
    return None if value is None or value == float("inf") else round(value, 4)


def error_response(error: NeapError) -> Response:
    """An error in the form that the router's have."""
    body = {"error": {"message": error.message, "type": error.kind.type, "param": error.param, "code": error.code}}
    headers = {"www-authenticate": "Bearer"} if error.kind.status == 401 else {}
    return JSONResponse(body, status_code=error.kind.status, headers=headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(NeapError)
    async def on_known(request: Request, error: NeapError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
        return error_response(RequestError(code))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(RequestError("invalid_value", 'The body has to be {"role": "prefill"} or "decode".'))

    @app.exception_handler(Exception)
    async def on_unforeseen(request: Request, error: Exception) -> Response:
        log.error("admin API: not foreseen", exc_info=error)
        return error_response(UnavailableError("internal_error"))
