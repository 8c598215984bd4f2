"""A small HTTP client for a router: how it is (controller, `neap status`) and streamed answers (`neap chat`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 3.0
STREAM_SILENCE_S = 600.0


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
    def at(cls, url: str, *, api_key: str = "") -> RouterClient:
        """The router at http://host:port (a trailing /v1 is dropped). Raises ValueError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
            raise ValueError("expected http://HOST:PORT")
        return cls(host=parts.hostname, port=parts.port or 80, api_key=api_key)

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
        with self._request("GET", path, None, TIMEOUT_S) as response:
            return response.status, self._object(response)

    def post(self, path: str, body: dict[str, Any], timeout_s: float = TIMEOUT_S) -> tuple[int, dict[str, Any]]:
        """POST a JSON object: (HTTP status, body). Blocks for timeout_s at most. Raises RouterError."""
        with self._request("POST", path, json.dumps(body).encode(), timeout_s) as response:
            return response.status, self._object(response)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """POST a request with stream true; its events until [DONE], or the error body. Blocks. Raises RouterError."""
        with self._request("POST", path, json.dumps(body).encode(), STREAM_SILENCE_S) as response:
            if response.status != 200:
                yield self._object(response)
                return
            for line in response:
                data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    yield self._parse(data)
        raise RouterError("the answer broke off")

    @contextmanager
    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(self.host, self.port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, body=body, headers=headers)
            yield connection.getresponse()
        except (OSError, HTTPException) as error:
            raise RouterError(f"no answer from {self.url}: {error}") from error
        finally:
            connection.close()

    def _object(self, response: HTTPResponse) -> dict[str, Any]:
        return self._parse(response.read())

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError as error:
            raise RouterError(f"{self.url} did not answer with JSON") from error
        if not isinstance(value, dict):
            raise RouterError(f"{self.url} did not answer with a JSON object")
        return value


def reachable(host: str) -> str:
    """An address at which a listener on `host` is reached from its own machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host.strip("[]"))
