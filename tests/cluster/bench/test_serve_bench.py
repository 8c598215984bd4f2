"""The serve bench's arithmetic: goodput, failures by kind, the server's counters."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from typer.testing import CliRunner

from cluster.bench.counters import difference, parse_counters
from cluster.bench.serve_bench import Sample, Targets, read_sample, summarise
from cluster.bench.stream import Reply
from cluster.cli.app import app
from tests.cluster.bench.conftest import DONE, HEAD, chunked, scripted, token

USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
METRICS = """\
# TYPE neap_requests_total counter
neap_requests_total{endpoint="chat"} %d
# TYPE neap_ttft histogram
neap_ttft_bucket{le="+Inf"} %d
neap_ttft_count %d
neap_ttft_sum %f
# TYPE neap_queued gauge
neap_queued 7
"""


def kept(*parts: bytes) -> Reply:
    return Reply(status=200, first_s=0.2, last_s=0.6, raw=HEAD + chunked(*parts) + b"0\r\n\r\n")


def test_a_sample_has_the_tokens_that_the_server_counted() -> None:
    sample = read_sample(kept(token("ab"), token("c") + USAGE, DONE))
    assert (sample.num_tokens, sample.ttft_s, sample.e2e_s) == (3, 0.2, 0.6)
    assert abs(sample.tpot_s - 0.2) < 1e-9
    assert read_sample(kept(token("ab"), token("c"), DONE)).num_tokens == 2  # without usage: events with text


def test_an_error_in_the_middle_of_a_stream_is_a_failure() -> None:
    reply = kept(token("a"), b'data: {"error": {"code": "decode_worker_lost"}}\n\n')
    reply.error = "no [DONE]"
    assert read_sample(reply).error == "decode_worker_lost"


def test_a_refusal_is_named_by_status_and_code() -> None:
    raw = b'HTTP/1.1 429 x\r\nContent-Length: 40\r\n\r\n{"error": {"code": "overloaded"}}'
    assert read_sample(Reply(status=429, error="HTTP 429", raw=raw)).error == "HTTP 429 overloaded"


def test_goodput_counts_what_met_both_targets() -> None:
    good = Sample(ttft_s=0.1, tpot_s=0.01, e2e_s=0.5, num_tokens=5)
    late = Sample(ttft_s=2.0, tpot_s=0.01, e2e_s=2.5, num_tokens=5)
    slow = Sample(ttft_s=0.1, tpot_s=0.5, e2e_s=2.5, num_tokens=5)
    figures = summarise([good, late, slow, Sample(error="HTTP 429")], Targets(ttft_ms=1000, tpot_ms=100), 2.0)
    assert figures["goodput"]["share"] == 0.25 and figures["goodput"]["requests_per_s"] == 0.5
    assert figures["failures"] == {"HTTP 429": 1}
    assert (figures["requests_per_s"], figures["output_tokens_per_s"]) == (1.5, 7.5)
    assert figures["ttft_ms"] == {"p50": 100.0, "p90": 2000.0, "p99": 2000.0}


def test_only_what_moved_is_told_of_the_counters() -> None:
    before, after = parse_counters(METRICS % (5, 5, 5, 1.0)), parse_counters(METRICS % (8, 8, 8, 2.5))
    assert difference(before, after) == {
        'neap_requests_total{endpoint="chat"}': 3.0,
        "neap_ttft_count": 3.0,
        "neap_ttft_sum": 1.5,
    }
    assert difference(after, after) == {}


def run_command(*arguments: str, failing: int = -1) -> tuple[int, str]:
    """`neap bench serve` against a scripted server whose request number `failing` gets a 429."""
    good = (HEAD, chunked(token("a")), chunked(token("b")), chunked(USAGE, DONE) + b"0\r\n\r\n")
    refused = (b"HTTP/1.1 429 x\r\nContent-Length: 33\r\n\r\n", b'{"error": {"code": "overloaded"}}\n')

    async def main() -> tuple[int, str]:
        async with scripted(lambda number: refused if number == failing else good) as target:
            command = ["bench", "serve", "--url", target.url, *arguments]
            result = await asyncio.to_thread(CliRunner().invoke, app, command)
            return result.exit_code, result.output

    return asyncio.run(main())


def test_any_server_can_be_measured_and_the_json_has_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, shown = run_command("--requests", "30", "--rate", "300", "--json", str(file))
    figures = json.loads(file.read_text())
    assert code == 0, shown
    assert (figures["model"], figures["requests"], figures["failures"]) == ("scripted", 30, {})
    assert {"ttft_ms", "tpot_ms", "e2e_ms", "goodput", "output_tokens_per_s", "server", "load"} <= set(figures)
    assert set(figures["ttft_ms"]) == {"p50", "p90", "p99"}
    assert figures["server"] == {}  # it has no /metrics
    assert figures["load"]["seed"] == 0 and figures["goodput"]["share"] == 1.0
    assert "ttft ms" in shown and "goodput" in shown


def test_a_refused_request_is_counted_by_kind_and_fails_the_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, _ = run_command("--requests", "12", "--rate", "300", "--json", str(file), failing=5)
    assert code == 1
    assert json.loads(file.read_text())["failures"] == {"HTTP 429 overloaded": 1}


def test_mistakes_are_named() -> None:
    for arguments, words in (
        (["--rate", "0"], "--rate 0 needs --trace"),
        (["--url", "ftp://x"], "expected http://HOST:PORT"),
        (["--trace", "/nowhere.csv", "--url", "127.0.0.1:1"], "/nowhere.csv"),
        (["--url", "127.0.0.1:1"], "/v1/models"),
    ):
        result = CliRunner().invoke(app, ["bench", "serve", *arguments])
        assert result.exit_code == 1 and words in result.output, (arguments, result.output)
