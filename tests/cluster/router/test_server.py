"""The server on a real socket: SDK, clients that leave, don't read or send nonsense, and the process's end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from cluster import metrics
from cluster.spec import RouterSpec

MODEL = "ernie-test"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
Lives = Callable[..., Any]


def behave(server: Any, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(server.decode.behaviour, name, value)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; the deadline is generous, and only there so that a fault ends."""
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def sdk(server: Any, key: str = "none") -> openai.OpenAI:
    """To be closed: a connection that the garbage collector has to find fails whichever test runs by then."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def raw(server: Any, data: bytes) -> tuple[int, bytes]:
    """Send bytes, read until the server closes; (status, everything)."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return int(answer.split(b" ", 2)[1]), answer


def test_the_openai_sdk_chats_and_completes_whole_and_streamed(live: Lives) -> None:
    with live(api_key="sk-1") as server, sdk(server, "sk-1") as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=1)
        assert [choice.message.content for choice in answer.choices] == ["Hello, world"] * 2
        assert answer.choices[0].logprobs and len(answer.choices[0].logprobs.content or []) == 12
        assert answer.usage and answer.usage.prompt_tokens_details and answer.usage.total_tokens == 21 + 26
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world"
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 13
        whole = client.completions.create(model=MODEL, prompt=[[40, 41], [42]], max_tokens=5)
        assert [choice.text for choice in whole.choices] == ["Hello"] * 2
        assert {choice.finish_reason for choice in whole.choices} == {"length"}
        text = "".join(c.choices[0].text for c in client.completions.create(model=MODEL, prompt="x", stream=True))
        assert text == "Hello, world"
        with sdk(server, "sk-2") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, reasoning_effort="high")
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "reasoning_effort")
        assert caught.value.request_id


def test_a_failure_in_mid_stream_raises_in_the_sdk(live: Lives) -> None:
    with live() as server:
        behave(server, fail_after=4, step_s=0.002)
        seen = ""
        with sdk(server) as client, pytest.raises(openai.APIError) as caught:
            for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
                seen += chunk.choices[0].delta.content or ""
        assert (seen, caught.value.code) == ("Hell", "internal_error")


@pytest.mark.parametrize("stage", ["before the first token", "in mid-stream", "not streamed"])
def test_a_client_that_leaves_is_cancelled_at_the_worker(live: Lives, stage: str) -> None:
    with live() as server:
        behave(server, hang=stage == "before the first token", text="x" * 400, step_s=0.01)
        body = json.dumps(CHAT | {"stream": stage != "not streamed"}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head + body)
            if stage == "in mid-stream":
                assert connection.recv(10).startswith(b"HTTP/1.1 2")
            else:
                eventually(lambda: bool(server.decode.running), "the request did not reach the worker")
        eventually(lambda: len(server.decode.aborted) == 1 and not server.decode.running, "it was not cancelled")
        eventually(lambda: server.process.service.links.num_requests == 0, "it was not forgotten")
        registry = server.process.service.metrics.registry
        eventually(lambda: registry.get_sample_value(metrics.RUNNING) == 0, "its place was not given back")
        assert registry.get_sample_value(metrics.CLIENT_GONE) == 1


