"""Asks a router how it is, over HTTP. Used by the controller and by `neap status`; blocking calls run in a thread."""

from __future__ import annotations

import asyncio
import http.client
import json
from dataclasses import dataclass
from typing import Any

from cluster.spec import RouterSpec

TIMEOUT_S = 3.0


class RouterError(RuntimeError):
    """The router did not answer, or not as asked; the message is for people."""


@dataclass(frozen=True, kw_only=True)
class RouterReadiness:
    """The answer of /health/ready; `reason` says what is missing."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RouterClient:
    """A router at host:port."""

    host: str
    port: int
    api_key: str = ""

    @classmethod
    def of(cls, spec: RouterSpec) -> RouterClient:
        """The router of this spec, as seen from its own machine."""
        return cls(host=reachable(spec.host), port=spec.port, api_key=spec.api_key)

    @property
    def url(self) -> str:
        """http://host:port, IPv6 in brackets."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    async def readiness(self) -> RouterReadiness:
        """Whether it can serve; a router that doesn't answer is not ready."""
        try:
            status, body = await asyncio.to_thread(self.get, "/health/ready")
        except RouterError:
            return RouterReadiness(ready=False, reason="the router is starting")
        return RouterReadiness(ready=status == 200, reason=str(body.get("reason", "")))

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """GET a JSON object: (HTTP status, body). Blocks for TIMEOUT_S at most. Raises RouterError."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            body = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RouterError(f"no answer from {self.url}: {error}") from error
        finally:
            connection.close()
        if not isinstance(body, dict):
            raise RouterError(f"{self.url}{path} did not answer with a JSON object")
        return response.status, body


def reachable(host: str) -> str:
    """An address at which a listener on `host` is reached from its own machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host.strip("[]"))
