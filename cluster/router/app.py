"""The HTTP endpoints of a router. Validation and answers live in generate.py and respond.py, errors in guard.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import NeapError, RequestError, UnavailableError
from cluster.router import generate, tokens_api
from cluster.router.docs_page import PAGE, body_of, openapi
from cluster.router.guard import REQUEST_ID, Guard
from cluster.router.openai.chat import ChatRequest
from cluster.router.openai.completions import CompletionRequest
from cluster.router.openai.errors import error_response
from cluster.router.service import RouterService
from cluster.router.snapshot import DispatchStatus
from cluster.router.status import model_json, readiness_json, status_json, version, why_json
from cluster.router.status_load import load_json, server_info_json
from cluster.router.tokens_api import DetokenizeRequest, TokenizeRequest
from cluster.spec import RouterSpec


def create_app(spec: RouterSpec, service: RouterService, dispatch_status: Callable[[], DispatchStatus]) -> FastAPI:
    """The app of one router. Start and stop of the service's links are the server's (server.py)."""
    generation = _Generation(service)
    app = _Api(
        title="neap",
        version=version(),
        description="ERNIE 4.5 on a cluster of prefill and decode workers.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Guard, api_key=spec.api_key, metrics=service.metrics)
    app.generation = Guard(generation, api_key=spec.api_key, metrics=service.metrics)
    app.short_ways = frozenset(generation.answers)
    _add_error_handlers(app, service)
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_health(app, service)
    _add_operation(app, service, dispatch_status)
    return app


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")


def _add_error_handlers(app: FastAPI, service: RouterService) -> None:
    """What the framework itself raises, in our words."""

    def respond(request: Request, error: NeapError, headers: dict[str, str]) -> Response:
        service.metrics.errors.labels(error.code).inc()
        response = error_response(error, request.scope[REQUEST_ID])
        response.headers.update(headers)
        return response

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        if code is None:
            code = "internal_error" if error.status_code >= 500 else "invalid_value"
        known = UnavailableError(code) if code == "internal_error" else RequestError(code)
        return respond(request, known, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(request, RequestError("invalid_value"), {})


class _Generation:
    """ASGI app of the two endpoints that everything is about, without the framework's part of a millisecond a request.

    FastAPI has them too: it describes them in /openapi.json and says 405 to other methods.
    """

    def __init__(self, service: RouterService):
        self._service = service
        self.answers = {"/v1/chat/completions": generate.chat, "/v1/completions": generate.completion}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises NeapError, for the guard."""
        response = await self.answers[scope["path"]](Request(scope, receive), self._service)
        await response(scope, receive, send)


class _Api(FastAPI):
    """FastAPI with a shorter way to `generation`, which has a guard of its own."""

    generation: ASGIApp
    short_ways: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] in self.short_ways and scope["method"] == "POST":
            await self.generation(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _add_generation(app: FastAPI, service: RouterService) -> None:
    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), response_class=Response)
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation; with stream true as server-sent events."""
        return await generate.chat(request, service)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest), response_class=Response)
    async def completions(request: Request) -> Response:
        """Continue up to 32 prompts, given as text or as token ids; with stream true as server-sent events."""
        return await generate.completion(request, service)


def _add_models(app: FastAPI, service: RouterService) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The model, while it can be served."""
        model = model_json(service)
        return _json({"object": "list", "data": [] if model is None else [model]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """One model by name."""
        service.check_model(model_id)
        entry = model_json(service)
        if entry is None:
            raise UnavailableError("model_not_ready", retry_after_s=2.0)
        return _json(entry)


def _add_tokens(app: FastAPI, service: RouterService) -> None:
    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest), response_class=Response)
    async def tokenize(request: Request) -> Response:
        """A prompt, or a conversation, as token ids."""
        return Response(await tokens_api.tokenize(request, service), media_type="application/json")

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), response_class=Response)
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return Response(await tokens_api.detokenize(request, service), media_type="application/json")


def _add_health(app: FastAPI, service: RouterService) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """Always 200 while the event loop runs."""
        return _json({"status": "live"})

    async def ready() -> Response:
        """200 while the model can be served, else 503 with how far it is and why."""
        readiness = service.readiness()
        return _json(readiness_json(readiness), 200 if readiness.ready else 503)

    app.get("/health/ready")(ready)
    app.get("/health")(ready)


def _add_operation(app: FastAPI, service: RouterService, dispatch_status: Callable[[], DispatchStatus]) -> None:
    document: dict[str, Any] = {}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def neap_version() -> Response:
        """The version of this router."""
        return _json({"version": version()})

    @app.get("/load")
    async def load() -> Response:
        """How much this router and its workers have to do."""
        return _json(load_json(service, dispatch_status()))

    @app.get("/server_info")
    async def server_info() -> Response:
        """Version, options of this router (no secrets), and what its workers are."""
        return _json(server_info_json(service))

    @app.get("/status")
    async def status() -> Response:
        """Workers, roles, epochs, states, load, KV use, links and queue, for `neap status`."""
        return _json(status_json(service, dispatch_status()))

    @app.get("/status/why")
    async def why(request_id: str = "") -> Response:
        """Why recent requests went where they went, in words and numbers, newest first; for `neap status --why`."""
        return _json(why_json(service, dispatch_status(), request_id))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        """This API as OpenAPI 3.1."""
        if not document:
            document.update(openapi(app, (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)))
        return _json(document)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The same for people."""
        return HTMLResponse(PAGE)
