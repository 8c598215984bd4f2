"""The benchmark's client against scripted servers, and its arithmetic."""

from __future__ import annotations

import asyncio

import pytest

from cluster.bench.client import Outcome, stream_completion
from cluster.bench.report import percentile, summarise

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
TOKEN = b'data: {"choices": [{"text": "a"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'


async def outcome_of(answer: bytes) -> Outcome:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await stream_completion("127.0.0.1", port, {"prompt": "x"}, api_key="k")


@pytest.mark.parametrize(
    ("answer", "error", "num_tokens"),
    [
        (HEAD + TOKEN * 3 + USAGE + b"data: [DONE]\n\n", "", 3),
        (HEAD + TOKEN, "cut off", 0),
        (HEAD + b'data: {"error": {"code": "kv_transfer_failed"}}\n\ndata: [DONE]\n\n', "kv_transfer_failed", 0),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", "HTTP 429", 0),
    ],
)
def test_an_answer_is_counted_or_its_failure_named(answer: bytes, error: str, num_tokens: int) -> None:
    outcome = asyncio.run(outcome_of(answer))
    assert (outcome.error, outcome.num_tokens) == (error, num_tokens)
    assert outcome.error or 0 < outcome.first_token_s <= outcome.total_s


def test_nobody_at_the_port_is_an_outcome() -> None:
    assert asyncio.run(stream_completion("127.0.0.1", 1, {})).error.startswith("connect")


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.5, 0.75, 0.99)] == [2.0, 3.0, 4.0]
    assert percentile([], 0.5) == 0.0


def test_the_summary_leaves_failed_requests_out_of_the_times() -> None:
    good = Outcome(first_token_s=0.1, total_s=0.5, num_tokens=5)
    figures = summarise([good, good, Outcome(error="HTTP 429", total_s=9.0)], seconds=2.0)
    assert (figures["requests"], figures["errors"]) == (3, {"HTTP 429": 1})
    assert (figures["output_tokens_per_s"], figures["requests_per_s"]) == (5.0, 1.0)
    assert (figures["ttft_p50_ms"], figures["time_per_token_p99_ms"]) == (100.0, 100.0)
