"""The serve bench's arithmetic: goodput, failures by kind, the server's counters."""

from __future__ import annotations

from cluster.bench.counters import difference, parse_counters
from cluster.bench.serve_bench import Sample, Targets, read_sample, summarise
from cluster.bench.stream import Reply
from tests.cluster.bench.conftest import DONE, HEAD, chunked, token

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
