"""The small HTTP client, against a scripted server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.control.router_client import RouterClient, RouterError, reachable

ANSWERS = {
    "/health/ready": (503, b'{"status": "starting", "reason": "loading"}'),
    "/list": (200, b"[1]"),
    "/html": (200, b"<html>"),
    "/done": (200, b': hello\n\ndata: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n'),
    "/cut": (200, b'data: {"a": 1}\n\n'),
    "/wrong": (400, b'{"error": {"code": "invalid_value", "message": "no"}}'),
}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer()

    def _answer(self) -> None:
        if self.headers.get("authorization") != "Bearer k":
            self.send_error(401)
            return
        status, body = ANSWERS[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def client() -> Iterator[RouterClient]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield RouterClient(host="127.0.0.1", port=server.server_address[1], api_key="k")
    server.shutdown()
    thread.join()
    server.server_close()


def test_readiness_gives_the_reason_and_a_silent_router_is_not_ready(client: RouterClient) -> None:
    readiness = asyncio.run(client.readiness())
    assert (readiness.ready, readiness.reason) == (False, "loading")
    nobody = RouterClient(host="127.0.0.1", port=1)
    assert not asyncio.run(nobody.readiness()).ready


def test_answers_that_are_no_json_object_are_errors(client: RouterClient) -> None:
    for path in ("/list", "/html"):
        with pytest.raises(RouterError, match="did not answer with"):
            client.get(path)


def test_a_stream_ends_with_done_and_a_cut_one_is_an_error(client: RouterClient) -> None:
    assert list(client.stream("/done", {})) == [{"a": 1}, {"a": 2}]
    assert next(client.stream("/wrong", {}))["error"]["code"] == "invalid_value"
    cut = client.stream("/cut", {})
    assert next(cut) == {"a": 1}
    with pytest.raises(RouterError, match="broke off"):
        next(cut)


def test_urls_are_read_and_written() -> None:
    assert RouterClient.at("http://10.0.0.1:9000/v1/").url == "http://10.0.0.1:9000"
    assert RouterClient.at("[::1]:8180").url == "http://[::1]:8180"
    for wrong in ("https://a", "http://", "http://a/path", "ftp://a"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            RouterClient.at(wrong)
    assert [reachable(h) for h in ("0.0.0.0", "::", "10.0.0.1")] == ["127.0.0.1", "::1", "10.0.0.1"]
