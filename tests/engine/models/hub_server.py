"""A local Hugging Face hub: the part of its HTTP interface that downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """`repos` by id; `private` ones answer 401, `gated` 403, `failing` 500. `fetched`: the files that were sent."""

    repos: dict[str, Path]
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3], send_body=send_body)
        else:
            self._send(404, b"{}")

    def _api(self, repo: str, kind: str | None, revision: str | None) -> None:
        if self._refused(repo, revision):
            return
        files = sorted(path for path in self.hub.repos[repo].iterdir())
        if kind == "tree":
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)} for f in files]
            self._send(200, json.dumps(listed).encode())
            return
        siblings = [{"rfilename": file.name} for file in files]
        self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _file(self, repo: str, revision: str, name: str, *, send_body: bool) -> None:
        if self._refused(repo, revision):
            return
        file = self.hub.repos[repo] / name
        if not file.is_file():
            self._send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            return
        if send_body:
            self.hub.fetched.append(name)
        self._send(200, file.read_bytes(), **{"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT})

    def _refused(self, repo: str, revision: str | None) -> bool:
        if repo in self.hub.failing:
            self._send(500, b'{"error": "out of order"}')
        elif repo in self.hub.private:
            self._send(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif repo in self.hub.gated:
            self._send(403, b"{}", **{"X-Error-Code": "GatedRepo"})
        elif repo not in self.hub.repos:
            self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT):
            self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[HubServer]:
    """A hub on a free port of this machine for as long as the context lasts."""
    hub = HubServer(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
