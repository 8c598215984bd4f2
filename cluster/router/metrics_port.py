"""/metrics on a port of its own (router.metrics_port), behind the same key as everything else."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import RequestError
from cluster.metrics import RouterMetrics
from cluster.router.guard import Guard


def metrics_app(metrics: RouterMetrics, api_key: str) -> ASGIApp:
    """An app with one path."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/metrics":
            raise RequestError("not_found")
        if scope["method"] not in ("GET", "HEAD"):
            raise RequestError("method_not_allowed")
        await Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)(scope, receive, send)

    return Guard(answer, api_key=api_key, metrics=metrics)