def test_a_client_that_does_not_read_is_given_up(live: Lives) -> None:
    with live(stream_buffer_bytes=64 << 10, default_timeout_s=60.0) as server:
        behave(server, text="y" * 100)
        body = json.dumps(
            {"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 8}
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(30)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall((head + body).encode())
            slow = lambda: server.process.service.metrics.registry.get_sample_value(  # noqa: E731
                metrics.ERRORS, {"code": "slow_client"}
            )
            eventually(lambda: slow() == 1, "the client was not noticed")
            eventually(lambda: not server.decode.running, "its request runs on")
        reply = httpx.get(server.url + "/health")
        assert reply.status_code == 200


def test_a_slow_reader_that_reads_gets_everything(live: Lives) -> None:
    with live(stream_buffer_bytes=256 << 10) as server, sdk(server) as client:
        behave(server, text="z" * 100, step_s=0.001)
        chunks = client.completions.create(model=MODEL, prompt="x", max_tokens=300, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        text = ""
        for index, chunk in enumerate(chunks):
            text += chunk.choices[0].text
            time.sleep(0.002 if index % 10 else 0.02)
        assert text == "z" * 300


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_a_413_that_the_client_can_read(live: Lives, chunked: bool, closing: bool) -> None:
    with live() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        block = b"x" * (1 << 20)
        blocks = (block for _ in range(100))
        headers = {"Connection": "close"} if closing else {}
        if not chunked:
            headers["Content-Length"] = str(100 << 20)
        connection.request("POST", "/v1/chat/completions", body=blocks, headers=headers, encode_chunked=chunked)
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (413, "body_too_large")
        connection.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 100_000, 431),
        (b"GET /" + b"a" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nConnection: close\r\nA: " + b"b" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n" + b"A: b\r\n" * 70 + b"\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET http://x/health?\xff HTTP/1.1\r\n\xff\xff: 5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
    ],
)
def test_broken_heads_get_an_answer_and_the_server_lives(live: Lives, data: bytes, status: int) -> None:
    with live() as server:
        got, answer = raw(server, data)
        assert got == status
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"
        assert httpx.get(server.url + "/health").status_code == 200


def test_many_tiny_chunks_are_one_body(live: Lives) -> None:
    with live() as server:
        body = json.dumps(CHAT).encode()
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert raw(server, head + chunks)[0] == 200


def test_two_requests_in_one_packet_are_both_answered(live: Lives) -> None:
    with live() as server:
        one = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
        _, answer = raw(server, one + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer.count(b"HTTP/1.1 200") == 2


def start_process(spec: RouterSpec, folder: Path) -> tuple[subprocess.Popen[str], dict[str, str]]:
    path = folder / "router.json"
    path.write_bytes(msgspec.json.encode(spec))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.router", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, log = process.communicate(timeout=30)
    return process.returncode, log


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "parent"])
def test_the_process_starts_and_ends_cleanly(spec: RouterSpec, tmp_path: Path, end: str) -> None:
    process, news = start_process(spec, tmp_path)
    with httpx.Client(base_url=f"http://{news['listening']}") as client:
        assert client.get("/health/live").status_code == 200
        eventually(lambda: client.get("/health").json()["stage"] == "registry", "the tokenizer was not loaded")
        assert client.get("/health").status_code == 503
        if end == "parent":
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        else:
            os.kill(process.pid, getattr(signal, end))
        code, log = finish(process)
    assert code == 0, log
    assert "Traceback" not in log


def test_what_it_can_not_start_with_is_said_and_ends_it(spec: RouterSpec, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = msgspec.structs.replace(spec, port=taken.getsockname()[1])
        for bad in (busy, msgspec.structs.replace(spec, policy="nope")):
            process, news = start_process(bad, tmp_path)
            assert finish(process)[0] == 1 and news["failed"]


def test_a_folder_without_a_tokenizer_ends_it_with_the_reason(spec: RouterSpec, tmp_path: Path) -> None:
    process, _ = start_process(msgspec.structs.replace(spec, model_path=str(tmp_path)), tmp_path)
    assert process.stdout is not None
    assert "tokenizer.json" in json.loads(process.stdout.readline())["failed"]
    assert finish(process)[0] == 1


def test_two_servers_in_one_process_do_not_share_counts(live: Lives) -> None:
    with live() as one, live() as two:
        threads = [threading.Thread(target=httpx.get, args=(one.url + "/nope",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        values = [s.process.service.metrics.registry.get_sample_value(metrics.ERRORS, {"code": "not_found"})
                  for s in (one, two)]  # fmt: skip
        assert values == [3, None]


def test_metrics_are_served_on_a_port_of_their_own_behind_the_same_key(live: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with live(metrics_port=port, api_key="secret") as running:
        url, key = f"http://127.0.0.1:{port}", {"authorization": "Bearer secret"}
        here = httpx.get(url + "/metrics", headers=key)
        assert here.status_code == 200 and "neap_" in here.text
        assert here.headers["content-type"] == httpx.get(running.url + "/metrics", headers=key).headers["content-type"]
        assert httpx.get(url + "/metrics").json()["error"]["code"] == "invalid_api_key"
        for method, path, status in (("GET", "/v1/models", 404), ("POST", "/metrics", 405)):
            assert httpx.request(method, url + path, headers=key).status_code == status
